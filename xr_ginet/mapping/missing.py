"""Missing pixels: filled for the network, missing again in its output.

A convolution spreads one NaN over its whole receptive field. So missing pixels are filled before the network with the
mean of the valid ones around them, and the output is masked where the input was missing. Values near a gap differ
from what they would be without it, by what the fill is wrong, within the receptive radius; no valid pixel is lost.

Sums are taken for each pixel by itself, in one order: they do not depend on where an array starts, to the last bit, and
carry nothing further than the radius. Running sums, as in `scipy.ndimage.uniform_filter`, do both.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FILL_RADIUS = 4
"""Coarse pixels around a missing pixel whose mean fills it. It adds to the depth that makes chunks invisible."""

FAR_FILL = 0.15
"""Reflectance that fills pixels without any valid one within the radius: a typical land surface's, and not zero, which
would make an edge. It only reaches valid pixels through the network's faint outer field."""

LARGEST = 100.0
"""Reflectance beyond it, of either sign, is missing. Sensors saturate below 10; what lies further out is a fill value
that nobody declared, such as -9999, 1e20 or netCDF's 9.97e36."""


def is_missing(image: NDArray) -> NDArray:
    """Return where reflectance is missing, bool: NaN, infinite, or beyond `LARGEST`."""
    return ~((image >= -LARGEST) & (image <= LARGEST))


def fill_missing(image: NDArray, radius: int) -> NDArray:
    """Return the image with what is missing replaced by the mean of the valid pixels in a square around each.

    Parameters
    ----------
    image : (..., y, x)
        Float; returned as it is where nothing is missing.
    radius : int
        Half the square's side, in pixels.
    """
    missing = is_missing(image)
    if not missing.any():
        return image
    filled = image.copy()
    for plane in np.ndindex(image.shape[:-2]):
        holes = missing[plane]
        if holes.any():
            total = _square_sums(np.where(holes, 0.0, image[plane]).astype("float64"), radius)[holes]
            count = _square_sums((~holes).astype("float64"), radius)[holes]
            filled[plane][holes] = np.divide(total, count, out=np.full_like(total, FAR_FILL), where=count > 0)
    return filled


def _square_sums(plane: NDArray, radius: int) -> NDArray:
    """Return the sum over the square around each pixel, zeros outside: ``(y, x) -> (y, x)``."""
    rows = _sums_of_rows(np.pad(plane, radius), 2 * radius + 1)
    return _sums_of_rows(rows.T, 2 * radius + 1).T


def _sums_of_rows(plane: NDArray, width: int) -> NDArray:
    """Return the sums of ``width`` rows on end, by doubling: ``(y, x) -> (y - width + 1, x)``."""
    length = len(plane) - width + 1
    total: NDArray | None = None
    doubled, n, done = plane, 1, 0
    while n <= width:  # ``doubled`` holds the sums of n rows
        if width & n:
            piece = doubled[done : done + length]
            total = piece if total is None else total + piece
            done += n
        doubled = doubled[:-n] + doubled[n:]
        n *= 2
    assert total is not None
    return total


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
    return is_missing(coarse).repeat(factor, -2).repeat(factor, -1) | is_missing(fine).any(axis=-3, keepdims=True)


def mask(result: NDArray, missing: NDArray, remedy: str) -> NDArray:
    """Return a result made NaN where its input was missing, in its own memory.

    Raises
    ------
    ValueError
        If it is not finite elsewhere, with the remedy.
    """
    lost = ~(np.isfinite(result) | missing)
    if lost.any():
        raise ValueError(
            f"{np.count_nonzero(lost)} of {lost.size} pixels came out as NaN or infinite where all of the input is "
            f"valid. {remedy}"
        )
    result[np.broadcast_to(missing, result.shape)] = np.nan
    return result
