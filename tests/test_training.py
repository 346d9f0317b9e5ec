"""Degradation and metrics against arrays computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from xr_ginet.sentinel2.bands import BANDS, BANDS_10M, BANDS_20M
from xr_ginet.training.degradation import box_mean, degrade, gaussian_taps, mtf_mean
from xr_ginet.training.metrics import rmse


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
    with pytest.raises(ValueError, match="2 gains for 3 bands"):
        mtf_mean(np.zeros((3, 4, 4)), 2, [0.2, 0.3])
    with pytest.raises(ValueError, match=r"gain=1\.5: the modulation"):
        gaussian_taps(1.5, 2)
    with pytest.raises(ValueError, match="degradation='psf': must be 'mtf' or 'box'"):
        degrade(np.zeros((6, 4, 4)), BANDS_20M, degradation="psf")


def test_rmse_by_hand() -> None:
    reference = np.zeros((2, 4, 4))
    estimate = np.zeros((2, 4, 4))
    estimate[0, 1, 1], estimate[0, 0, 0], estimate[1, 2] = 2, 100, 3
    assert_allclose(rmse(estimate, reference, border=1), [np.sqrt(4 / 4), np.sqrt(9 * 2 / 4)])
    estimate[1, 2, 2] = np.nan
    assert_allclose(rmse(estimate, reference, border=1)[1], np.sqrt(9 / 3))
