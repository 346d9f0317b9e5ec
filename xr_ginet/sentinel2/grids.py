"""The paired 10 m and 20 m grids of a cube: read from coordinates, proved to nest.

A grid is a transform, a shape and a CRS. Nothing here reads pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

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
