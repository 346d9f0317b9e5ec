"""The paired 10 m and 20 m grids of a cube: read from coordinates, proved to nest.

A grid is a transform, a shape and a CRS. Coordinates are centres of pixels; where they may be corners, the transforms
that a cube carries beside them decide. Nothing here reads pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from .bands import BANDS_10M, BANDS_20M, BANDS_60M

if TYPE_CHECKING:
    from pyproj import CRS

TOLERANCE = 0.01
"""Of a fine pixel, by which coordinates may miss their place: what float rounding does, far below a shift that
matters."""

FINE_DIMS = ("y", "x")
COARSE_DIMS = ("y_20m", "x_20m")
DIMS = {10: FINE_DIMS, 20: COARSE_DIMS, 60: ("y_60m", "x_60m")}
"""Of the bands of each native resolution in metres."""


class Bands(NamedTuple):
    """Which bands a function takes, and how many times finer the first ones are."""

    fine: tuple[str, ...]
    coarse: tuple[str, ...]
    factor: int

    @property
    def coarse_dims(self) -> tuple[str, str]:
        """Return the dimensions of the coarse bands."""
        return DIMS[10 * self.factor]


TWENTY = Bands(BANDS_10M, BANDS_20M, 2)
SIXTY = Bands(BANDS_10M, BANDS_60M, 6)


@dataclass(frozen=True)
class Grid:
    """A north-up grid of square-angled pixels."""

    x0: float
    """West edge of the first column, in CRS units."""
    y0: float
    """North edge of the first row."""
    dx: float
    """Pixel width."""
    dy: float
    """Pixel height, negative where rows run southwards."""
    shape: tuple[int, int]
    """Rows and columns."""

    @classmethod
    def from_coords(cls, ds: xr.Dataset | xr.DataArray, dims: tuple[str, str] = FINE_DIMS) -> Grid:
        """Return the grid whose pixel centres are the coordinates of ``dims``, the y and the x dimension.

        Raises
        ------
        ValueError
            If a coordinate is missing, has fewer than two pixels or is not evenly spaced.
        """
        (y0, dy, height), (x0, dx, width) = (_axis(ds, dim) for dim in dims)
        return cls(x0, y0, dx, dy, (height, width))

    @property
    def transform(self) -> tuple[float, float, float, float, float, float]:
        """Return the affine transform from (column, row) to (x, y), in the order of rasterio and STAC."""
        return (self.dx, 0.0, self.x0, 0.0, self.dy, self.y0)

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """Return (west, south, east, north)."""
        ys = sorted((self.y0, self.y0 + self.shape[0] * self.dy))
        xs = sorted((self.x0, self.x0 + self.shape[1] * self.dx))
        return (xs[0], ys[0], xs[1], ys[1])

    def coords(self) -> tuple[NDArray, NDArray]:
        """Return the centres of rows and columns, float64."""
        y = self.y0 + (np.arange(self.shape[0]) + 0.5) * self.dy
        x = self.x0 + (np.arange(self.shape[1]) + 0.5) * self.dx
        return y, x

    def coarsen(self, factor: int) -> Grid:
        """Return the grid whose pixels cover ``factor × factor`` of this one's."""
        height, width = (n // factor for n in self.shape)
        return Grid(self.x0, self.y0, self.dx * factor, self.dy * factor, (height, width))


def _axis(ds: xr.Dataset | xr.DataArray, dim: str) -> tuple[float, float, int]:
    """Return the first edge, the step and the number of pixels of one axis."""
    if dim not in ds.coords:
        raise ValueError(
            f"no coordinate {dim!r}: the centres of the pixels are needed to place the grid; the coordinates are "
            f"{', '.join(map(str, ds.coords)) or 'none'}. Type ds.assign_coords({dim}=…)"
        )
    centres = ds[dim].values.astype("float64")
    if centres.size < 2:
        raise ValueError(f"{dim} has {centres.size} pixel; at least two are needed to know the pixels' size")
    step = (centres[-1] - centres[0]) / (centres.size - 1)
    even = centres[0] + step * np.arange(centres.size)
    if step == 0 or np.abs(centres - even).max() > TOLERANCE * abs(step):
        raise ValueError(
            f"{dim} is not evenly spaced: from {centres[0]} to {centres[-1]} a step of {step} is expected, and pixels "
            f"are up to {np.abs(centres - even).max()} off. Load the cube on one regular grid"
        )
    return float(centres[0] - step / 2), float(step), centres.size


def check_nesting(fine: Grid, coarse: Grid, factor: int = 2) -> None:
    """Prove that each coarse pixel covers exactly ``factor × factor`` fine pixels, and the two grids the same ground.

    Both must be north-up: rows from north to south, columns from west to east.

    Raises
    ------
    ValueError
        With what was found and what is needed.
    """
    for name, grid in (("fine", fine), ("coarse", coarse)):
        if grid.dy > 0 or grid.dx < 0:
            raise ValueError(
                f"the {name} grid's pixels are {grid.dx:.10g} by {grid.dy:.10g}: it is not north-up. Sort both grids: "
                "ds.sortby('y', ascending=False).sortby('x')"
            )
    expected = fine.coarsen(factor)
    slack_x, slack_y = TOLERANCE * abs(fine.dx), TOLERANCE * abs(fine.dy)
    for axis, found, needed, slack in (
        ("pixel width", coarse.dx, expected.dx, slack_x / fine.shape[1]),
        ("pixel height", coarse.dy, expected.dy, slack_y / fine.shape[0]),
    ):
        if abs(found - needed) > slack + 1e-12 * abs(needed):
            raise ValueError(
                f"the coarse grid's {axis} is {found:.10g}, expected {needed:.10g} ({factor} × the fine grid's). Load "
                "each band at its native resolution: 20 m bands resampled to 10 m do not hold what the network needs"
            )
    for axis, found, needed, slack in (
        ("x", coarse.x0, expected.x0, slack_x),
        ("y", coarse.y0, expected.y0, slack_y),
    ):
        if abs(found - needed) > slack:
            raise ValueError(
                f"the coarse grid starts at {axis}={found:.10g}, expected {needed:.10g} (the fine grid's origin): the "
                "grids do not nest. Load both with the same bounds, snapped to the coarse pixels"
            )
    if coarse.shape != expected.shape or any(n % factor for n in fine.shape):
        raise ValueError(
            f"the fine grid has {fine.shape[0]} by {fine.shape[1]} pixels and the coarse one {coarse.shape[0]} by "
            f"{coarse.shape[1]}; {factor} by {factor} fine pixels per coarse one are needed. Cut both to the same area"
        )


def stated_anchor(cube: xr.Dataset | xr.DataArray) -> Literal["centre", "corner"] | None:
    """Return what of a pixel the coordinates ``y`` and ``x`` name, as the transforms that the cube carries tell it.

    Those are GDAL's ``GeoTransform`` in ``spatial_ref`` or another grid mapping, and the attribute ``transform`` of
    stackstac and rasterio. A transform of before a selection serves: only where its lattice lies matters. One of
    pixels of another size, and transforms that disagree, tell nothing.
    """
    if any(dim not in cube.coords or cube[dim].size < 2 for dim in FINE_DIMS):
        return None
    grid = Grid.from_coords(cube)
    first = np.array([grid.x0 + grid.dx / 2, grid.y0 + grid.dy / 2])
    size = np.array([grid.dx, grid.dy])
    told: set[Literal["centre", "corner"] | None] = set()
    for dx, skew_x, x0, skew_y, dy, y0 in _transforms(cube):
        if skew_x or skew_y or np.abs(np.array([dx, dy]) / size - 1).max() > TOLERANCE / max(grid.shape):
            continue
        phase = (first - (x0, y0)) / size % 1
        by_centre = np.abs(phase - 0.5).max() <= TOLERANCE
        by_corner = np.minimum(phase, 1 - phase).max() <= TOLERANCE
        told.add("centre" if by_centre else "corner" if by_corner else None)
    return told.pop() if len(told) == 1 else None


def _transforms(cube: xr.Dataset | xr.DataArray) -> Iterator[tuple[float, ...]]:
    """Yield the transforms that a cube carries, each (dx, 0, x0, 0, dy, y0)."""
    bands = list(cube.data_vars.values()) if isinstance(cube, xr.Dataset) else []
    for variable in (*cube.coords.values(), *bands):
        if text := variable.attrs.get("GeoTransform"):
            numbers = _six_numbers(str(text).split())
            if numbers:
                x0, dx, skew_x, y0, skew_y, dy = numbers
                yield dx, skew_x, x0, skew_y, dy, y0
    for attrs in (cube.attrs, *(band.attrs for band in bands)):
        if "transform" in attrs and (numbers := _six_numbers(attrs["transform"])):
            yield numbers


def _six_numbers(values: Any) -> tuple[float, ...] | None:
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        return None
    return numbers[:6] if len(numbers) in (6, 9) and np.isfinite(numbers).all() else None


def overlap_of(fine: Grid, coarse: Grid, factor: int = 2) -> tuple[dict[str, slice], dict[str, slice]]:
    """Return the windows of two grids that hold the same ground in whole nested pixels, by ``y`` and ``x``.

    They are the whole grids, but where loaders round one area to each grid by itself: then the edges are less than
    a coarse pixel apart, and what sticks out is left out. Grids that do not share a lattice, or differ by more, are
    left as they are, for `check_nesting` to refuse.
    """
    axes = {
        "y": (fine.y0, fine.dy, fine.shape[0], coarse.y0, coarse.dy, coarse.shape[0]),
        "x": (fine.x0, fine.dx, fine.shape[1], coarse.x0, coarse.dx, coarse.shape[1]),
    }
    windows_fine, windows_coarse = {}, {}
    for dim, (start, step, n, coarse_start, coarse_step, coarse_n) in axes.items():
        shift = (coarse_start - start) / step
        before, after = round(shift), round(shift) + factor * coarse_n - n
        if before == after == shift == 0:
            continue
        aligned = abs(shift - before) <= TOLERANCE and abs(coarse_step / step - factor) * coarse_n <= TOLERANCE
        if not aligned or max(abs(before), abs(after)) > factor:
            return {}, {}
        first = max(0, -(before // factor))
        last = min(coarse_n, (n - before) // factor)
        windows_coarse[dim] = slice(first, last)
        windows_fine[dim] = slice(before + factor * first, before + factor * last)
    return windows_fine, windows_coarse


def read_crs(ds: xr.Dataset | xr.DataArray) -> CRS | None:
    """Return the CRS that rioxarray finds in a cube, or that of stackstac's coordinate ``epsg``, or None."""
    import rioxarray  # noqa: F401 - registers .rio

    if isinstance(ds, xr.Dataset) and "spatial_ref" in ds.data_vars:  # opened without decode_coords="all"
        ds = ds.set_coords("spatial_ref")
    if ds.rio.crs is None and "epsg" in ds.coords and ds["epsg"].ndim == 0:
        ds = ds.rio.write_crs(int(ds["epsg"]))
    return ds.rio.crs


def transform_bounds(
    bounds: tuple[float, float, float, float], source: Any, target: Any
) -> tuple[float, float, float, float]:
    """Return the bounds in another CRS of a box (west, south, east, north), whose edges may bend."""
    from pyproj import Transformer

    west, south, east, north = bounds
    return Transformer.from_crs(source, target, always_xy=True).transform_bounds(west, south, east, north)
