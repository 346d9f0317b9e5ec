"""Missing pixels: filled for the network, missing again in its output.

A convolution spreads one NaN over its whole receptive field. So missing pixels are filled before the network with the
mean of the valid ones around them, and the output is masked where the input was missing. Values near a gap differ
from what they would be without it, by what the fill is wrong, within the receptive radius; no valid pixel is lost.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter

FILL_RADIUS = 4
"""Coarse pixels around a missing pixel whose mean fills it. It adds to the depth that makes chunks invisible."""

FAR_FILL = 0.15
"""Reflectance that fills pixels without any valid one within the radius: a typical land surface's, and not zero, which
would make an edge. It only reaches valid pixels through the network's faint outer field."""


def fill_missing(image: NDArray, radius: int) -> NDArray:
    """Return the image with NaN and infinity replaced by the mean of the valid pixels in a square around each.

    Parameters
    ----------
    image : (..., y, x)
        Float; returned as it is where nothing is missing.
    radius : int
        Half the square's side, in pixels.
    """
    missing = ~np.isfinite(image)
    if not missing.any():
        return image
    size = (1,) * (image.ndim - 2) + (2 * radius + 1,) * 2
    total = uniform_filter(np.where(missing, 0.0, image).astype("float64"), size, mode="constant")
    share = uniform_filter((~missing).astype("float64"), size, mode="constant")
    near = share > 0.5 / (2 * radius + 1) ** 2  # at least one valid pixel, whatever the rounding
    mean = np.divide(total, share, out=np.full_like(total, FAR_FILL), where=near)
    return np.where(missing, mean, image).astype(image.dtype)


def output_mask(fine: NDArray, coarse: NDArray, factor: int) -> NDArray:
    """Return where the output is missing: where its own coarse pixel is, or any fine band.

    Parameters
    ----------
    fine : (..., fine band, y, x)
    coarse : (..., band, y / factor, x / factor)

    Returns
    -------
    (..., band, y, x)
        bool
    """
    coarse_missing = (~np.isfinite(coarse)).repeat(factor, -2).repeat(factor, -1)
    return coarse_missing | (~np.isfinite(fine)).any(axis=-3, keepdims=True)
