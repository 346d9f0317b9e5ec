"""Scenes to lazy reflectance on one grid, through stackstac.

stackstac is handed plain items of our own making and told the exact grid; it reads raw digital numbers, which are
scaled here, item by item, before any mosaic. Nothing is read until Dask asks for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from .grids import COARSE_DIMS, FINE_DIMS, Grid
from .items import Scene


def read_scenes(
    scenes: Sequence[Scene],
    names: Sequence[str],
    grid: Grid,
    epsg: int,
    chunk: int,
    steps: Sequence[Sequence[int]],
) -> xr.Dataset:
    """Return bands of one resolution as lazy reflectance on one grid, with the dims of that resolution.

    ``steps`` lists, for each time step, the scenes that make it up, by index; the first one's pixels are on top.
    """
    import stackstac

    resolution = abs(grid.dx)
    digital_number = stackstac.stack(
        # Plain items of our own making: stackstac 0.5.1 does not read what pystac 1.15 makes of proj:epsg.
        [_plain_item(scene, names) for scene in scenes],
        assets=list(names),
        epsg=epsg,
        resolution=resolution,
        bounds=grid.bounds,
        snap_bounds=False,
        dtype=np.dtype("uint16"),
        fill_value=np.uint16(0),
        rescale=False,  # it would apply offsets that the pixels no longer have
        xy_coords="center",
        chunksize=chunk,
        properties=False,
        band_coords=False,
        sortby_date=False,
    ).reset_coords(drop=True)
    y, x = grid.coords()
    digital_number = digital_number.assign_coords(y=y, x=x)
    per_band = [[scene.bands[name].radiometry for name in names] for scene in scenes]
    scale, offset = (
        xr.DataArray(np.array([[getattr(r, field) for r in row] for row in per_band], "float32"), dims=("time", "band"))
        for field in ("scale", "offset")
    )
    reflectance = ((digital_number.astype("float32") + offset) * scale).where(digital_number != 0)
    reflectance = reflectance.drop_attrs()
    reflectance = xr.concat([_mosaic(reflectance.isel(time=list(members))) for members in steps], "time")
    rename = dict(zip(FINE_DIMS, COARSE_DIMS, strict=True)) if resolution == 20 else {}
    return reflectance.assign_coords(band=list(names)).to_dataset("band").rename(rename)


def _mosaic(reflectance: xr.DataArray) -> xr.DataArray:
    """Return one time step of several, the first valid pixel on top; its time is the first one's."""
    import stackstac

    first = reflectance.isel(time=0)
    if reflectance.sizes["time"] == 1:
        return first
    return stackstac.mosaic(reflectance, dim="time", reverse=True).assign_coords(time=first["time"])


def _plain_item(scene: Scene, names: Sequence[str]) -> dict[str, Any]:
    assets = {
        name: {
            "href": asset.href,
            "type": "image/tiff",
            "proj:epsg": asset.epsg,
            "proj:transform": list(asset.grid.transform),
            "proj:shape": list(asset.grid.shape),
        }
        for name in names
        if (asset := scene.bands[name])
    }
    return {"id": scene.id, "properties": {"datetime": scene.datetime.isoformat()}, "assets": assets}
