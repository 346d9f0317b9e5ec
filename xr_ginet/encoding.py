"""How a cube is stored: the numbers that stand for reflectance, chunks, shards and compression of its arrays."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import xarray as xr

from .sentinel2.bands import BANDS
from .sentinel2.grids import FINE_DIMS, read_crs
from .sentinel2.layouts import place
from .sentinel2.provenance import loaded, of_all

StoredDtype = Literal["float32", "uint16"]

DIGITAL_NUMBER: dict[str, Any] = {"dtype": "uint16", "scale_factor": 1e-4, "add_offset": -0.1, "_FillValue": 0}
"""Encoding of reflectance as Sentinel-2's own products have it: -0.0999 to 6.4534 in steps of 0.0001, 0 for missing."""


class Layout(NamedTuple):
    """How arrays lie in a store."""

    zarr_format: int
    inner_chunks: int | None
    compression_level: int


FLOAT: dict[str, Any] = {"dtype": "float32", "scale_factor": 1.0, "add_offset": 0.0, "_FillValue": np.float32(np.nan)}
"""Encoding of reflectance as it is."""


def encoding_of(ds: xr.Dataset, dtype: StoredDtype, like: Literal["input"] | None) -> dict[str, Any]:
    """Return the dtype, scale, offset and fill value, in the words of CF, in which a cube's reflectance is stored.

    Raises
    ------
    ValueError
        If an argument has an unknown value, or a cube does not tell the digital numbers that it was made from.
    """
    if dtype not in ("float32", "uint16"):
        raise ValueError(f"dtype={dtype!r}: must be 'float32' or 'uint16'")
    if like is None:
        return DIGITAL_NUMBER if dtype == "uint16" else FLOAT
    if like != "input":
        raise ValueError(f"like={like!r}: must be 'input', or left out")
    source = of_all(ds)
    if "source_dtype" not in source:
        raise ValueError(
            "like='input', but the cube (source_encoding, or source_dtype, …) does not tell of one kind "
            "of digital numbers that it was made from: it was reflectance already, or its items differ. Type "
            "dtype='uint16'"
        )
    if np.dtype(source["source_dtype"]).kind == "f":
        return FLOAT
    return {
        "dtype": source["source_dtype"],
        "scale_factor": float(source["source_scale_factor"]),
        "add_offset": float(source["source_add_offset"]),
        "_FillValue": source["source_nodata"],
    }


def limits(encoding: Mapping[str, Any]) -> tuple[float, float]:
    """Return the least and the greatest reflectance that an encoding holds beside its fill value."""
    info = np.iinfo(encoding["dtype"])
    first, last = max(info.min, int(encoding["_FillValue"]) + 1), info.max
    if encoding["dtype"] == "uint16" and encoding["_FillValue"] == 0:
        last -= 1  # ESA's for saturated
    return (
        first * encoding["scale_factor"] + encoding["add_offset"],
        last * encoding["scale_factor"] + encoding["add_offset"],
    )


def digital_numbers(image: xr.DataArray, encoding: Mapping[str, Any]) -> xr.DataArray:
    """Return reflectance in an encoding, lazily where it is lazy; what it cannot hold is clipped."""
    dtype = np.dtype(encoding["dtype"])
    if dtype.kind == "f":
        return image.astype(dtype)
    fill = dtype.type(encoding["_FillValue"])
    numbers = ((image.clip(*limits(encoding)) - encoding["add_offset"]) / encoding["scale_factor"]).round()
    return numbers.fillna(fill).astype(dtype)


def encoded(
    ds: xr.Dataset, reflectance: Mapping[str, Any], layout: Layout
) -> tuple[xr.Dataset, dict[str, dict[str, Any]]]:
    """Return the cube as it is to be written, and the encoding of its variables."""
    ds = ds.unify_chunks()
    chunks = {str(dim): max(sizes) for dim, sizes in ds.chunksizes.items()}
    ragged = any(set(sizes[:-1]) - {chunks[str(dim)]} for dim, sizes in ds.chunksizes.items())
    cube = loaded(place(ds.chunk(chunks) if ragged else ds, crs=read_crs(ds))).copy()
    encoding: dict[str, dict[str, Any]] = {}
    for name, variable in cube.variables.items():
        new: dict[str, Any] = {}
        if name in cube.data_vars and "spatial_ref" in cube.coords:
            cube[name].attrs["grid_mapping"] = "spatial_ref"
        if name in cube.data_vars and np.issubdtype(variable.dtype, np.floating):
            if np.dtype(reflectance["dtype"]).kind in "ui" and name in BANDS:
                cube[name] = cube[name].clip(*limits(reflectance), keep_attrs=True)
                new |= reflectance
            else:
                new |= {"dtype": "float32", "_FillValue": np.float32(np.nan)}
            new["compressors"] = [_zstandard(layout)]
            if variable.chunks is not None:
                new["chunks"] = tuple(chunks[str(dim)] for dim in variable.dims)
                if layout.inner_chunks is not None:
                    new |= _sharded(new["chunks"], variable.dims, layout.inner_chunks)
        elif np.issubdtype(variable.dtype, np.datetime64):
            # The default encoding counts from the first time: later times would not fit.
            new |= {"units": "microseconds since 1970-01-01", "dtype": "int64", "calendar": "proleptic_gregorian"}
        _check_attrs(str(name), cube[name].attrs)
        cube[name].encoding = {}
        encoding[str(name)] = new
    _check_attrs("the cube", cube.attrs)
    return cube, encoding


def _check_attrs(name: str, attrs: Mapping[Any, Any]) -> None:
    """Raise before anything is written where an attribute cannot be: later it would leave half a store."""
    for key, value in attrs.items():
        try:
            json.dumps(value.tolist() if isinstance(value, np.generic | np.ndarray) else value)
        except TypeError as error:
            raise ValueError(
                f"the attribute {key!r} of {name} is a {type(value).__name__}, which Zarr cannot store. Delete it from "
                "attrs, or make it a number, text or list"
            ) from error


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
