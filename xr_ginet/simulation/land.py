"""The drawn land: which material lies in each cell, what varies within materials, and how a shape is painted on it.

What is painted, and where, is decided elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .canvas import CELL, Double, Float, Index, Mask
from .spectra import FIXED, VARIANTS, WATER

Window = tuple[slice, slice]
EVERYWHERE = (slice(None), slice(None))
ROW = {name: i * VARIANTS for i, name in enumerate(FIXED)}  # in the table of spectra, counted from the last parcel


@dataclass
class Land:
    """Cells ``(y, x)`` of 5 m. Painting changes ``material`` in place."""

    seed: int
    material: Index
    """Rows of `Spectra`."""
    n_parcels: int
    moisture: Float
    """Standard deviations; irrigation included."""
    chlorophyll: Float
    """Standard deviations."""
    density: Float
    """Standard deviations; gradients and rows included."""
    canopy: Float
    """Standard deviations of the crowns' light and shade."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of cells."""
        height, width = self.material.shape
        return height, width

    @property
    def extent(self) -> tuple[float, float]:
        """Height and width in metres."""
        height, width = self.shape
        return height * CELL, width * CELL

    def paint(self, where: Mask, name: str, variant: Index | None = None, *, window: Window = EVERYWHERE) -> None:
        """Make a material of the cells ``where``; ``variant`` picks one of its individual spectra."""
        first = self.n_parcels + ROW[name]
        self.material[window][where] = first if variant is None else first + variant[where] % VARIANTS

    def is_water(self, window: Window = EVERYWHERE) -> Mask:
        """Return where water has been painted."""
        row = self.material[window] - self.n_parcels
        return (row >= 0) & (row < len(WATER) * VARIANTS)  # FIXED begins with WATER

    def window(self, centre: Double, reach: float) -> Window:
        """Return the cells within ``reach`` metres of ``centre``, cut at the border."""
        low, high = (np.clip((centre + d) / CELL, 0, self.shape).astype(int) for d in (-reach, reach))
        return slice(low[0], high[0]), slice(low[1], high[1])
