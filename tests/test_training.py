"""Degradation and metrics against arrays computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import needs_shared, real_scene
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy.ndimage import gaussian_filter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchmetrics.functional.image import error_relative_global_dimensionless_synthesis, spectral_angle_mapper

from xr_ginet.sentinel2.bands import BANDS, BANDS_10M, BANDS_20M
from xr_ginet.training.degradation import box_mean, degrade, estimate_gain, gaussian_taps, mtf_mean
from xr_ginet.training.metrics import ergas, psnr, rmse, sam, sre, ssim, uiq


def test_box_mean_by_hand() -> None:
    image = np.arange(24.0).reshape(1, 4, 6)
    assert_allclose(box_mean(image, 2), [[[3.5, 5.5, 7.5], [15.5, 17.5, 19.5]]])
    assert box_mean(image.astype("float32"), 2).dtype == np.float32


def test_taps_have_the_width_and_the_gain_asked_for() -> None:
    for factor, n_taps in ((2, 12), (3, 19), (6, 36)):
        for gain in (0.2, 0.25, 0.38):
            taps = gaussian_taps(gain, factor)
            assert len(taps) == n_taps
            assert_allclose(taps.sum(), 1)
            position = np.arange(n_taps) - (n_taps - 1) / 2
            nyquist = 1 / (2 * factor)
            modulation = (taps * np.cos(2 * np.pi * nyquist * position)).sum()
            assert_allclose(modulation, gain, atol=2e-3)  # the kernel is cut


def direct_blur(image: np.ndarray, gain: float, factor: int) -> np.ndarray:
    """Return the oracle: for each coarse pixel the weighted sum over mirrored fine pixels, in plain loops."""
    height, width = image.shape
    sigma = factor * np.sqrt(-2 * np.log(gain) / np.pi**2)
    reach = 3 * factor

    def weights(n: int, coarse: int) -> np.ndarray:
        centre = factor * coarse + (factor - 1) / 2
        row = np.zeros(n)
        for fine in range(int(np.ceil(centre - reach)), int(np.floor(centre + reach)) + 1):
            mirrored = -1 - fine if fine < 0 else 2 * n - 1 - fine if fine >= n else fine
            row[mirrored] += np.exp(-0.5 * ((fine - centre) / sigma) ** 2)
        return row / row.sum()

    rows = np.stack([weights(height, i) for i in range(height // factor)])
    columns = np.stack([weights(width, j) for j in range(width // factor)])
    return rows @ image @ columns.T


@pytest.mark.parametrize("factor", [2, 3, 6])
def test_mtf_mean_equals_the_direct_sum(factor: int) -> None:
    image = np.random.default_rng(0).random((2, 36, 48))
    result = mtf_mean(image, factor, [0.22, 0.38])
    for band, gain in enumerate((0.22, 0.38)):
        assert_allclose(result[band], direct_blur(image[band], gain, factor), rtol=0, atol=1e-12)


@given(value=st.floats(-1, 1), factor=st.sampled_from([2, 3, 6]))
def test_constants_stay_constant(value: float, factor: int) -> None:
    image = np.full((6, 36, 48), value)
    for degradation in ("box", "mtf"):
        assert_allclose(degrade(image, BANDS_20M, factor=factor, degradation=degradation), value, atol=1e-12)


def test_degrade_knows_the_gain_of_each_band() -> None:
    image = np.random.default_rng(1).random((6, 24, 24))
    assert_allclose(degrade(image, BANDS_20M), mtf_mean(image, 2, [0.38, 0.34, 0.34, 0.33, 0.22, 0.23]))
    assert_allclose(degrade(image[:4], BANDS_10M), mtf_mean(image[:4], 2, [0.25] * 4))
    assert_allclose(degrade(image, BANDS_20M, degradation="box"), box_mean(image, 2))
    assert BANDS["B05"].mtf_gain == 0.38


def test_degradation_refuses() -> None:
    with pytest.raises(ValueError, match="5 by 4 pixels does not divide by the factor 2"):
        box_mean(np.zeros((5, 4)), 2)
    with pytest.raises(TypeError, match="an image of uint16 cannot hold the means"):
        degrade(np.ones((6, 4, 4), "uint16"), BANDS_20M)
    with pytest.raises(ValueError, match="0 coarse pixels are left"):
        estimate_gain(np.full((80, 80), np.nan), np.ones((40, 40)))
    with pytest.raises(ValueError, match="the coarse image is flat"):
        estimate_gain(np.ones((80, 80)), np.ones((40, 40)))
    with pytest.raises(ValueError, match="2 gains for 3 bands"):
        mtf_mean(np.zeros((3, 4, 4)), 2, [0.2, 0.3])
    with pytest.raises(ValueError, match=r"gain=1\.5: the modulation"):
        gaussian_taps(1.5, 2)
    with pytest.raises(ValueError, match="degradation='psf': must be 'mtf' or 'box'"):
        degrade(np.zeros((6, 4, 4)), BANDS_20M, degradation="psf")


@pytest.mark.parametrize("gain", [0.2, 0.33, 0.5])
def test_the_blur_that_made_an_image_is_found_again(gain: float) -> None:
    rng = np.random.default_rng(5)
    fine = gaussian_filter(rng.random((120, 160)), 1.0)
    coarse = 0.7 * mtf_mean(fine[None], 2, [gain])[0] + 0.1 + np.linspace(0, 1, 80)
    assert estimate_gain(fine, coarse) == pytest.approx(gain, abs=0.01)
    fine[3, 7], coarse[40, 50] = np.nan, np.nan
    assert estimate_gain(fine, coarse) == pytest.approx(gain, abs=0.01)


@needs_shared
def test_the_instruments_blur_is_near_mtf_and_far_from_block_means() -> None:
    fine, coarse = real_scene("rastertools_T30TYP")
    b08, b8a = fine["B08"].values.astype("float64"), coarse["B8A"].values.astype("float64")
    assert 0.34 < estimate_gain(b08, b8a) < 0.46
    assert estimate_gain(b08, box_mean(b08, 2)) > 0.6


def test_rmse_by_hand() -> None:
    reference = np.zeros((2, 4, 4))
    estimate = np.zeros((2, 4, 4))
    estimate[0, 1, 1], estimate[0, 0, 0], estimate[1, 2] = 2, 100, 3
    assert_allclose(rmse(estimate, reference, border=1), [np.sqrt(4 / 4), np.sqrt(9 * 2 / 4)])
    estimate[1, 2, 2] = np.nan
    assert_allclose(rmse(estimate, reference, border=1)[1], np.sqrt(9 / 3))


def pictures() -> tuple[np.ndarray, np.ndarray]:
    """Return a reference with structure, ``(3, 40, 52)``, and a noisy, biased estimate of it."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[:40, :52] / 10
    reference = np.stack([0.3 + 0.1 * np.sin(x + band) * np.cos(y * (1 + band)) for band in range(3)])
    return reference * 1.05 + rng.normal(0, 0.02, reference.shape), reference


def test_relative_metrics_by_hand() -> None:
    reference = np.array([[[1.0, 3.0]], [[2.0, 2.0]]])
    estimate = reference + np.array([[[1.0, -1.0]], [[0.5, 0.5]]])
    assert_allclose(sre(estimate, reference), [10 * np.log10(4 / 1), 10 * np.log10(4 / 0.25)])
    assert_allclose(psnr(estimate, reference), [0, 20 * np.log10(2)], atol=1e-12)
    assert_allclose(psnr(estimate, reference, data_range=None), [20 * np.log10(3), 20 * np.log10(4)])
    assert_allclose(ergas(estimate, reference), 50 * np.sqrt(((1 / 2) ** 2 + (0.5 / 2) ** 2) / 2))
    assert_allclose(ergas(estimate, reference, factor=6) * 3, ergas(estimate, reference))
    angles = [np.arctan2(2.5, 2) - np.arctan2(2, 1), np.arctan2(2.5, 2) - np.arctan2(2, 3)]
    assert_allclose(sam(estimate, reference), np.degrees(np.abs(angles)).mean())
    assert sam(7 * reference, reference) == pytest.approx(0, abs=1e-6)


def test_metrics_of_the_reference_itself_are_perfect() -> None:
    _, reference = pictures()
    assert_allclose(ssim(reference, reference), 1)
    assert_allclose(uiq(reference, reference), 1)
    assert sam(reference, reference) == pytest.approx(0, abs=1e-5)
    assert ergas(reference, reference) == 0


def test_uiq_equals_the_direct_sum_over_windows() -> None:
    estimate, reference = pictures()
    expected = []
    for e, r in zip(estimate, reference, strict=True):
        values = []
        for i in range(40 - 7):
            for j in range(52 - 7):
                a, b = e[i : i + 8, j : j + 8], r[i : i + 8, j : j + 8]
                covariance = ((a - a.mean()) * (b - b.mean())).mean()
                values.append(
                    4 * covariance * a.mean() * b.mean() / ((a.var() + b.var()) * (a.mean() ** 2 + b.mean() ** 2))
                )
        expected.append(np.mean(values))
    assert_allclose(uiq(estimate, reference), expected, rtol=1e-8)
    flat = np.full((1, 16, 16), 0.5)
    assert_allclose(uiq(flat * 2, flat), 2 * 2 / (4 + 1))


def test_metrics_agree_with_torchmetrics_and_scikit_image() -> None:
    estimate, reference = pictures()
    tensors = [torch.from_numpy(a)[None] for a in (estimate, reference)]
    radians = spectral_angle_mapper(*tensors).item()
    assert sam(estimate, reference) == pytest.approx(np.degrees(radians), rel=1e-6)
    global_error = error_relative_global_dimensionless_synthesis(*tensors, ratio=2).item()
    assert ergas(estimate, reference) == pytest.approx(global_error, rel=1e-6)
    assert_allclose(
        psnr(estimate, reference),
        [peak_signal_noise_ratio(r, e, data_range=1) for e, r in zip(estimate, reference, strict=True)],
    )
    assert_allclose(
        ssim(estimate, reference),
        [
            structural_similarity(r, e, data_range=1, gaussian_weights=True, use_sample_covariance=False)
            for e, r in zip(estimate, reference, strict=True)
        ],
        rtol=1e-6,
    )


def test_missing_pixels_and_borders_are_left_out() -> None:
    estimate, reference = pictures()
    spoiled = estimate.copy()
    spoiled[:, :4] = 9
    whole = [f(estimate[:, 4:-4, 4:-4], reference[:, 4:-4, 4:-4]) for f in (rmse, sre, psnr, ssim, uiq, ergas, sam)]
    inner = [f(spoiled, reference, border=4) for f in (rmse, sre, psnr, ssim, uiq, ergas, sam)]
    for a, b in zip(whole, inner, strict=True):
        assert_allclose(a, b)
    spoiled[:, :4] = np.nan
    assert np.isfinite(uiq(spoiled, reference)).all()
    assert np.isfinite(ssim(spoiled, reference)).all()
    assert_allclose(uiq(estimate * 1e-4, reference * 1e-4), uiq(estimate, reference))  # whatever the units
    for metric in (rmse, sre, ergas, sam, psnr):
        assert_allclose(metric(spoiled, reference), metric(estimate[:, 4:], reference[:, 4:]))
    with pytest.raises(ValueError, match=r"estimate \(3, 40, 52\) and reference \(2, 40, 52\) must have one shape"):
        rmse(estimate, reference[:2])
