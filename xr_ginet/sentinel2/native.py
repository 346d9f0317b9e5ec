"""Native 20 m pixels, taken back from cubes that repeat them at 10 m.

Where Sentinel-2's own pixels begin is read from coordinates; that they were repeated, and not interpolated, is proved
by the pixels themselves, block by block.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import xarray as xr

from .bands import BANDS_20M, SCL, band_name, layer_name
from .grids import FINE_DIMS, TOLERANCE, Grid, read_crs, stated_anchor
from .layouts import bands_on, classes_of, pair, scaled, shift, unstack, warn_of_offset


def to_native(
    cube: xr.Dataset | xr.DataArray,
    *,
    scale: float | None = None,
    offset: float = 0.0,
    nodata: float | None = 0,
) -> xr.Dataset:
    """Return the two-grid Dataset of one 10 m cube whose 20 m bands were repeated by nearest neighbour.

    Such cubes come from ``stackstac.stack(resolution=10)`` and ``odc.stac.load(resolution=10)``. Which 10 m pixels
    belong to one 20 m pixel follows from the coordinates, since Sentinel-2's 20 m pixels start at multiples of 20 m in
    UTM. That they are equal (NaN to NaN) is proved block by block when the pixels are computed, so that building the
    graph reads nothing; arrays in memory are checked at once.

    Parameters
    ----------
    cube : Dataset or DataArray
        10 m and 20 m bands on one 10 m grid, named as in `pair`; dims ``[time,] y, x``, or stacked along ``band``.
        Coordinates are centres. Multiples of 10 m are upper left corners, as stackstac has them unless told otherwise,
        but where a ``GeoTransform`` or a ``transform`` in the attributes tells that they are centres: then the pixels
        were resampled.
    scale, offset, nodata
        As in `pair`.

    Returns
    -------
    Dataset
        Dims ``[time,] y, x`` and ``[time,] y_20m, x_20m``; the 20 m bands hold the native pixels, bit for bit, in
        chunks of half the size; as lazy as the input. Variables that are no bands are kept at 10 m.

    Warns
    -----
    UserWarning
        If the cube starts or ends within a 20 m pixel; that row or column of 10 m pixels is left out. If an offset may
        have been applied twice, as in `pair`.

    Raises
    ------
    ValueError
        If bands of one resolution are absent, the grid is not Sentinel-2's own, the cube was super-resolved already
        or integer bands have no scale. When computed: if a 20 m band was interpolated.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> native = np.arange(4, dtype="float32").reshape(2, 2)
    >>> coords = {"y": [35.0, 25, 15, 5], "x": [5.0, 15, 25, 35]}
    >>> bands = {"B02": np.zeros((4, 4), "float32"), "B05": native.repeat(2, 0).repeat(2, 1)}
    >>> to_native(xr.Dataset({name: (("y", "x"), v) for name, v in bands.items()}, coords))["B05"].values
    array([[0., 1.],
           [2., 3.]], dtype=float32)
    """
    if "ginet_weights" in cube.attrs:
        raise ValueError("the cube's 20 m bands were super-resolved to 10 m already: there are no native pixels in it")
    if scale is None:
        warn_of_offset(cube)
    anchor = stated_anchor(cube)
    ds = unstack(cube, "cube")
    fine, repeated = (bands_on(ds, resolution, "cube") for resolution in (10, 20))
    if (classes := classes_of(ds)) is not None:
        repeated[SCL] = classes.transpose(..., *FINE_DIMS)
    row, column, corners = _lattice_phase(Grid.from_coords(ds), read_crs(ds), anchor)
    whole = _whole_pixels(ds.sizes["y"], ds.sizes["x"], row, column)
    fine, repeated = (part.isel(whole) for part in (fine, repeated))
    if corners:
        fine, repeated = (shift(part, 0.5) for part in (fine, repeated))
    centres = {dim: repeated[dim].values.astype("float64").reshape(-1, 2).mean(1) for dim in FINE_DIMS}
    native = repeated.isel(y=slice(None, None, 2), x=slice(None, None, 2)).assign_coords(centres)
    for name in native.data_vars:
        native[name] = native[name].copy(data=_native_pixels(repeated[name].data, str(name)))
    two = pair(fine, native, scale=scale, offset=offset, nodata=nodata)
    others = [
        name for name in ds.data_vars if not layer_name(str(name)) and name not in (*two.variables, "spatial_ref")
    ]
    return two.assign({name: ds[name].isel(whole, missing_dims="ignore").variable for name in others})


def two_grids(
    cube: xr.Dataset | xr.DataArray, *, scale: float | None = None, offset: float = 0.0, nodata: float | None = 0
) -> xr.Dataset:
    """Return a cube with its 20 m bands on their own grid, by `to_native` where all of them lie on the 10 m grid.

    Digital numbers are scaled as by `pair`.
    """
    ds = unstack(cube, "cube")
    on_fine_grid = [set(FINE_DIMS) <= set(ds[v].dims) for v in ds.data_vars if band_name(str(v)) in BANDS_20M]
    if on_fine_grid and all(on_fine_grid):
        return to_native(cube, scale=scale, offset=offset, nodata=nodata)
    return scaled(ds, scale=scale, offset=offset, nodata=nodata)


def _lattice_phase(grid: Grid, crs: Any, anchor: str | None) -> tuple[int, int, bool]:
    """Return the first row and column that begin a 20 m pixel, and whether coordinates are corners.

    Raises
    ------
    ValueError
        If the grid is not Sentinel-2's own 10 m grid: resampled pixels are no native ones.
    """
    from pyproj import CRS

    how = "Load the cube in the CRS of the items, at resolution=10 and with bounds that are multiples of 20 m"
    if crs is not None and (known := CRS.from_user_input(crs)).utm_zone is None:
        raise ValueError(f"the cube is in {known.name}, not in UTM: its 20 m pixels were resampled. {how}")
    if np.abs(np.array([grid.dx - 10, grid.dy + 10])).max() > 10 * TOLERANCE / max(grid.shape):
        raise ValueError(
            f"the cube's pixels are {grid.dx:.10g} by {grid.dy:.10g}; 10 by -10, north-up, are needed. {how}; where "
            "rows run northwards, type ds.sortby('y', ascending=False)"
        )
    place = np.array([-grid.y0 / 10, grid.x0 / 10]) % 2
    corners = anchor == "corner" or (anchor is None and bool(np.allclose(place % 1, 0.5, atol=TOLERANCE)))
    place += 0.5 * corners
    phase = np.round(place)
    if np.abs(place - phase).max() > TOLERANCE:
        raise ValueError(
            f"the cube starts at x={grid.x0:.10g}, y={grid.y0:.10g}"
            + (f", since its transform tells that coordinates are {anchor}s" if anchor else "")
            + f"; Sentinel-2's pixels start at multiples of 10 m: these were resampled. {how}, and with "
            "odc.stac.load without anchor='center'"
        )
    row, column = (phase % 2).astype(int).tolist()
    return row, column, corners


def _whole_pixels(height: int, width: int, row: int, column: int) -> dict[str, slice]:
    """Return the window of whole 20 m pixels of a 10 m grid, the first of which begins at a row and a column."""
    rows, columns = (slice(start, start + (n - start) // 2 * 2) for n, start in ((height, row), (width, column)))
    if min(rows.stop - rows.start, columns.stop - columns.start) < 4:
        raise ValueError(f"the cube has {height} by {width} pixels; whole 20 m pixels, two each way, are needed")
    left_out = height - (rows.stop - rows.start), width - (columns.stop - columns.start)
    if any(left_out):
        warnings.warn(
            f"the cube cuts 20 m pixels in half at its edge: {left_out[0]} row(s) and {left_out[1]} column(s) of 10 m "
            f"pixels were left out; now rows {rows.start} to {rows.stop - 1} and columns {columns.start} to "
            f"{columns.stop - 1}",
            stacklevel=3,
        )
    return {"y": rows, "x": columns}


def _native_pixels(repeated: Any, band: str) -> Any:
    """Return the one value of each 2 × 2 block of an array ``([time,] y, x)`` of even size, checked when computed."""
    if not hasattr(repeated, "dask"):
        return _take_native(np.asarray(repeated), band=band)
    *lead, rows, columns = repeated.chunks
    chunks = (*lead, _even(rows), _even(columns))
    halves = (*lead, *(tuple(n // 2 for n in sizes) for sizes in chunks[-2:]))
    return repeated.rechunk(chunks).map_blocks(
        _take_native, band=band, chunks=halves, meta=np.empty((0,) * repeated.ndim, repeated.dtype)
    )


def _even(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Return chunks that end at even pixels: each end of those given, moved back by at most one."""
    ends = sorted({int(end) // 2 * 2 for end in np.cumsum(sizes)} - {0})
    return tuple(int(n) for n in np.diff([0, *ends]))


def _take_native(block: np.ndarray, band: str) -> np.ndarray:
    native = block[..., ::2, ::2]
    for row, column in ((0, 1), (1, 0), (1, 1)):
        other = block[..., row::2, column::2]
        same = (other == native) | ((other != other) & (native != native))  # NaN is NaN
        if not same.all():
            where = tuple(np.argwhere(~same)[0])
            raise ValueError(
                f"{band} holds {native[where]:.6g} and {other[where]:.6g} within one 20 m pixel: it was "
                "interpolated to 10 m, or masked there, and its native pixels cannot be had from it. Load the 20 m "
                "bands at 20 m and join them with xr_ginet.pair(ds_10m, ds_20m), or load all at 10 m with "
                "resampling='nearest', and mask after xr_ginet.to_native"
            )
    return native.copy()
