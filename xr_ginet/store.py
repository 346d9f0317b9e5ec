"""Cubes in Zarr: one chunk of the store per Dask chunk, encodings that survive the round trip."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import dask
import numpy as np
import xarray as xr

from .sentinel2.grids import read_crs
from .sentinel2.layouts import place

Mode = Literal["w", "w-"]
StoredDtype = Literal["float32", "uint16"]

DIGITAL_NUMBER: dict[str, Any] = {"dtype": "uint16", "scale_factor": 1e-4, "add_offset": -0.1, "_FillValue": 0}
"""Encoding of reflectance as Sentinel-2's own products have it: -0.0999 to 6.4535 in steps of 0.0001, 0 for missing."""


def to_zarr(
    ds: xr.Dataset,
    target: Any,
    *,
    mode: Mode | None = None,
    dtype: StoredDtype = "float32",
    zarr_format: int = 3,
    compression_level: int = 5,
    progress: bool = False,
    compute: bool = True,
) -> Any:
    """Write a cube to a Zarr store, chunk by chunk.

    Parameters
    ----------
    ds : Dataset
        Float reflectance, lazy or not. Each Dask chunk becomes one chunk of the store; where chunks are ragged, the
        cube is first rechunked to its largest chunk on each axis.
    target : str, Path or zarr store
        Where to. A store that exists already is left alone unless ``mode="w"``.
    mode : {"w", "w-"}, optional
        ``"w"`` replaces an existing store; ``"w-"`` and None refuse.
    dtype : {"float32", "uint16"}
        ``"uint16"`` stores digital numbers with CF ``scale_factor`` 0.0001 and ``add_offset`` -0.1; reflectance beyond
        -0.0999 and 6.4535 is clipped, missing is 0.
    zarr_format : {3, 2}
    compression_level : int
        Of Zstandard, 0 to 22.
    progress : bool
        Show a progress bar while computing.
    compute : bool
        Otherwise write metadata only and return a `dask.delayed.Delayed` that writes the pixels.

    Returns
    -------
    Delayed or None
        With ``compute=False``, what writes the pixels when computed.

    Raises
    ------
    FileExistsError
        If the store exists and ``mode`` is not ``"w"``; if the target is a folder with other files, whatever the
        mode; or if the cube is read from the very store.
    ValueError
        If an argument has an unknown value, an attribute cannot be stored, or the target lies in this process's memory
        while a cluster computes in others.
    """
    if mode not in (None, "w", "w-"):
        raise ValueError(f"mode={mode!r}: must be 'w' to replace a store, or 'w-' to refuse where there is one")
    if dtype not in ("float32", "uint16"):
        raise ValueError(f"dtype={dtype!r}: must be 'float32' or 'uint16'")
    if zarr_format not in (2, 3):
        raise ValueError(f"zarr_format={zarr_format!r}: must be 2 or 3")
    target = str(target) if isinstance(target, Path) else target
    _check_target(ds, target, mode)
    if progress and not compute:
        raise ValueError("progress=True shows the computation, but compute=False puts it off")
    cube, encoding = _encode(ds, dtype, zarr_format, compression_level)
    with warnings.catch_warnings():
        # Version 3 does not standardise consolidated metadata yet; readers that do not know it lose nothing by it, and
        # the others open a cube in one request.
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        write = cube.to_zarr(
            target,
            mode=mode or "w-",
            encoding=encoding,
            zarr_format=zarr_format,
            consolidated=True,
            compute=False,
        )
    if not compute:
        return write
    if progress:
        _with_progress(write)
    else:
        dask.compute(write)
    return None


def _check_target(ds: xr.Dataset, target: Any, mode: Mode | None) -> None:
    """Raise where writing would destroy something, or lose what is written."""
    if mode != "w" and _exists(target):
        raise FileExistsError(f"{target} holds a Zarr store already. Type mode='w' to replace it, or name another")
    if isinstance(target, str) and "://" not in target and Path(target).exists() and not _exists(target):
        if not Path(target).is_dir() or any(Path(target).iterdir()):
            raise FileExistsError(f"{target} exists and is no Zarr store: it is never replaced. Name another")
    encodings = (ds.encoding, *(variable.encoding for variable in ds.variables.values()))
    sources = {str(encoding["source"]) for encoding in encodings if encoding.get("source")}
    if isinstance(target, str) and any(_same_place(target, source) for source in sources):
        raise FileExistsError(f"the cube is read from {target}: writing there would destroy it first. Name another")
    if _in_memory(target) and _workers_elsewhere():
        raise ValueError(f"{target} lies in this process's memory, where a cluster's workers cannot write. Name a path")


def _exists(target: Any) -> bool:
    import zarr

    try:
        zarr.open(target, mode="r")
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: version 2 without its metadata
        return False
    return True


def _same_place(one: str, other: str) -> bool:
    if "://" in one or "://" in other:
        return one.rstrip("/") == other.rstrip("/")
    return Path(one).resolve() == Path(other).resolve()


def _in_memory(target: Any) -> bool:
    from zarr.storage import MemoryStore

    return isinstance(target, MemoryStore | dict) or str(target).startswith("memory://")


def _workers_elsewhere() -> bool:
    """Return whether a distributed client computes in other processes than this one."""
    try:
        from distributed import get_client

        scheduler = get_client().scheduler
        return not (scheduler and str(scheduler.address).startswith("inproc"))
    except (ImportError, ValueError):  # ValueError: no client
        return False


def _encode(
    ds: xr.Dataset, dtype: StoredDtype, zarr_format: int, compression_level: int
) -> tuple[xr.Dataset, dict[str, dict[str, Any]]]:
    """Return the cube as it is to be written, and the encoding of its variables."""
    ds = ds.unify_chunks()
    chunks = {str(dim): max(sizes) for dim, sizes in ds.chunksizes.items()}
    ragged = any(set(sizes[:-1]) - {chunks[str(dim)]} for dim, sizes in ds.chunksizes.items())
    cube = place(ds.chunk(chunks) if ragged else ds, crs=read_crs(ds)).copy()
    encoding: dict[str, dict[str, Any]] = {}
    for name, variable in cube.variables.items():
        new: dict[str, Any] = {}
        if name in cube.data_vars and np.issubdtype(variable.dtype, np.floating):
            bounds = (DIGITAL_NUMBER["add_offset"] + 1e-4, DIGITAL_NUMBER["add_offset"] + 6.5535)
            if dtype == "uint16":
                cube[name] = cube[name].clip(*bounds, keep_attrs=True)
            if "spatial_ref" in cube.coords:
                cube[name].attrs["grid_mapping"] = "spatial_ref"
            new |= DIGITAL_NUMBER if dtype == "uint16" else {"dtype": "float32", "_FillValue": np.float32(np.nan)}
            new["compressors"] = [_zstandard(zarr_format, compression_level)]
            if variable.chunks is not None:
                new["chunks"] = tuple(chunks[str(dim)] for dim in variable.dims)
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


def _zstandard(zarr_format: int, level: int) -> Any:
    from numcodecs import Zstd
    from zarr.codecs import ZstdCodec

    return Zstd(level) if zarr_format == 2 else ZstdCodec(level=level)


def _with_progress(write: Any) -> None:
    """Compute a delayed write under a progress bar, of the distributed client's where there is one."""
    try:
        from distributed import get_client, progress

        client = get_client()
    except (ImportError, ValueError):  # ValueError: no client
        from dask.diagnostics import ProgressBar

        with ProgressBar():
            dask.compute(write)
        return
    future = client.compute(write)
    progress(future)
    future.result()
