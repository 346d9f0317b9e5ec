"""Scenes to lazy reflectance on one grid, through stackstac.

stackstac is handed plain items of our own making and told the exact grid; it reads raw digital numbers, which are
scaled here, item by item, before any mosaic. Nothing is read until Dask asks for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import xarray as xr

from .grids import COARSE_DIMS, FINE_DIMS, Grid
from .items import Scene

GroupBy = Literal["solar_day"] | None


def read_scenes(
    scenes: Sequence[Scene],
    names: Sequence[str],
    grid: Grid,
    epsg: int,
    chunk: int,
    groupby: GroupBy,
) -> xr.Dataset:
    """Return bands of one resolution as lazy reflectance on one grid, with the dims of that resolution."""
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
    if groupby == "solar_day":
        reflectance = _mosaic_days(reflectance, scenes)
    elif groupby is not None:
        raise ValueError(f"groupby={groupby!r}: must be 'solar_day' or None")
    rename = dict(zip(FINE_DIMS, COARSE_DIMS, strict=True)) if resolution == 20 else {}
    return reflectance.assign_coords(band=list(names)).to_dataset("band").rename(rename)


def _mosaic_days(reflectance: xr.DataArray, scenes: Sequence[Scene]) -> xr.DataArray:
    """Return one time step per solar day, the first valid pixel on top; its time is the first item's."""
    import stackstac

    days: dict[str, list[int]] = {}
    for index, scene in enumerate(scenes):
        days.setdefault(scene.solar_day, []).append(index)
    if len(days) == len(scenes):
        return reflectance
    steps = [
        reflectance.isel(time=members[0])
        if len(members) == 1
        else stackstac.mosaic(reflectance.isel(time=members), dim="time", reverse=True).assign_coords(
            time=reflectance["time"][members[0]]
        )
        for members in days.values()
    ]
    return xr.concat(steps, "time")


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
