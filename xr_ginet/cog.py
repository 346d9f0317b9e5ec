"""Cubes as Cloud Optimized GeoTIFFs, for those who work with files.

Pixels are streamed, chunk by chunk, into a plain tiled GeoTIFF (rioxarray's writer), of which GDAL then makes the COG
with its overviews, block by block: neither step holds an image in memory. All bands of one time are computed together,
so that the network runs once for all of them.
"""

from __future__ import annotations

import json
import re
import threading
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple
from uuid import uuid4

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from .encoding import FLOAT, StoredDtype, apply, encoding_of, is_reflectance, plain
from .guards import locked
from .paths import expanded
from .schedulers import compute_writes, current_client
from .sentinel2.bands import BANDS
from .sentinel2.grids import FINE_DIMS, read_crs
from .sentinel2.layouts import place
from .sentinel2.radiometry import Encoding, check_reflectance


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
        Bands of float reflectance with dims ``[time,] y, x`` and a CRS, lazy or not, chunked in any way. Other
        variables on that grid, such as indices and classes, are stored as they are, in their own dtype; those on other
        grids, as ``SCL`` at 20 m, are left out.
    folder : str or Path
        Made where it does not exist. Files are called ``B05.tif`` or, where the cube has times,
        ``20240621T105621_B05.tif``; stacked, ``bands.tif`` or ``20240621T105621.tif``.
    stacked : bool
        All bands of one time in one file, in the order of the cube; in floating point where not all can be stored
        alike.
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
    reflectance = encoding_of(ds, dtype, like)
    bands = [name for name in ds.data_vars if set(FINE_DIMS) <= set(ds[name].dims)]
    if not bands or len(bands) < len([name for name in ds.data_vars if name in BANDS]):
        raise ValueError(
            f"the cube has the dims {tuple(ds.sizes)}: its bands must lie on one grid, y and x. Super-resolve it "
            "first, or select the 10 m bands"
        )
    _check_names(ds[bands])
    crs = read_crs(ds)
    if crs is None:
        raise ValueError("the cube has no CRS, by which to place its pixels. Type ds.rio.write_crs('EPSG:…')")
    cube = place(ds[bands], crs=crs)
    folder = Path(expanded(folder))
    wanted = [_File(folder / name, image, stored) for name, image, stored in _files(cube, stacked, reflectance)]
    there = [file.path for file in wanted if file.path.exists()]
    if there and not overwrite:
        raise FileExistsError(
            f"{there[0]} exists, and {len(there) - 1} more. Type overwrite=True, or name another folder"
        )
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    n_together = len(wanted) // max(1, cube.sizes.get("time", 1))
    try:
        for start in range(0, len(wanted), n_together):
            together = wanted[start : start + n_together]
            with ExitStack() as locks:
                for file in together:
                    locks.enter_context(locked(file.path.with_name(f".{file.path.name}.lock"), file.path))
                    _clear_up(file.path)
                _write(together, progress=progress)
    except BaseException:
        if is_new and not any(folder.iterdir()):
            folder.rmdir()
        raise
    return [file.path for file in wanted]


def _check_names(cube: xr.Dataset) -> None:
    """Raise where a band's name is no name of a file, or bands have other dimensions than files of images have."""
    for name, band in cube.data_vars.items():
        if not isinstance(name, str) or not name or {*"/\\\0:"} & {*name} or name in (".", ".."):
            raise ValueError(
                f"the cube's variable {name!r} cannot be the name of a file. Type ds.rename({{{name!r}: …}}) first"
            )
        if strange := [str(dim) for dim in band.dims if dim not in ("time", *FINE_DIMS)]:
            dim = strange[0]
            raise ValueError(
                f"{name} has the dimension {dim!r} besides {', '.join(('time', *FINE_DIMS))}, and each file holds one "
                f"time. Write each by itself, ds.isel({dim}=0) and so on to a folder of its own, or give them times: "
                f"ds.rename({dim}='time').assign_coords(time=[…])"
            )


class _File(NamedTuple):
    """One file to write."""

    path: Path
    image: xr.DataArray
    """Dims ``band, y, x``."""
    encoding: Encoding


def _files(cube: xr.Dataset, stacked: bool, reflectance: Encoding) -> list[tuple[str, xr.DataArray, Encoding]]:
    """Return the name of each file, its image ``(band, y, x)`` and how that is stored, time by time."""
    found = []
    attrs = {str(key): _tag(value, f"the attribute {key!r} of the cube") for key, value in cube.attrs.items()}
    times = [cube.isel(time=i) for i in range(cube.sizes["time"])] if "time" in cube.dims else [cube]
    for one in times:
        stamp = _moment(one).translate(str.maketrans("", "", "-: ")) if "time" in one.coords else ""
        bands = [str(name) for name in one.data_vars]
        for names in [bands] if stacked else [[name] for name in bands]:
            stored = _stored_as({name: one[name] for name in names}, reflectance)
            image = one[names].to_dataarray("band").transpose("band", *FINE_DIMS)
            image.attrs = attrs
            label = "" if stacked and stamp else "bands" if stacked else names[0]
            found.append((f"{'_'.join(part for part in (stamp, label) if part)}.tif", image, stored))
    if len({name for name, *_ in found}) < len(found):
        raise ValueError("two times of the cube are less than a second apart: their files would have one name")
    return found


def _stored_as(images: dict[str, xr.DataArray], reflectance: Encoding) -> Encoding:
    """Return how the images of one file are stored: bands as reflectance is, others as they are, both as floats.

    Raises
    ------
    ValueError
        If a GeoTIFF cannot hold one, or one file all of them.
    """
    found = set()
    for name, image in images.items():
        kind, size = image.dtype.kind, image.dtype.itemsize
        if kind not in "biuf":
            raise ValueError(f"{name} holds {image.dtype}, and a GeoTIFF numbers. Leave it out: ds.drop_vars({name!r})")
        if is_reflectance(name, image):
            found.add(reflectance)
        elif kind == "f":
            found.add(Encoding("float64") if size > 4 else FLOAT)
        else:
            found.add(Encoding.from_attrs(image.attrs, dtype="uint8" if kind == "b" else image.dtype))
    if len(found) == 1:
        return found.pop()
    if wide := [name for name, image in images.items() if image.dtype.kind in "iu" and image.dtype.itemsize > 4]:
        raise ValueError(
            f"{', '.join(wide)} has integers of 64 bits, which one file with other bands cannot hold. Leave it out, or "
            "type stacked=False"
        )
    return Encoding("float64") if any(np.dtype(one.dtype).itemsize > 4 or _is_wide(one) for one in found) else FLOAT


def _is_wide(encoding: Encoding) -> bool:
    """Return whether numbers are integers that float32 does not tell apart."""
    return not encoding.is_float and np.dtype(encoding.dtype).itemsize > 2


@dataclass(frozen=True)
class _Encode:
    """The numbers of a block of bands, each of which is refused where it is no reflectance."""

    encoding: Encoding
    names: tuple[str, ...]

    def __call__(self, block: NDArray) -> NDArray:
        for band, name in zip(block, self.names, strict=True):
            if name in BANDS and not self.encoding.is_float:
                check_reflectance(band, name)
        return self.encoding.encode(block)


def _tag(value: Any, what: str) -> str:
    """Return an attribute as a tag of a file, whose values are text."""
    simple = plain(value, what)
    return simple if isinstance(simple, str) else json.dumps(simple) if isinstance(simple, list | dict) else str(simple)


def _moment(image: xr.Dataset | xr.DataArray) -> str:
    """Return the one time of an image as ISO 8601 has it."""
    return str(np.datetime_as_string(image["time"].values, "s"))


def _write(wanted: list[_File], *, progress: bool) -> None:
    """Write the files of one time, computed together."""
    token = uuid4().hex
    plain = {file.path: file.path.with_name(f".{file.path.name}.{token}.tif") for file in wanted}
    parts = {file.path: file.path.with_name(f".{file.path.name}.{token}.part.tif") for file in wanted}
    try:
        streams = [_stream(file, plain[file.path]) for file in wanted]
        compute_writes(streams, progress=progress, position=slice(-2, None))  # of one time, however bands lie
        for file in wanted:
            _describe(plain[file.path], file)
            _optimise(plain[file.path], parts[file.path], means=_has_means(file))
            plain[file.path].unlink()
        for file in wanted:
            parts[file.path].replace(file.path)
    finally:
        for left in (*plain.values(), *parts.values()):
            left.unlink(missing_ok=True)


def _has_means(file: _File) -> bool:
    """Return whether the mean of pixels says something: not of integers that are no reflectance, as classes are."""
    return file.image.dtype.kind == "f"


def _clear_up(path: Path) -> None:
    """Delete the parts of a file that a job which was killed left."""
    ours = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{32}(\.part)?\.tif")
    for left in path.parent.iterdir():
        if ours.fullmatch(left.name):
            left.unlink(missing_ok=True)


def _stream(file: _File, path: Path) -> Any:
    """Return what writes an image to a plain GeoTIFF when computed; the file is there at once, empty."""
    import rioxarray  # noqa: F401 - registers .rio

    image, encoding = file.image.chunk(), file.encoding
    if _has_means(file):
        encode = _Encode(encoding, tuple(str(name) for name in image["band"].values))
        image = apply(encode, image.chunk(band=-1), encoding.dtype)
    else:
        image = image.astype(encoding.dtype)
    options = {"driver": "GTiff", "tiled": True, "blockxsize": 512, "blockysize": 512, "bigtiff": "if_safer"}
    stored = image.drop_attrs(deep=False).rio.write_nodata(encoding.to_attrs().get("_FillValue"))
    return stored.rio.to_raster(path, **options, lock=_lock(), compute=False)


def _lock() -> Any:
    """Return a lock that all who compute share: one file has one writer at a time."""
    if current_client() is None:
        return threading.Lock()
    from distributed import Lock

    return Lock(f"xr-ginet-{uuid4().hex}")


def _describe(path: Path, wanted: _File) -> None:
    """Write names, scale, offset and provenance into a file."""
    import rasterio

    image, encoding = wanted.image, wanted.encoding
    names = [str(name) for name in image["band"].values]
    with rasterio.open(path, "r+") as file:
        file.descriptions = names
        file.scales = [encoding.scale_factor] * len(names)
        file.offsets = [encoding.add_offset] * len(names)
        file.update_tags(**{key: value for key, value in image.attrs.items() if key not in ("ns", "bidx")})
        if "time" in image.coords:
            file.update_tags(TIFFTAG_DATETIME=_moment(image).replace("-", ":").replace("T", " "))
        for i, name in enumerate(names, 1):
            if name in BANDS:
                file.update_tags(i, wavelength=BANDS[name].wavelength, wavelength_units="nm")


def _optimise(plain: Path, path: Path, *, means: bool) -> None:
    """Make the COG; its overviews hold means or, of classes, the nearest pixels."""
    import rasterio.shutil

    rasterio.shutil.copy(
        plain,
        path,
        driver="COG",
        compress="deflate",
        predictor="yes",
        blocksize=512,
        overview_resampling="average" if means else "nearest",
        num_threads="all_cpus",
        bigtiff="if_safer",
    )
