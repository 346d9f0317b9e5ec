"""Cubes as Cloud Optimized GeoTIFFs, for those who work with files.

Pixels are streamed, chunk by chunk, into a plain tiled GeoTIFF (rioxarray's writer), of which GDAL then makes the COG
with its overviews, block by block: neither step holds an image in memory. All bands of one time are computed together,
so that the network runs once for all of them.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import numpy as np
import xarray as xr

from .encoding import StoredDtype, digital_numbers, encoding_of
from .guards import locked
from .schedulers import compute_writes, current_client
from .sentinel2.bands import BANDS
from .sentinel2.grids import FINE_DIMS, read_crs
from .sentinel2.layouts import place


def to_cog(
    ds: xr.Dataset,
    folder: str | Path,
    *,
    stacked: bool = False,
    dtype: StoredDtype = "uint16",
    like: Literal["input"] | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> list[Path]:
    """Write a cube on one grid as Cloud Optimized GeoTIFFs; computes.

    Parameters
    ----------
    ds : Dataset
        Bands of float reflectance with dims ``[time,] y, x`` and a CRS, lazy or not, chunked in any way.
    folder : str or Path
        Made where it does not exist. Files are called ``B05.tif`` or, where the cube has times,
        ``20240621T105621_B05.tif``; stacked, ``bands.tif`` or ``20240621T105621.tif``.
    stacked : bool
        All bands of one time in one file, in the order of the cube.
    dtype : {"uint16", "float32"}
        As for `to_zarr`. Readers that honour a raster's scale and offset, as QGIS does, show reflectance.
    like : {"input"}, optional
        In place of ``dtype``: dtype, scale, offset and nodata are those of the digital numbers that the cube was made
        from.
    overwrite : bool
        Replace files that exist already; each when the new one is complete.
    progress : bool
        Show a progress bar for each time.

    Returns
    -------
    list of Path
        What was written. Each file appears when it is complete; where writing fails, no part of one stays behind, and
        what a job that was killed left is cleared by the next one that writes the file.

    Raises
    ------
    FileExistsError
        If a file exists and ``overwrite`` is false; before anything is computed.
    RuntimeError
        If another job writes one of the files.
    ValueError
        If there is no band on the 10 m grid, bands lie on several grids, the cube has no CRS, an argument has an
        unknown value, or ``like="input"`` and the cube does not tell what it was made from.
    """
    encoding = encoding_of(ds, dtype, like)
    bands = [name for name in ds.data_vars if set(FINE_DIMS) <= set(ds[name].dims)]
    if not bands or len(bands) < len([name for name in ds.data_vars if name in BANDS]):
        raise ValueError(
            f"the cube has the dims {tuple(ds.sizes)}: its bands must lie on one grid, y and x. Super-resolve it "
            "first, or select the 10 m bands"
        )
    crs = read_crs(ds)
    if crs is None:
        raise ValueError("the cube has no CRS, by which to place its pixels. Type ds.rio.write_crs('EPSG:…')")
    cube = place(ds[bands], crs=crs)
    folder = Path(folder).expanduser()
    wanted = [(folder / name, image) for name, image in _files(cube, stacked)]
    there = [path for path, _ in wanted if path.exists()]
    if there and not overwrite:
        raise FileExistsError(
            f"{there[0]} exists, and {len(there) - 1} more. Type overwrite=True, or name another folder"
        )
    n_together = len(wanted) // max(1, cube.sizes.get("time", 1))
    for start in range(0, len(wanted), n_together):
        together = wanted[start : start + n_together]
        with ExitStack() as locks:
            for path, _ in together:
                locks.enter_context(locked(path.with_name(f".{path.name}.lock"), path))
                _clear_up(path)
            _write(together, encoding, progress=progress)
    return [path for path, _ in wanted]


def _files(cube: xr.Dataset, stacked: bool) -> list[tuple[str, xr.DataArray]]:
    """Return the name of each file and its image ``(band, y, x)``, time by time."""
    found = []
    times = [cube.isel(time=i) for i in range(cube.sizes["time"])] if "time" in cube.dims else [cube]
    for one in times:
        stamp = _moment(one).translate(str.maketrans("", "", "-: ")) if "time" in one.coords else ""
        bands = [str(name) for name in one.data_vars]
        for names in [bands] if stacked else [[name] for name in bands]:
            image = one[names].to_dataarray("band").transpose("band", *FINE_DIMS).assign_attrs(one.attrs)
            label = "" if stacked and stamp else "bands" if stacked else names[0]
            found.append((f"{'_'.join(part for part in (stamp, label) if part)}.tif", image))
    if len({name for name, _ in found}) < len(found):
        raise ValueError("two times of the cube are less than a second apart: their files would have one name")
    return found


def _moment(image: xr.Dataset | xr.DataArray) -> str:
    """Return the one time of an image as ISO 8601 has it."""
    return str(np.datetime_as_string(image["time"].values, "s"))


def _write(wanted: list[tuple[Path, xr.DataArray]], encoding: Mapping[str, Any], *, progress: bool) -> None:
    """Write the files of one time, computed together."""
    token = uuid4().hex
    plain = {path: path.with_name(f".{path.name}.{token}.tif") for path, _ in wanted}
    parts = {path: path.with_name(f".{path.name}.{token}.part.tif") for path, _ in wanted}
    try:
        streams = [_stream(image, plain[path], encoding) for path, image in wanted]
        compute_writes(streams, progress=progress, position=slice(-2, None))  # of one time, however bands lie
        for path, image in wanted:
            _describe(plain[path], image, encoding)
            _optimise(plain[path], parts[path])
            plain[path].unlink()
        for path, _ in wanted:
            parts[path].replace(path)
    finally:
        for left in (*plain.values(), *parts.values()):
            left.unlink(missing_ok=True)


def _clear_up(path: Path) -> None:
    """Delete the parts of a file that a job which was killed left."""
    ours = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{32}(\.part)?\.tif")
    for left in path.parent.iterdir():
        if ours.fullmatch(left.name):
            left.unlink(missing_ok=True)


def _stream(image: xr.DataArray, path: Path, encoding: Mapping[str, Any]) -> Any:
    """Return what writes an image to a plain GeoTIFF when computed; the file is there at once, empty."""
    import rioxarray  # noqa: F401 - registers .rio

    stored = digital_numbers(image.chunk(), encoding).drop_attrs(deep=False)
    options = {"driver": "GTiff", "tiled": True, "blockxsize": 512, "blockysize": 512, "bigtiff": "if_safer"}
    stored = stored.rio.write_nodata(encoding["_FillValue"])
    return stored.rio.to_raster(path, **options, lock=_lock(), compute=False)


def _lock() -> Any:
    """Return a lock that all who compute share: one file has one writer at a time."""
    if current_client() is None:
        return threading.Lock()
    from distributed import Lock

    return Lock(f"xr-ginet-{uuid4().hex}")


def _describe(path: Path, image: xr.DataArray, encoding: Mapping[str, Any]) -> None:
    """Write names, scale, offset and provenance into a file."""
    import rasterio

    names = [str(name) for name in image["band"].values]
    with rasterio.open(path, "r+") as file:
        file.descriptions = names
        file.scales = [encoding["scale_factor"]] * len(names)
        file.offsets = [encoding["add_offset"]] * len(names)
        file.update_tags(**{str(key): str(value) for key, value in image.attrs.items()})
        if "time" in image.coords:
            file.update_tags(TIFFTAG_DATETIME=_moment(image).replace("-", ":").replace("T", " "))
        for i, name in enumerate(names, 1):
            if name in BANDS:
                file.update_tags(i, wavelength=BANDS[name].wavelength, wavelength_units="nm")


def _optimise(plain: Path, path: Path) -> None:
    import rasterio.shutil

    rasterio.shutil.copy(
        plain,
        path,
        driver="COG",
        compress="deflate",
        predictor="yes",
        blocksize=512,
        overview_resampling="average",
        num_threads="all_cpus",
        bigtiff="if_safer",
    )
