"""Rasters as GDAL opens them: by the driver that their type asks for, compared with what was said of them, patiently.

GDAL decides by content what a file is, and some formats name other files. So only the drivers of GeoTIFF and JPEG2000
are let at what a catalogue or a product brings, and nothing that lies beside a file is looked at.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import stackstac
from numpy.typing import NDArray
from rasterio.errors import RasterioError
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window
from stackstac.rio_env import LayeredEnv
from stackstac.rio_reader import (
    AutoParallelRioReader,
    SelfCleaningDatasetReader,
    SingleThreadedRioDataset,
    ThreadLocalRioDataset,
)

from .addresses import failure, gdal_path, keep_secrets_from_logs, without_secrets
from .grids import TOLERANCE, Grid
from .items import LARGEST_SIDE, BandAsset
from .patience import patiently
from .radiometry import SATURATED

LIMITS = {
    "GDAL_HTTP_CONNECTTIMEOUT": 10,
    "GDAL_HTTP_LOW_SPEED_TIME": 20,
    "GDAL_HTTP_LOW_SPEED_LIMIT": 1,
    "GDAL_CACHEMAX": 256 * 2**20,
}
"""Seconds to connect; seconds without a byte per second after which a transfer has stalled; bytes that GDAL keeps, by
default a twentieth of the machine's memory. What the environment says wins."""

ALONE = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_PAM_ENABLED": False,
    "GDAL_GEOREF_SOURCES": "INTERNAL",
}
"""So that GDAL does not look beside the file that it opens: masks, overviews and ``.aux.xml`` may be of any format."""

LARGEST_BLOCK = 2**30
"""Bytes of a tile of a file, which is decoded as a whole."""

keep_secrets_from_logs("rasterio._base", "rasterio._env", "rasterio._err")  # where GDAL's errors are logged


def gdal_env() -> LayeredEnv:
    """Return stackstac's settings of GDAL, with limits to how long a server may keep silent, and to what is kept."""
    limits = {name: value for name, value in LIMITS.items() if name not in os.environ}
    return stackstac.DEFAULT_GDAL_ENV.updated(always=limits | ALONE)


def open_alone(path: str, drivers: tuple[str, ...]) -> Any:
    """Return the dataset at what GDAL calls a path, if one of some drivers opens it and it is a plain image.

    Raises
    ------
    ValueError
        If it has several bands, is rotated, or is too large to be an image of Sentinel-2.
    rasterio.errors.RasterioError
        If it cannot be opened.
    """
    file = SelfCleaningDatasetReader(path, sharing=False, driver=list(drivers))
    height, width = file.block_shapes[0] if file.count else (0, 0)
    transform, problem = file.transform, None
    if file.count != 1:
        problem = f"holds {file.count} bands; files of one band are read"
    elif max(file.shape) > LARGEST_SIDE:
        problem = f"has {file.height} by {file.width} pixels; up to {LARGEST_SIDE} a side are read"
    elif height * width * np.dtype(file.dtypes[0]).itemsize > LARGEST_BLOCK:
        problem = f"is stored in tiles of {height} by {width} pixels, which would have to be read whole"
    elif transform.b or transform.d or transform.a <= 0 or transform.e >= 0:
        problem = f"is rotated, or not north-up: its transform is {tuple(transform)[:6]}. Warp it to a north-up grid"
    if problem:
        file.close()
        raise ValueError(problem)
    return file


def grid_of(file: Any) -> Grid:
    """Return the grid of an open dataset."""
    t = file.transform
    return Grid(t.c, t.f, t.a, t.e, (file.height, file.width))


def contradiction(file: Any, asset: BandAsset) -> str | None:
    """Return in words in what an open dataset is not what its item says, with the remedy, or None."""
    found, said = grid_of(file), asset.grid
    dtype, expected = file.dtypes[0], asset.radiometry.dtype
    remedy = "Correct the item, or leave it out"
    if file.crs is None:
        return (
            f"has no CRS; its item says EPSG:{asset.epsg}. Write the CRS into the file (gdal_edit.py -a_srs), or leave "
            "the item out"
        )
    if file.crs.to_epsg() != asset.epsg and not _same_crs(file.crs, asset.epsg):
        code = f"EPSG:{file.crs.to_epsg()}" if file.crs.to_epsg() else file.crs.to_string()[:60]
        return f"is in {code}; its item says EPSG:{asset.epsg}. {remedy}"
    slack = TOLERANCE * min(abs(said.dx), abs(said.dy))
    sizes = np.subtract((found.dx, found.dy), (said.dx, said.dy))
    if found.shape != said.shape or (np.abs(sizes) * max(said.shape) > slack).any():
        return (
            f"has {_size(found)}; its item says {_size(said)}. {remedy}; a band must be read at its native resolution"
        )
    if max(abs(found.x0 - said.x0), abs(found.y0 - said.y0)) > slack:
        return f"starts at {found.x0:.10g}, {found.y0:.10g}; its item says {said.x0:.10g}, {said.y0:.10g}. {remedy}"
    if dtype != expected:
        why = f"its item says {expected}" if asset.typed else f"its item tells no type, so that {expected} is expected"
        return (
            f"holds {dtype}; {why}. If the file is right, write its type into the item: asset['data_type'] = "
            f"{dtype!r}, with asset['raster:scale'] and asset['raster:offset'] unless the numbers are reflectance"
        )
    if asset.nodata is None:
        return None
    if file.nodata is not None and not np.isclose(file.nodata, asset.nodata, equal_nan=True):
        return f"says that missing pixels hold {file.nodata:g}; its item says {asset.nodata:g}. {remedy}"
    if file.nodata is None and asset.nodata > 0 and asset.nodata != SATURATED:
        return (
            f"does not say that missing pixels hold {asset.nodata:g}, as its item does, and they would be taken for "
            "valid. Write nodata into the file (gdal_edit.py -a_nodata)"
        )
    return None


def _same_crs(crs: Any, epsg: int) -> bool:
    from rasterio.crs import CRS

    return bool(crs == CRS.from_epsg(epsg))


def _size(grid: Grid) -> str:
    return f"{grid.shape[0]} by {grid.shape[1]} pixels of {grid.dx:.10g} by {abs(grid.dy):.10g}"


class PatientReader(AutoParallelRioReader):
    """stackstac's reader of one band of an item, which asks again where that is not on this machine."""

    def __init__(self, *, asset: BandAsset, **options: Any) -> None:
        super().__init__(**options)
        self.asset = asset
        self._whole = ""

    def __getstate__(self) -> Any:
        return {**super().__getstate__(), "asset": self.asset}

    def read(self, window: Any, **options: Any) -> Any:
        """Return a window's pixels.

        Raises
        ------
        RuntimeError
            If they cannot be read; it names the file and the window, without what is secret in a signed URL.
        ValueError
            If the file is not what its item says.
        """
        try:
            pixels = patiently(self.asset.href.whole, RuntimeError)(self._read_afresh, window, options)
            problem = self._below_nodata(pixels)
        except RuntimeError as error:
            failed: Exception = RuntimeError(without_secrets(str(error), self._whole, self.asset.href.whole))
        except ValueError as error:
            failed = ValueError(without_secrets(str(error), self._whole, self.asset.href.whole))
        else:
            if problem is None:
                return pixels
            failed = ValueError(problem)
        raise failed

    def _read_afresh(self, window: Any, options: dict[str, Any]) -> Any:
        try:
            return super().read(window, **options)
        except RuntimeError:
            self.close()
            # What GDAL keeps of the file may be what was wrong with it.
            kept = "/vsicurl/:/vsis3/:/vsigs/:/vsiaz/:/vsioss/"
            self.gdal_env: Any = self.gdal_env.updated(always={"CPL_VSIL_CURL_NON_CACHED": kept})
            raise

    def _open(self) -> Any:
        """Return the dataset, on the grid of the cube; called by stackstac where none is open."""
        self._whole = self.asset.href.reveal()
        about = f"{self.asset.about}: {self.asset.href}"
        with self.gdal_env.open:
            try:
                file = open_alone(gdal_path(self._whole), self.asset.drivers)
            except RasterioError as error:
                problem = f"Error opening {self.asset.href}, of {self.asset.about}: {failure(error, self._whole)}"
                problem = f"{problem.rstrip('.')}. Is it there, and {' or '.join(self.asset.drivers)} as its item says?"
                raise RuntimeError(problem) from None
            except ValueError as error:
                raise ValueError(f"{about} {error}") from None
            if contradicts := contradiction(file, self.asset):
                file.close()
                raise ValueError(f"{about} {contradicts}")
            wanted, vrt = self.spec.vrt_params, None
            own = {"crs": self.asset.epsg, "transform": file.transform, "height": file.height, "width": file.width}
            if wanted != own:
                with self.gdal_env.open_vrt:
                    warped = {"resampling": self.resampling, "add_alpha": file.nodata is None}
                    vrt = WarpedVRT(file, sharing=False, **warped, **wanted)
        kind = ThreadLocalRioDataset if file.driver == "GTiff" else SingleThreadedRioDataset
        return kind(self.gdal_env, file, vrt=vrt)

    def _below_nodata(self, pixels: NDArray) -> str | None:
        """Return in words that pixels of a signed type would be taken for missing although they are not, or None."""
        nodata = self.asset.radiometry.nodata
        if np.dtype(self.asset.radiometry.dtype).kind != "i" or not pixels.size:
            return None
        lowest = pixels[pixels != self.fill_value].min(initial=nodata)
        if lowest >= nodata:
            return None
        return (
            f"{self.asset.about}: {self.asset.href} holds {lowest}, below {nodata:g}, at and below which pixels are "
            "missing. Write what missing pixels hold into the item: asset['nodata'] = -32768, or what it is"
        )


@dataclass(frozen=True)
class Readers:
    """What stackstac makes a reader with: of the band that an address stands for."""

    assets: Mapping[str, BandAsset]

    def __call__(self, *, url: str, **options: Any) -> PatientReader:
        asset = self.assets[url]
        return PatientReader(asset=asset, url=str(asset.href), **options)


@dataclass
class Image:
    """One raster as an array ``y, x``; each thread opens it for itself, when it is asked for pixels."""

    path: str
    """As GDAL calls it."""
    about: str
    """For errors."""
    drivers: tuple[str, ...]
    shape: tuple[int, int] = field(init=False)
    dtype: np.dtype = field(init=False)
    grid: Grid = field(init=False)
    crs: Any = field(init=False)
    ndim = 2

    def __post_init__(self) -> None:
        self._opened = threading.local()
        file = self._file()
        self.shape, self.dtype = file.shape, np.dtype(file.dtypes[0])
        self.grid, self.crs = grid_of(file), file.crs

    def __getitem__(self, block: tuple[slice, slice]) -> NDArray:
        file = self._file()
        try:
            with gdal_env().read:
                return file.read(1, window=Window.from_slices(*block))
        except RasterioError as error:
            problem = failure(error)
        raise RuntimeError(f"{self.about} cannot be read: {problem}. It may be cut: get the product again")

    def _file(self) -> Any:
        """Return the dataset of this thread."""
        if (file := getattr(self._opened, "file", None)) is not None:
            return file
        try:
            with gdal_env().open:
                self._opened.file = open_alone(self.path, self.drivers)
            return self._opened.file
        except (RasterioError, ValueError) as error:
            problem = str(error)
            if isinstance(error, RasterioError):
                problem = f"cannot be opened: {failure(error).rstrip('.')}. It may be damaged: get the product again"
        raise ValueError(f"{self.about} {problem}")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_opened"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _opened=threading.local())

    def __dask_tokenize__(self) -> Any:
        return (self.path, self.shape, str(self.dtype))
