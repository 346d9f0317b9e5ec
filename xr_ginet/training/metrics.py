"""How far an estimate is from its reference: the measures of the super-resolution literature.

Each takes two images ``(band, y, x)`` in the same units and leaves out ``border`` pixels on each side and missing
pixels (NaN in either). Per-band measures return ``(band,)`` in float64. torchmetrics and scikit-image compute some of
them too, with other defaults: torchmetrics' ERGAS has the ratio 4 and its SAM is in radians.

References
----------
ERGAS: Wald, "Quality of high resolution synthesised images", 2000. SAM: Yuhas, Goetz, Boardman 1992. SSIM: Wang,
Bovik, Sheikh, Simoncelli 2004. UIQ: Wang, Bovik 2002. SRE: Lanaras et al. 2018.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import correlate1d

SSIM_SIGMA = 1.5
SSIM_RADIUS = 5  # an 11 × 11 Gaussian
UIQ_SIDE = 8


def rmse(estimate: NDArray, reference: NDArray, *, border: int = 0) -> NDArray:
    """Return the root mean square error of each band, in the units of the input."""
    estimate, reference = _inner(estimate, reference, border)
    return np.sqrt(np.nanmean((estimate - reference) ** 2, axis=(-2, -1)))


def sre(estimate: NDArray, reference: NDArray, *, border: int = 0) -> NDArray:
    """Return the signal to reconstruction error ratio of each band, dB: ``10 log10(mean(reference)² / MSE)``."""
    estimate, reference = _inner(estimate, reference, border)
    return 20 * np.log10(np.nanmean(reference, axis=(-2, -1)) / rmse(estimate, reference))


def psnr(estimate: NDArray, reference: NDArray, *, border: int = 0, data_range: float | None = 1.0) -> NDArray:
    """Return the peak signal to noise ratio of each band, dB; ``data_range=None`` is each band's own maximum."""
    estimate, reference = _inner(estimate, reference, border)
    peak = np.nanmax(reference, axis=(-2, -1)) if data_range is None else data_range
    return 20 * np.log10(peak / rmse(estimate, reference))


def ssim(estimate: NDArray, reference: NDArray, *, border: int = 0, data_range: float = 1.0) -> NDArray:
    """Return the structural similarity of each band: 11 × 11 Gaussian windows of σ 1.5, all within the image."""
    index = ssim_map(*_inner(estimate, reference, border), data_range=data_range)
    return np.nanmean(index[..., SSIM_RADIUS:-SSIM_RADIUS, SSIM_RADIUS:-SSIM_RADIUS], axis=(-2, -1))


def ssim_map(estimate: NDArray, reference: NDArray, *, data_range: float = 1.0) -> NDArray:
    """Return the structural similarity of the window around each pixel: ``(..., y, x)``, float64."""
    position = np.arange(-SSIM_RADIUS, SSIM_RADIUS + 1)
    taps = np.exp(-0.5 * (position / SSIM_SIGMA) ** 2)
    luminance, contrast = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mean_e, mean_r, var_e, var_r, covariance = _window_moments(estimate, reference, taps / taps.sum())
    return ((2 * mean_e * mean_r + luminance) * (2 * covariance + contrast)) / (
        (mean_e**2 + mean_r**2 + luminance) * (var_e + var_r + contrast)
    )


def uiq(estimate: NDArray, reference: NDArray, *, border: int = 0) -> NDArray:
    """Return the universal image quality index of each band: the mean over all 8 × 8 windows within the image."""
    index = uiq_map(*_inner(estimate, reference, border))
    height, width = index.shape[-2:]
    half = UIQ_SIDE // 2
    return np.nanmean(index[..., half : height - half + 1, half : width - half + 1], axis=(-2, -1))


def uiq_map(estimate: NDArray, reference: NDArray) -> NDArray:
    """Return the quality index of the window from 4 pixels before to 3 after each pixel: ``(..., y, x)``, float64."""
    mean_e, mean_r, var_e, var_r, covariance = _window_moments(estimate, reference, np.full(UIQ_SIDE, 1 / UIQ_SIDE))
    denominator = (var_e + var_r) * (mean_e**2 + mean_r**2)
    flat = var_e + var_r < 1e-12 * (mean_e**2 + mean_r**2)  # alike in structure: compared by their means alone
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(
            flat, 2 * mean_e * mean_r / (mean_e**2 + mean_r**2), 4 * covariance * mean_e * mean_r / denominator
        )


def _window_moments(estimate: NDArray, reference: NDArray, taps: NDArray) -> tuple[NDArray, ...]:
    """Return both means, both variances and the covariance of the window around each pixel."""

    def mean(image: NDArray) -> NDArray:
        return correlate1d(correlate1d(image, taps, axis=-1), taps, axis=-2)

    mean_e, mean_r = mean(estimate), mean(reference)
    var_e, var_r = mean(estimate**2) - mean_e**2, mean(reference**2) - mean_r**2
    return mean_e, mean_r, var_e, var_r, mean(estimate * reference) - mean_e * mean_r


def ergas(estimate: NDArray, reference: NDArray, *, border: int = 0, factor: int = 2) -> float:
    """Return the relative dimensionless global error: ``100 / factor · sqrt(mean((rmse / mean(reference))²))``."""
    estimate, reference = _inner(estimate, reference, border)
    relative = rmse(estimate, reference) / np.nanmean(reference, axis=(-2, -1))
    return float(100 / factor * np.sqrt((relative**2).mean()))


def sam(estimate: NDArray, reference: NDArray, *, border: int = 0) -> float:
    """Return the mean angle between the spectra of estimate and reference, degrees."""
    return float(np.nanmean(spectral_angle(*_inner(estimate, reference, border))))


def spectral_angle(estimate: NDArray, reference: NDArray) -> NDArray:
    """Return the angle between the spectra of each pixel, degrees: ``(..., band, y, x) -> (..., y, x)``."""
    product = (estimate * reference).sum(-3)
    norms = np.sqrt((estimate**2).sum(-3) * (reference**2).sum(-3))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.degrees(np.arccos(np.clip(product / norms, -1, 1)))


def _inner(estimate: NDArray, reference: NDArray, border: int) -> tuple[NDArray, NDArray]:
    """Return both without their borders, float64, missing where either is."""
    if estimate.shape != reference.shape:
        raise ValueError(f"estimate {estimate.shape} and reference {reference.shape} must have one shape")
    inner = (..., slice(border, -border or None), slice(border, -border or None))
    left, right = (image[inner].astype("float64") for image in (estimate, reference))
    missing = np.isnan(left) | np.isnan(right)
    if missing.any():
        left, right = np.where(missing, np.nan, left), np.where(missing, np.nan, right)
    return left, right
