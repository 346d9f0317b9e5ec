"""Super-resolution without weights: bicubic, high-pass modulation, regression per cluster."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from conftest import SHARED, needs_shared, no_compute, two_grids
from evaluation import read_scene, wald_pair
from numpy.testing import assert_allclose
from quality import as_cube
from scipy.spatial.distance import cdist
from sklearn.linear_model import LinearRegression

from xr_ginet.mapping import classical
from xr_ginet.mapping.classical import ClusterRegression, fit_clusters, upsample
from xr_ginet.sentinel2.bands import BANDS, BANDS_10M, BANDS_20M
from xr_ginet.training.degradation import mtf_mean
from xr_ginet.training.metrics import rmse

GAINS = tuple(BANDS[name].mtf_gain for name in BANDS_20M)
METHODS = ("bicubic", "glp_hpm", "regression")


def linear_cube(shape: tuple[int, int] = (40, 36), *, n_times: int | None = None) -> tuple[xr.Dataset, np.ndarray]:
    """Return a cube whose 20 m bands are linear in the 10 m bands before the blur, and what they are at 10 m."""
    cube = two_grids(shape, n_times=n_times, seed=4)
    fine = np.stack([cube[b].values for b in BANDS_10M], axis=-3)
    weights = np.random.default_rng(5).random((6, 4)) * 0.3
    truth = np.einsum("bf,...fyx->...byx", weights, fine) + 0.02
    coarse = mtf_mean(truth, 2, [float(np.mean(GAINS))] * 6)  # one blur: then the fit is exact
    for i, name in enumerate(BANDS_20M):
        cube[name] = cube[name].copy(data=coarse[..., i, :, :])
    return cube, truth


@pytest.mark.parametrize("factor", [2, 3, 6])
def test_upsampling_is_torch_bicubic(factor: int) -> None:
    image = np.random.default_rng(0).random((3, 7, 5))
    expected = torch.nn.functional.interpolate(torch.from_numpy(image)[None], scale_factor=factor, mode="bicubic")[0]
    assert_allclose(upsample(image, factor), expected, atol=1e-12)


def test_the_fit_is_one_regression_per_cluster_of_blurred_spectra() -> None:
    cube = two_grids((40, 30), seed=3).chunk({"y": 26, "x": 60, "y_20m": 7, "x_20m": 30})
    fine, coarse = (np.stack([cube[b].values for b in bands]) for bands in (BANDS_10M, BANDS_20M))
    arrays = (xr.concat([cube[b] for b in bands], "band").data.rechunk({0: -1}) for bands in (BANDS_10M, BANDS_20M))
    model = fit_clusters(*arrays, factor=2, gains=GAINS, n_clusters=3).compute()
    spectra = mtf_mean(fine, 2, [float(np.mean(GAINS))] * 4).reshape(4, -1).T
    assert_allclose(model.mean, spectra.mean(0))
    label = cdist((spectra - model.mean) / model.scale, model.centers).argmin(1)
    assert len(set(label)) == 3
    pixels = fine.reshape(4, -1).T
    nearest = cdist((pixels - model.mean) / model.scale, model.centers).argmin(1)
    expected = np.empty((len(pixels), 6))
    for cluster in range(3):
        target = coarse.reshape(6, -1).T[label == cluster]
        line = LinearRegression().fit(spectra[label == cluster], target)
        expected[nearest == cluster] = line.predict(pixels[nearest == cluster])
    assert_allclose(model.guide(fine), expected.T.reshape(6, *fine.shape[1:]), atol=2e-4)  # the ridge is small


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n_times", [None, 2])
def test_chunked_equals_whole(method: str, n_times: int | None) -> None:
    cube = two_grids((36, 29), n_times=n_times, seed=1)
    whole = classical(cube, method, precision="float64")
    for chunks in ({"y": 13, "x": 58, "y_20m": 5, "x_20m": 29}, {"y": (7, 60, 5), "x": 20, "y_20m": 36, "x_20m": 11}):
        with no_compute():
            lazy = classical(cube.chunk(chunks | ({"time": 1} if n_times else {})), method, precision="float64")
        assert lazy["B11"].dtype == np.float64
        assert lazy["B11"].chunksizes["y"] == cube.chunk(chunks)["B02"].chunksizes["y"]
        xr.testing.assert_allclose(lazy.compute(), whole.compute(), rtol=0, atol=1e-9)


def test_a_smaller_depth_would_show() -> None:
    cube = two_grids((36, 29), seed=1)
    whole = classical(cube, "regression", precision="float64")["B05"].values
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClusterRegression, "depth", 4)  # and 8 pixels for gaps
        parts = classical(cube.chunk({"y": 20, "x": 20}), "regression", precision="float64")["B05"].values
    assert np.abs(parts - whole).max() > 1e-6


def test_a_linear_scene_is_recovered_by_regression_and_by_no_interpolation() -> None:
    cube, truth = linear_cube()
    guide = cube.ginet.guide(method="kmeans")
    assert guide.dims == ("band", "y", "x")
    assert_allclose(guide.values, truth, atol=2e-3)
    plain = classical(cube, "bicubic")[list(BANDS_20M)].to_array().values
    result = cube.ginet.superresolve(weights=None)[list(BANDS_20M)].to_array().values
    assert (rmse(result, truth, border=8) < 0.15 * rmse(plain, truth, border=8)).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_constant_scene_stays_constant(method: str) -> None:
    cube = two_grids((20, 24)).map(lambda band: xr.full_like(band, 0.2 if band.name in BANDS_10M else 0.3))
    result = classical(cube, method)
    for name in BANDS_20M:
        assert_allclose(result[name], 0.3, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_missing_pixels_stay_where_they_are(method: str) -> None:
    cube = two_grids((24, 24), seed=2)
    cube["B05"][3, 4] = np.nan
    cube["B03"][20, 30] = np.nan
    result = classical(cube, method)
    expected = np.zeros((48, 48), bool)
    expected[20, 30] = True
    assert_allclose(np.isnan(result["B12"]), expected)
    expected[6:8, 8:10] = True
    assert_allclose(np.isnan(result["B05"]), expected)


def test_a_cube_without_a_valid_pixel_is_all_missing() -> None:
    assert np.isnan(classical(two_grids((12, 12)) * np.nan, "regression")["B11"]).all()


def test_means_agree_where_consistency_is_exact() -> None:
    cube = two_grids((20, 24), seed=6)
    result = cube.ginet.superresolve(weights=None, consistency="exact", precision="float64")
    assert_allclose(result["B8A"].coarsen(y=2, x=2).mean(), cube["B8A"], atol=1e-12)
    assert result.attrs["ginet_method"] == "regression"
    assert result.attrs["ginet_weights"] == "none"
    assert result.attrs["ginet_consistency"] == "exact"


def test_the_result_has_the_labels_of_the_learned_one() -> None:
    cube = two_grids((12, 12), n_times=2)
    result, learned = (cube.ginet.superresolve(weights=w) for w in (None, "ginet-xs"))
    assert list(result) == list(learned)
    assert result["B05"].attrs == learned["B05"].attrs
    coords = (ds.coords.to_dataset().drop_attrs(deep=False) for ds in (result, learned))
    xr.testing.assert_identical(*coords)


def test_each_chunk_is_read_once_for_the_fit_and_once_for_the_result() -> None:
    cube = two_grids((32, 32), seed=1).chunk({"y": 32, "x": 32, "y_20m": 16, "x_20m": 16})
    tasks = len(classical(cube, "regression").__dask_graph__()) / 4
    wide = two_grids((32, 256), seed=1).chunk({"y": 32, "x": 32, "y_20m": 16, "x_20m": 16})
    assert len(classical(wide, "regression").__dask_graph__()) / 32 < 2.5 * tasks  # linear


def test_what_makes_no_sense_is_refused() -> None:
    cube = two_grids((12, 12))
    for call, match in (
        (lambda: cube.ginet.superresolve(weights=None, self_ensemble=True), "weights=None has no network"),
        (lambda: cube.ginet.superresolve(weights=None, depth=8), "depth=8, .*Leave them out, or name weights"),
        (lambda: cube.ginet.superresolve(weights=None, precision="half"), "precision='half'"),
        (lambda: classical(cube, "lanczos"), "method='lanczos': must be one of bicubic, glp_hpm, regression"),
        (lambda: cube.ginet.guide(method="pan"), "method='pan': must be 'learned' or 'kmeans'"),
        (lambda: cube.drop_vars("B11").ginet.guide(method="kmeans"), "no B11 in the cube"),
    ):
        with pytest.raises(ValueError, match=match):
            call()


@needs_shared
def test_a_real_scene_is_restored_far_better_than_by_interpolation() -> None:
    ms, hs, truth = wald_pair(read_scene(SHARED / "scenes", "ucnn_usa"), "mtf")
    cube = as_cube(ms, hs)
    errors = {
        method: 1e4 * np.sqrt((rmse(classical(cube, method)[list(BANDS_20M)].to_array(), truth, border=8) ** 2).mean())
        for method in METHODS
    }
    assert errors["bicubic"] == pytest.approx(132.8, abs=0.1)
    assert errors["glp_hpm"] < 100
    assert errors["regression"] < 74  # GLP with a regression per band has 74.5, ATPRK 82.5
