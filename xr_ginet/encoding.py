"""How a cube is stored: the numbers that stand for reflectance, chunks, shards and compression of its arrays."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from .sentinel2.bands import BANDS
from .sentinel2.grids import FINE_DIMS, read_crs
from .sentinel2.layouts import RADIOMETRIC_ATTRS, place
from .sentinel2.provenance import loaded, of_all
from .sentinel2.radiometry import ESA, Encoding, check_reflectance, source_encoding

StoredDtype = Literal["float32", "uint16"]

FLOAT = Encoding("float32")
"""Of reflectance as it is."""

CF_ATTRS = RADIOMETRIC_ATTRS - {"units", "valid_min", "valid_max", "valid_range", "actual_range"}
"""Attributes that would be taken for the encoding of floats, which they no longer are."""


class Layout(NamedTuple):
    """How arrays lie in a store."""

    zarr_format: int
    inner_chunks: int | None
    compression_level: int


def encoding_of(ds: xr.Dataset, dtype: StoredDtype, like: Literal["input"] | None) -> Encoding:
    """Return how a cube's reflectance is stored.

    Raises
    ------
    ValueError
        If an argument has an unknown value, or a cube does not tell the digital numbers that it was made from, or
        none of them stands for missing pixels.
    """
    if dtype not in ("float32", "uint16"):
        raise ValueError(f"dtype={dtype!r}: must be 'float32' or 'uint16'")
    if like is None:
        return ESA if dtype == "uint16" else FLOAT
    if like != "input":
        raise ValueError(f"like={like!r}: must be 'input', or left out")
    source = source_encoding(of_all(ds))
    if source is None:
        raise ValueError(
            "like='input', but the cube (source_encoding, or source_dtype, …) does not tell of one kind "
            "of digital numbers that it was made from: it was reflectance already, or its items differ. Type "
            "dtype='uint16'"
        )
    if source.is_float:
        return FLOAT
    if source.nodata is None:
        raise ValueError(
            f"like='input', but no {source.dtype} stood for missing pixels in what the cube was made from, and its "
            "pixels may be missing. Type dtype='uint16', or name nodata= where digital numbers are scaled"
        )
    return source


def is_reflectance(name: Any, variable: xr.Variable | xr.DataArray) -> bool:
    """Return whether a variable is a band, which is stored as reflectance is; all others are stored as they are."""
    return name in BANDS and bool(np.issubdtype(variable.dtype, np.floating))


def apply(function: Any, image: xr.DataArray, dtype: Any) -> xr.DataArray:
    """Return a function of an array's blocks, lazily where it is lazy."""
    return xr.apply_ufunc(function, image, dask="parallelized", output_dtypes=[dtype], keep_attrs=True)


def encoded(ds: xr.Dataset, reflectance: Encoding, layout: Layout) -> tuple[xr.Dataset, dict[str, dict[str, Any]]]:
    """Return the cube as it is to be written, and the encoding of its variables.

    Raises
    ------
    ValueError
        If something of it cannot be stored, whatever the target: nothing has been touched yet.
    """
    ds = ds.unify_chunks()
    chunks = {str(dim): max(sizes) for dim, sizes in ds.chunksizes.items()}
    ragged = any(set(sizes[:-1]) - {chunks[str(dim)]} for dim, sizes in ds.chunksizes.items())
    cube = loaded(place(ds.chunk(chunks) if ragged else ds, crs=read_crs(ds))).copy()
    # What lies along one dimension is small, and its chunks in the store are not those of images.
    cube = cube.assign({n: v.compute() for n, v in cube.variables.items() if v.chunks is not None and v.ndim < 2})
    encoding: dict[str, dict[str, Any]] = {}
    for name in list(cube.variables):
        cube[name] = storable(cube[name])
        variable = cube[name].variable
        new: dict[str, Any] = {}
        if name in cube.data_vars and "spatial_ref" in cube.coords:
            cube[name].attrs["grid_mapping"] = "spatial_ref"
        if is_reflectance(name, variable) and name in cube.data_vars:
            if reflectance.is_float:
                new |= {"dtype": reflectance.dtype, "_FillValue": np.dtype(reflectance.dtype).type(np.nan)}
            else:
                cube[name] = apply(_Holding(reflectance, str(name)), cube[name], reflectance.held_dtype)
                new |= reflectance.to_attrs()
        elif variable.dtype.kind == "M":
            # The default encoding counts from the first time: later times would not fit.
            new |= {"units": "microseconds since 1970-01-01", "dtype": "int64", "calendar": "proleptic_gregorian"}
        elif variable.dtype.kind == "m":
            new |= {"units": "microseconds", "dtype": "int64"}
        elif variable.dtype.kind == "f" and name in cube.data_vars:
            new |= {"dtype": variable.dtype.name, "_FillValue": variable.dtype.type(np.nan)}
        if name in cube.data_vars and variable.dtype.kind in "biufM":
            new |= _array_layout(variable, chunks, layout)
        cube[name].encoding = {}
        encoding[str(name)] = new
    cube.attrs = _storable_attrs("the cube", cube.attrs)
    _rehearse(cube, encoding, layout.zarr_format)
    return cube, encoding


@dataclasses.dataclass(frozen=True)
class _Holding:
    """What becomes of a block of reflectance when it is stored and read again; a block of anything else is refused."""

    encoding: Encoding
    band: str

    def __call__(self, block: NDArray) -> NDArray:
        check_reflectance(block, self.band)
        return self.encoding.hold(block)


def _array_layout(variable: xr.Variable, chunks: Mapping[str, int], layout: Layout) -> dict[str, Any]:
    """Return compression, chunks and shards of one array."""
    new: dict[str, Any] = {"compressors": [_zstandard(layout)]}
    if variable.chunks is not None:
        new["chunks"] = tuple(chunks[str(dim)] for dim in variable.dims)
        if layout.inner_chunks is not None and set(FINE_DIMS) <= set(variable.dims):
            new |= _sharded(new["chunks"], variable.dims, layout.inner_chunks)
    return new


def storable(array: xr.DataArray) -> xr.DataArray:
    """Return a variable whose attributes, and whose values where they are objects, can be stored.

    Raises
    ------
    ValueError
        If one of them cannot.
    """
    array = array.copy(deep=False)
    attrs = dict(array.attrs)
    if array.dtype.kind in "fMm":
        attrs = {key: value for key, value in attrs.items() if key not in CF_ATTRS}
    if array.dtype.kind in "Mm":
        attrs = {key: value for key, value in attrs.items() if key not in ("units", "calendar")}
    if array.dtype.kind == "O" and not all(isinstance(value, str) for value in array.values.ravel()):
        texts = [v if isinstance(v, str) else json.dumps(plain(v, str(array.name))) for v in array.values.ravel()]
        array = array.copy(data=np.array(texts, object).reshape(array.shape))
    if array.dtype.kind == "U":  # Zarr 3 specifies no text of one length
        array = array.astype(object)
    array.attrs = _storable_attrs(str(array.name), attrs)
    return array


def _storable_attrs(name: str, attrs: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(key): plain(value, f"the attribute {key!r} of {name}") for key, value in attrs.items()}


def plain(value: Any, what: str) -> Any:
    """Return a value in the types of JSON: numbers, text, lists, mappings; times as ISO 8601.

    Raises
    ------
    ValueError
        If it has no such form.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if np.isfinite(value) else str(value)  # JSON knows no NaN
    if isinstance(value, np.datetime64 | np.timedelta64):
        return str(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, np.generic | np.ndarray):
        return plain(value.astype(str).tolist() if value.dtype.kind in "mM" else value.tolist(), what)
    if isinstance(value, Mapping):
        return {str(key): plain(v, what) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v, what) for v in value]
    if isinstance(value, set | frozenset):
        return sorted((plain(v, what) for v in value), key=str)
    if isinstance(value, os.PathLike):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value), what)
    if hasattr(value, "to_wkt"):  # a CRS of pyproj or rasterio
        return value.to_wkt()
    if hasattr(value, "to_gdal"):  # an affine transform
        return list(value)
    raise ValueError(
        f"{what} is a {type(value).__name__}, which Zarr cannot store. Delete it, or make it a number, text or list"
    )


def _rehearse(cube: xr.Dataset, encoding: Mapping[str, Any], zarr_format: int) -> None:
    """Raise where the metadata of a cube cannot be written; tried in memory, where it leaves no half store."""
    import warnings

    import dask.array as da
    from zarr.storage import MemoryStore

    def hollow(variable: xr.Variable) -> xr.Variable:
        if variable.ndim < 2 or variable.dtype.kind not in "biufM":
            return variable
        return variable.copy(data=da.zeros(variable.shape, chunks=-1, dtype=variable.dtype))

    empty = cube.assign({name: hollow(v) for name, v in cube.variables.items() if name not in cube.xindexes})
    options: dict[str, Any] = {"zarr_format": zarr_format, "encoding": dict(encoding), "safe_chunks": False}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            empty.to_zarr(MemoryStore(), compute=False, consolidated=False, **options)
    except (ValueError, TypeError, KeyError, NotImplementedError) as error:
        raise ValueError(f"the cube cannot be stored in Zarr {zarr_format}: {error}") from error


def _zstandard(layout: Layout) -> Any:
    from numcodecs import Zstd
    from zarr.codecs import ZstdCodec

    return Zstd(layout.compression_level) if layout.zarr_format == 2 else ZstdCodec(level=layout.compression_level)


def _sharded(shards: tuple[int, ...], dims: Sequence[Any], inner_chunks: int) -> dict[str, Any]:
    """Return the encoding of shards of smaller chunks, in y and x."""
    chunks = tuple(min(n, inner_chunks) if dim in FINE_DIMS else n for n, dim in zip(shards, dims, strict=True))
    if any(shard % chunk for shard, chunk in zip(shards, chunks, strict=True)):
        raise ValueError(
            f"inner_chunks={inner_chunks} does not divide the cube's chunks {shards}, each of which is to be one "
            f"shard. Type ds.chunk(y={max(1, max(shards) // inner_chunks) * inner_chunks}, …), or another inner_chunks="
        )
    return {"shards": shards, "chunks": chunks}
