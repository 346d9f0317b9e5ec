"""A labelled cube as arrays: its bands checked, and stacked."""

from __future__ import annotations

import dask.array as da
import numpy as np
import xarray as xr

from ..sentinel2.grids import COARSE_DIMS, FINE_DIMS, Bands, Grid, check_nesting
from ..sentinel2.radiometry import check_bands_of_block


def check_cube(ds: xr.Dataset, bands: Bands) -> None:
    """Raise unless ``ds`` holds these bands on two grids that nest."""
    check_bands(ds, bands.fine, FINE_DIMS)
    check_bands(ds, bands.coarse, bands.coarse_dims)
    if len({"time" in ds[name].dims for name in (*bands.fine, *bands.coarse)}) > 1:
        raise ValueError(
            f"some of the 10 m and {10 * bands.factor} m bands have a time dimension and some have not: "
            "select one time of all, or type ds.expand_dims(time=[…]) for those without"
        )
    check_nesting(Grid.from_coords(ds), Grid.from_coords(ds, bands.coarse_dims), bands.factor)


def check_bands(ds: xr.Dataset, names: tuple[str, ...], dims: tuple[str, str]) -> None:
    """Raise unless ``ds`` holds these bands as reflectance with these dims."""
    missing = [name for name in names if name not in ds]
    if missing:
        raise ValueError(
            f"no {', '.join(missing)} in the cube, which holds {', '.join(map(str, ds.data_vars)) or 'no variable'}; "
            f"needed are {', '.join(names)} with the dims {dims}. Build the cube with xr_ginet.open_stac or "
            "xr_ginet.pair, or let superresolve(catalog=…) load missing 20 m bands"
        )
    for name in names:
        band = ds[name]
        if dims == COARSE_DIMS and set(FINE_DIMS) <= set(band.dims):
            raise ValueError(
                f"{name} lies on the 10 m grid (dims {band.dims}): the network needs its native 20 m pixels, with dims "
                f"{dims}. Load the 20 m bands at 20 m and join them with xr_ginet.pair(ds_10m, ds_20m), or "
                "take repeated ones back with xr_ginet.to_native(ds)"
            )
        strange = [str(d) for d in band.dims if d not in ("time", *dims)]
        if strange or not set(dims) <= set(band.dims):
            raise ValueError(f"{name} has the dims {band.dims}; {dims} are needed, with or without 'time'")
        if not np.issubdtype(band.dtype, np.floating):
            raise ValueError(
                f"{name} is {band.dtype}: digital numbers; the network needs reflectance. Type "
                "superresolve(scale=1e-4) or xr_ginet.pair(ds_10m, ds_20m, scale=1e-4), with offset=-0.1 where the "
                "product kept its offset"
            )


def stack_bands(ds: xr.Dataset, names: tuple[str, ...], dims: tuple[str, str]) -> da.Array:
    """Return the bands as one lazy array ``([time,] band, y, x)``, chunked as the first, one task per chunk.

    A block that is no reflectance is refused when it is computed, see `check_bands_of_block`.
    """
    first, *others = (ds[name].transpose(..., *dims).chunk().data for name in names)
    others = [band.rechunk(first.chunks) for band in others]
    axis = first.ndim - 2
    return da.map_blocks(
        _stack,
        first,
        *others,
        axis=axis,
        names=names,
        dtype=first.dtype,
        new_axis=axis,
        chunks=(*first.chunks[:-2], (len(names),), *first.chunks[-2:]),
        meta=np.empty((0,) * (first.ndim + 1), first.dtype),
    )


def _stack(*blocks: np.ndarray, axis: int, names: tuple[str, ...]) -> np.ndarray:
    check_bands_of_block(blocks, names)
    return np.stack(blocks, axis=axis)
