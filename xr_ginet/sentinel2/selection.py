"""Parts of a cube, cut from all of its grids together, so that they still nest.

xarray and rioxarray select along one pair of dimensions and leave the other grids as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from .areas import check_bbox
from .bands import SCL
from .grids import DIMS, FINE_DIMS, Grid, check_nesting, read_crs, transform_bounds
from .layouts import place


def isel(
    ds: xr.Dataset, *, x: slice | None = None, y: slice | None = None, time: Any = None, **others: Any
) -> xr.Dataset:
    """Return a part of a cube by the positions of its 10 m pixels, on all of its grids.

    Parameters
    ----------
    ds : Dataset
        Cube with dims ``[time,] y, x``, ``[time,] y_20m, x_20m`` and ``[time,] y_60m, x_60m`` or some of them; lazy or
        not.
    x, y : slice, optional
        Columns and rows at 10 m, without a step. Snapped outwards to whole pixels of the coarsest grid.
    time, **others : optional
        As `xarray.Dataset.isel` takes them; others are dimensions that are not of a grid.

    Returns
    -------
    Dataset
        As lazy as ``ds``, with coordinates, transforms and CRS of what is left.

    Raises
    ------
    ValueError
        If a slice has a step or holds no pixel, less than two pixels of a grid are left, a dimension of a coarser grid
        is named, or the grids do not nest.
    """
    grids = _grids(ds)
    fine = grids[FINE_DIMS]
    factor = max(round(grid.dx / fine.dx) for grid in grids.values())
    windows = [_snap(name, part, size, factor) for name, part, size in zip(FINE_DIMS, (y, x), fine.shape, strict=True)]
    cut: dict[Any, Any] = {}
    for dims, grid in grids.items():
        f = round(grid.dx / fine.dx)
        cut |= {dim: slice(w.start // f, w.stop // f) for dim, w in zip(dims, windows, strict=True)}
        if min((w.stop - w.start) // f for w in windows) < 2:
            raise ValueError(
                f"less than two pixels each way would be left at {10 * f} m, and a grid needs two. Type a larger part, "
                "or ds.ginet.point(x, y) for the values at a place"
            )
    if strange := [name for name in others if any(name in dims for dims in DIMS.values())]:
        raise ValueError(f"{', '.join(strange)}: name x and y, in 10 m pixels; the other grids follow")
    if time is not None:
        others["time"] = time
    return place(ds.isel(cut | others), crs=read_crs(ds))


def sel(
    ds: xr.Dataset, *, x: slice | None = None, y: slice | None = None, time: Any = None, **others: Any
) -> xr.Dataset:
    """Return a part of a cube by coordinates, on all of its grids.

    Parameters
    ----------
    ds : Dataset
        As in `isel`.
    x, y : slice, optional
        From and to, in the units of the CRS, in either order: 10 m pixels whose centres lie between are kept, and those
        that share a pixel of the coarsest grid with them.
    time, **others : optional
        As `xarray.Dataset.sel` takes them.

    Returns
    -------
    Dataset
        As in `isel`.

    Raises
    ------
    ValueError
        As in `isel`.
    KeyError
        If a label is not there.
    """
    windows = {name: _positions(ds, name, part) for name, part in (("y", y), ("x", x)) if part is not None}
    if strange := [name for name in others if any(name in dims for dims in DIMS.values())]:
        raise ValueError(f"{', '.join(strange)}: name x and y; the other grids follow")
    labels = others if time is None else {**others, "time": time}
    return isel(ds.sel(labels) if labels else ds, **windows)


def clip(ds: xr.Dataset, area: Any, *, crs: Any = None) -> xr.Dataset:
    """Return the part of a cube in an area, on all of its grids.

    Parameters
    ----------
    ds : Dataset
        As in `isel`, with a CRS.
    area : (west, south, east, north), GeoJSON geometry, or an object with ``__geo_interface__``
        A box, or a geometry such as one of shapely or geopandas. The cube is cut to its bounds, snapped outwards to
        whole pixels of the coarsest grid. Pixels of that grid that a geometry does not touch are made missing, and
        what lies within them on the others: NaN, in ``SCL`` 0.
    crs : optional
        CRS of the area, as pyproj takes it; by default that of a geopandas object, else degrees (EPSG:4326).

    Returns
    -------
    Dataset
        As in `isel`.

    Raises
    ------
    ValueError
        If the cube has no CRS, or the area does not touch it, as in `isel`.
    TypeError
        If ``area`` is none of these.
    """
    from pyproj import CRS

    own = read_crs(ds)
    if own is None:
        raise ValueError("the cube has no CRS, by which to place the area. Type ds.rio.write_crs('EPSG:…')")
    crs = CRS.from_user_input(crs if crs is not None else getattr(area, "crs", None) or 4326)
    shape = getattr(area, "__geo_interface__", area)
    if isinstance(shape, Mapping):
        return _within(ds, _in_crs(shape, crs, own))
    if not isinstance(shape, Sequence | np.ndarray) or isinstance(shape, str) or len(shape) != 4:
        raise TypeError(
            f"area is {area!r}; a box (west, south, east, north), a GeoJSON geometry or an object with "
            "__geo_interface__ is needed"
        )
    box = tuple(float(edge) for edge in shape)
    if crs.is_geographic:
        check_bbox(box)
    west, south, east, north = box
    return _cut(ds, transform_bounds((west, south, east, north), crs, own))


def point(
    ds: xr.Dataset,
    x: float | None = None,
    y: float | None = None,
    *,
    lon: float | None = None,
    lat: float | None = None,
) -> xr.Dataset:
    """Return the values of all bands at a place, each of the pixel of its own grid that holds it.

    Parameters
    ----------
    ds : Dataset
        As in `isel`.
    x, y : float, optional
        In the units of the cube's CRS.
    lon, lat : float, optional
        In degrees, in place of them.

    Returns
    -------
    Dataset
        Dims ``[time]``; the centres of the pixels are scalar coordinates; as lazy as ``ds``.

    Raises
    ------
    ValueError
        If not exactly one pair is given, or the place lies outside the cube.
    """
    from pyproj import Transformer

    if (x is None) != (y is None) or (lon is None) != (lat is None) or (x is None) == (lon is None):
        raise ValueError(f"x={x}, y={y}, lon={lon}, lat={lat}: type both x and y, or both lon and lat")
    if lon is not None:
        own = read_crs(ds)
        if own is None:
            raise ValueError("the cube has no CRS, by which to place lon and lat. Type ds.rio.write_crs('EPSG:…')")
        x, y = Transformer.from_crs(4326, own, always_xy=True).transform(lon, lat)
    assert x is not None
    assert y is not None
    where: dict[Any, int] = {}
    for dims, grid in _grids(ds).items():
        position = (y - grid.y0) / grid.dy, (x - grid.x0) / grid.dx
        if not all(0 <= p < n for p, n in zip(position, grid.shape, strict=True)):
            raise ValueError(f"x={x:.10g}, y={y:.10g} lies outside the cube, whose bounds are {grid.bounds}")
        where |= {dim: int(p) for dim, p in zip(dims, position, strict=True)}
    return ds.isel(where)


def _grids(ds: xr.Dataset) -> dict[tuple[str, str], Grid]:
    """Return the grids of a cube by their dims, the finest first; raise unless they nest."""
    grids = {dims: Grid.from_coords(ds, dims) for dims in DIMS.values() if set(dims) <= set(ds.dims)}
    if FINE_DIMS not in grids:
        raise ValueError(f"the cube has the dims {tuple(ds.dims)}; the 10 m grid, {FINE_DIMS}, is needed")
    for grid in list(grids.values())[1:]:
        check_nesting(grids[FINE_DIMS], grid, round(grid.dx / grids[FINE_DIMS].dx))
    return grids


def _snap(name: str, part: Any, size: int, factor: int) -> slice:
    """Return a slice of 10 m pixels snapped outwards to multiples of a factor."""
    if part is None:
        return slice(0, size)
    if not isinstance(part, slice) or part.step not in (None, 1):
        raise ValueError(
            f"{name}={part!r}: a slice without a step is needed, for the grids to nest. For one pixel type "
            "ds.ginet.point(x, y)"
        )
    start, stop, _ = part.indices(size)
    if stop <= start:
        raise ValueError(f"{name}={part!r} holds none of the {size} pixels of 10 m")
    return slice(start // factor * factor, min(-(-stop // factor) * factor, size))


def _positions(ds: xr.Dataset, name: str, part: Any) -> slice:
    """Return the positions of the 10 m pixels whose centres lie between two coordinates, in either order."""
    if not isinstance(part, slice) or part.step is not None:
        raise ValueError(
            f"{name}={part!r}: slice(from, to) is needed, for the grids to nest. For one pixel type "
            "ds.ginet.point(x, y)"
        )
    centres = ds[name].values
    ends = [end for end in (part.start, part.stop) if end is not None]
    if len(ends) == 2:
        low, high = sorted(ends)
    else:  # open at one side: which, xarray's order tells
        descending = centres[0] > centres[-1]
        low, high = centres.min(), centres.max()
        if ends and (part.start is not None) != descending:
            low = ends[0]
        elif ends:
            high = ends[0]
    inside = np.flatnonzero((centres >= low) & (centres <= high))
    if not inside.size:
        raise ValueError(f"{name}={part!r} holds no centre of a pixel; they lie from {centres[0]} to {centres[-1]}")
    return slice(int(inside[0]), int(inside[-1]) + 1)


def _cut(ds: xr.Dataset, bounds: tuple[float, float, float, float]) -> xr.Dataset:
    """Return the pixels that a box in the cube's CRS touches."""
    grid = _grids(ds)[FINE_DIMS]
    west, south, east, north = bounds
    slack = 1e-6  # of a pixel: what transforming bounds to their own CRS may add
    columns = (west - grid.x0) / grid.dx + slack, (east - grid.x0) / grid.dx - slack
    rows = (north - grid.y0) / grid.dy + slack, (south - grid.y0) / grid.dy - slack
    windows = {}
    for name, (first, last), size in (("y", rows, grid.shape[0]), ("x", columns, grid.shape[1])):
        if not (np.isfinite([first, last]).all() and first < size and last > 0):
            raise ValueError(
                f"the area, {tuple(round(edge, 3) for edge in bounds)} in the cube's CRS, does not touch the cube, "
                f"whose bounds are {grid.bounds}. Boxes and geometries are in degrees where no crs= is given"
            )
        windows[name] = slice(max(0, int(np.floor(first))), max(int(np.ceil(last)), int(np.floor(first)) + 1, 1))
    return isel(ds, **windows)


def _in_crs(shape: Mapping[str, Any], source: Any, target: Any) -> list[dict[str, Any]]:
    """Return the geometries of a GeoJSON object in another CRS."""
    from rasterio.warp import transform_geom

    members = shape.get("features") or [shape]
    geometries = [member.get("geometry", member) for member in members]
    if source == target:
        return [dict(geometry) for geometry in geometries]
    return [transform_geom(source.to_wkt(), target.to_wkt(), geometry) for geometry in geometries]


def _within(ds: xr.Dataset, geometries: Sequence[Mapping[str, Any]]) -> xr.Dataset:
    """Return the part of a cube around geometries, missing where no pixel of its coarsest grid touches one."""
    from affine import Affine
    from rasterio.features import bounds, geometry_mask

    boxes = np.array([bounds(geometry) for geometry in geometries])
    cut = _cut(ds, (*boxes[:, :2].min(axis=0).tolist(), *boxes[:, 2:].max(axis=0).tolist()))
    grids = _grids(cut)
    coarsest = list(grids.values())[-1]
    kept = geometry_mask(geometries, coarsest.shape, Affine(*coarsest.transform), all_touched=True, invert=True)
    for dims, grid in grids.items():
        f = round(coarsest.dx / grid.dx)
        on_grid = xr.DataArray(kept.repeat(f, 0).repeat(f, 1), dims=dims)
        for name in [name for name in cut.data_vars if set(dims) <= set(cut[name].dims)]:
            masked = cut[name].where(on_grid, 0) if name == SCL else cut[name].where(on_grid)
            masked.encoding = cut[name].encoding
            cut[name] = masked
    return cut
