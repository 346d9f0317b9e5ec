"""Wald's protocol: coarser versions of an image, by block means or by the instrument's blur.

Plain functions of numpy arrays. They do not look for missing pixels and do not know of grids.

The instrument's blur is a Gaussian through one number per band, its modulation at the Nyquist frequency. For the 20 m
bands these are the ones that ESA's data quality reports give for Sentinel-2A, as the literature quotes them; for the
10 m bands, there 0.26, 0.28, 0.24 and 0.26, it is 0.25. Measured on real scenes (`estimate_gain`), the blur that leads
from B08 to B8A has 0.40: by less than B8A's own 0.33, since B08 is blurred itself. Block means would have 0.71.

References
----------
Wald, Ranchin, Mangolini (1997), "Fusion of satellite images of different spatial resolutions".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation, gaussian_filter
from scipy.optimize import minimize_scalar

from ..sentinel2.bands import BANDS

Degradation = Literal["box", "mtf"]
LEAST_PIXELS = 1000  # a blur of one number is not told from less
TAPS_PER_FACTOR = 6  # 12 taps at factor 2: the kernel is cut at 2.7 to 3.5 σ for the gains of Sentinel-2


def box_mean(image: NDArray, factor: int) -> NDArray:
    """Return the mean of each ``factor × factor`` block.

    Parameters
    ----------
    image : (..., y, x)
        Any float; y and x multiples of ``factor``.
    factor : int
        Resolution ratio.

    Returns
    -------
    (..., y / factor, x / factor)
        In the dtype of ``image``.

    Examples
    --------
    >>> box_mean(np.array([[1.0, 3.0], [5.0, 7.0]]), 2)
    array([[4.]])
    """
    height, width = _coarse_shape(image, factor)
    blocks = image.reshape(*image.shape[:-2], height, factor, width, factor)
    return blocks.mean(axis=(-3, -1), dtype=image.dtype)


def gaussian_taps(gain: float, factor: int) -> NDArray:
    """Return the 1-D Gaussian whose modulation is ``gain`` at the Nyquist frequency of the coarse grid.

    ``σ = factor · sqrt(−2 ln(gain) / π²)`` fine pixels; ``6 · factor`` taps centred on a coarse pixel's centre (one
    more or less where that is a fine pixel's centre), with sum 1.
    """
    if not 0 < gain < 1:
        raise ValueError(f"gain={gain}: the modulation at the Nyquist frequency must lie between 0 and 1")
    sigma = factor * np.sqrt(-2 * np.log(gain) / np.pi**2)
    n_taps = TAPS_PER_FACTOR * factor + factor % 2 * (1 - TAPS_PER_FACTOR * factor % 2)
    position = np.arange(n_taps) - (n_taps - 1) / 2
    taps = np.exp(-0.5 * (position / sigma) ** 2)
    return taps / taps.sum()


def mtf_mean(image: NDArray, factor: int, gains: Sequence[float]) -> NDArray:
    """Return the image as a coarser instrument would see it: a Gaussian blur per band, then every ``factor``-th pixel.

    Parameters
    ----------
    image : (..., band, y, x)
        Any float; y and x multiples of ``factor``. Borders are mirrored.
    factor : int
        Resolution ratio. Coarse pixels stay centred on ``factor × factor`` blocks.
    gains : sequence of float
        Modulation of each band at the coarse Nyquist frequency.

    Returns
    -------
    (..., band, y / factor, x / factor)
        In the dtype of ``image``.
    """
    if len(gains) != image.shape[-3]:
        raise ValueError(f"{len(gains)} gains for {image.shape[-3]} bands: one gain per band is needed")
    height, width = _coarse_shape(image, factor)
    out = np.empty((*image.shape[:-2], height, width), image.dtype)
    for band, gain in enumerate(gains):
        taps = gaussian_taps(gain, factor)
        rows = _blur_and_decimate(image[..., band, :, :], taps, factor)
        out[..., band, :, :] = _blur_and_decimate(rows.swapaxes(-1, -2), taps, factor).swapaxes(-1, -2)
    return out


def degrade(image: NDArray, bands: Sequence[str], *, factor: int = 2, degradation: Degradation = "mtf") -> NDArray:
    """Return Sentinel-2 ``bands`` at a resolution ``factor`` times coarser.

    Parameters
    ----------
    image : (..., band, y, x)
        Reflectance or digital numbers, as any float.
    bands : sequence of str
        ESA names of the band axis; ``mtf`` looks up each band's gain in `xr_ginet.sentinel2.bands`.
    factor : int
        Resolution ratio.
    degradation : {"mtf", "box"}
        The instrument's blur, or block means (the GINet authors' choice, much sharper than the instrument).
    """
    if degradation == "box":
        return box_mean(image, factor)
    if degradation == "mtf":
        return mtf_mean(image, factor, [BANDS[name].mtf_gain for name in bands])
    raise ValueError(f"degradation={degradation!r}: must be 'mtf' or 'box'")


def _coarse_shape(image: NDArray, factor: int) -> tuple[int, int]:
    if not np.issubdtype(image.dtype, np.floating):
        raise TypeError(f"an image of {image.dtype} cannot hold the means of its pixels: image.astype('float32')")
    height, width = image.shape[-2:]
    if height % factor or width % factor:
        raise ValueError(f"an image of {height} by {width} pixels does not divide by the factor {factor}")
    return height // factor, width // factor


def _blur_and_decimate(image: NDArray, taps: NDArray, factor: int) -> NDArray:
    """Filter the y axis and keep one pixel per block: ``(..., y, x) -> (..., y / factor, x)``."""
    n = image.shape[-2] // factor
    before = (len(taps) - factor) // 2  # the first coarse centre lies at (factor − 1) / 2
    after = len(taps) - factor - before
    pad = [(0, 0)] * (image.ndim - 2) + [(before, after), (0, 0)]
    padded = np.pad(image, pad, mode="symmetric")
    stop = factor * (n - 1) + 1
    return sum(np.asarray(tap, image.dtype) * padded[..., t : t + stop : factor, :] for t, tap in enumerate(taps))


def estimate_gain(fine: NDArray, coarse: NDArray, *, factor: int = 2) -> float:
    """Return the modulation, at the coarse Nyquist frequency, of the blur that leads from a fine to a coarse image.

    The two must see nearly the same light, as B08 and B8A do. For each gain tried, the fine image is blurred and
    decimated, low frequencies are removed from both, one factor fits the one to the other, and the gain that leaves
    least is taken.

    Parameters
    ----------
    fine : (y, x)
        Any units; NaN is left out.
    coarse : (y / factor, x / factor)
        Likewise.

    Returns
    -------
    float
        Between 0.05 and 0.9; block means have 0.71 by this measure.

    Raises
    ------
    ValueError
        If fewer than 1000 coarse pixels are usable, or the image is flat.
    """
    fine, coarse = fine.astype("float64"), coarse.astype("float64")
    missing = ~np.isfinite(coarse) | ~np.isfinite(fine).reshape(*coarse.shape[:1], factor, -1, factor).all((1, 3))
    keep = ~binary_dilation(missing, iterations=TAPS_PER_FACTOR)
    if keep.sum() < LEAST_PIXELS:
        raise ValueError(f"{keep.sum()} coarse pixels are left where nothing is missing; {LEAST_PIXELS} are needed")
    filled, coarse = (np.where(np.isfinite(i), i, i[np.isfinite(i)].mean()) for i in (fine, coarse))
    target = _detail(coarse)[keep]
    if target.std() < 1e-9 * abs(coarse[keep].mean()):
        raise ValueError("the coarse image is flat: there is no detail to compare")

    def residual(gain: float) -> float:
        detail = _detail(mtf_mean(filled[None], factor, [gain])[0])[keep]
        return float(((target - detail * (detail @ target) / (detail @ detail)) ** 2).sum())

    return float(minimize_scalar(residual, bounds=(0.05, 0.9), method="bounded", options={"xatol": 1e-3}).x)


def _detail(image: NDArray) -> NDArray:
    """Return an image without its low frequencies, which differ between bands for reasons other than blur."""
    return image - gaussian_filter(image, 2.0)
