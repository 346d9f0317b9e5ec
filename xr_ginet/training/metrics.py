"""How far an estimate is from its reference."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def rmse(estimate: NDArray, reference: NDArray, *, border: int = 0) -> NDArray:
    """Return the root mean square error of each band.

    Parameters
    ----------
    estimate, reference : (band, y, x)
        In the same units; missing pixels (NaN in either) are left out.
    border : int
        Pixels to leave out on each side.

    Returns
    -------
    (band,)
        float64, in the units of the input.
    """
    inner = (..., slice(border, -border or None), slice(border, -border or None))
    error = estimate[inner].astype("float64") - reference[inner]
    return np.sqrt(np.nanmean(error**2, axis=(-2, -1)))
