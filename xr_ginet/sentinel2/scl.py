"""The scene classification of level 2A (SCL): its classes, and pixels made missing by them.

The classification lies on the 20 m grid, whatever is masked with it: it is repeated, never interpolated.

References
----------
ESA, Level-2A Algorithm Theoretical Basis Document (S2-PDGS-MPC-ATBD-L2A), scene classification.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from .bands import SCL, band_name
from .grids import COARSE_DIMS, DIMS
from .provenance import MASK, known, of_dates

CLASSES = (
    "no data",
    "saturated or defective",
    "dark area",
    "cloud shadow",
    "vegetation",
    "not vegetated",
    "water",
    "unclassified",
    "cloud, medium probability",
    "cloud, high probability",
    "thin cirrus",
    "snow or ice",
)
"""What the numbers of the classification stand for, in order."""

CLOUDY = (0, 1, 3, 8, 9, 10)
"""No data, saturated or defective, cloud shadow, clouds, cirrus: the land is not seen."""


def mask_clouds(ds: xr.Dataset, classes: Sequence[int] = CLOUDY, *, buffer: int = 0) -> xr.Dataset:
    """Return a two-grid cube whose bands are missing where its scene classification says so, lazily.

    Masked before super-resolution, clouds neither reach into the pixels beside them nor come out sharper.

    Parameters
    ----------
    ds : Dataset
        Two-grid cube with ``SCL`` in ``[time,] y_20m, x_20m``, as ``open_stac(…, bands=[…, "SCL"])`` and `open_safe`
        return it; chunked in any way.
    classes : sequence of int
        Classes that are masked, 0 to 11, see `CLASSES`.
    buffer : int
        20 m pixels around them that are masked too, in a square.

    Returns
    -------
    Dataset
        As ``ds``, bands NaN at 10 m, 20 m and 60 m where a 20 m pixel of such a class lies within them. Its
        ``ginet_mask``, a coordinate along ``time`` or an attribute, tells the classes and the buffer.

    Raises
    ------
    ValueError
        If there is no ``SCL`` on the 20 m grid, a class does not exist, or the buffer is negative.
    """
    if SCL not in ds or not set(COARSE_DIMS) <= set(ds[SCL].dims):
        raise ValueError(
            f"no {SCL} with the dims {COARSE_DIMS} in the cube, which holds {', '.join(map(str, ds.data_vars))}. Load "
            f"it with the bands: open_stac(…, bands=[…, '{SCL}']); products of level 1C have none"
        )
    if not set(classes) <= set(range(len(CLASSES))):
        raise ValueError(f"classes={tuple(classes)}: must be numbers from 0 to {len(CLASSES) - 1}")
    if buffer < 0:
        raise ValueError(f"buffer={buffer}: must be a number of 20 m pixels, not negative")
    seen = ds[SCL].transpose(..., *COARSE_DIMS)
    masked = (seen.isin(list(classes)) | seen.isnull()).variable
    if buffer:
        masked = masked.copy(data=_dilate(masked.data, buffer))
    grids = {dims: _on_grid(masked, dims) for dims in DIMS.values() if set(dims) <= set(ds.dims)}
    bands = [ds[name] for name in ds.data_vars if band_name(str(name)) == name]
    cube = ds.assign({b.name: b.where(~m) for b in bands for dims, m in grids.items() if set(dims) <= set(b.dims)})
    mask = f"{SCL} {' '.join(str(c) for c in sorted(set(classes)))}, buffer {buffer}"
    before = [one.get(MASK, "none") for one in known(ds)]
    return of_dates(cube, [{MASK: mask if one == "none" else f"{one}; {mask}"} for one in before])


def _on_grid(masked: xr.Variable, dims: tuple[str, str]) -> xr.DataArray:
    """Return a mask at 20 m on the grid of other dims: repeated at 10 m, any of nine at 60 m."""
    data = masked.data
    if dims == DIMS[10]:
        data = data.repeat(2, axis=-2).repeat(2, axis=-1)
    elif dims == DIMS[60]:
        data = masked.coarsen(dict.fromkeys(COARSE_DIMS, 3), np.any).data
    return xr.DataArray(data, dims=(*masked.dims[:-2], *dims))


def _dilate(mask: Any, buffer: int) -> Any:
    from scipy.ndimage import binary_dilation

    square = np.ones((1,) * (mask.ndim - 2) + (2 * buffer + 1,) * 2, bool)
    if not hasattr(mask, "dask"):
        return binary_dilation(mask, square)
    depth = {mask.ndim - 2: buffer, mask.ndim - 1: buffer}
    return mask.map_overlap(binary_dilation, depth=depth, boundary=False, structure=square, dtype=bool)
