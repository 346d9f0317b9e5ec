"""Evaluation: the streamed figures are those of the metrics on whole images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from conftest import SHARED, needs_shared, no_compute, two_grids
from evaluation import read_scene
from numpy.testing import assert_allclose
from scenes import scene_cube
from typer.testing import CliRunner

from xr_ginet.cli import app
from xr_ginet.evaluation import degrade_cube, evaluate
from xr_ginet.mapping import classical
from xr_ginet.network import Checkpoint
from xr_ginet.sentinel2.bands import BANDS_10M, BANDS_20M
from xr_ginet.training import metrics
from xr_ginet.training.degradation import degrade

CHUNKS = {"y": 22, "x": 50, "y_20m": 13, "x_20m": 25}


def stacked(ds: xr.Dataset, bands: tuple[str, ...]) -> np.ndarray:
    return np.stack([ds[band].values for band in bands], axis=-3).astype("float64")


@pytest.mark.parametrize("degradation", ["mtf", "box"])
@pytest.mark.parametrize("n_times", [None, 2])
def test_a_degraded_cube_is_the_degraded_images_whatever_the_chunks(degradation: str, n_times: int | None) -> None:
    cube = two_grids((41, 30), n_times=n_times, seed=2)
    with no_compute():
        reduced = degrade_cube(cube.chunk(CHUNKS), degradation=degradation)
    for bands, rows, columns in ((BANDS_10M, 80, 60), (BANDS_20M, 40, 30)):
        image = stacked(cube, bands)[..., :rows, :columns]
        assert_allclose(stacked(reduced, bands), degrade(image, bands, degradation=degradation), atol=1e-12)
    assert reduced["B02"].dims[-2:] == ("y", "x")
    assert_allclose(reduced["y"], cube["y_20m"][:40])
    assert reduced["x_20m"].values[0] == cube["x"].values[:4].mean()
    assert reduced.rio.crs == cube.rio.crs
    assert classical(reduced, "bicubic").sizes["y"] == 40


def oracle(cube: xr.Dataset, method: str | Path, border: int) -> dict[str, np.ndarray]:
    """Return the measures of whole images, time by time where that may be averaged."""
    from xr_ginet import superresolve

    reduced = degrade_cube(cube).compute()
    result = classical(reduced, method) if method == "bicubic" else superresolve(reduced, weights=method)
    estimate, truth = stacked(result, BANDS_20M), stacked(cube, BANDS_20M)
    return {
        "rmse": 1e4 * metrics.rmse(estimate, truth, border=border),
        "sre": metrics.sre(estimate, truth, border=border),
        "psnr": metrics.psnr(estimate, truth, border=border),
        "psnr_maximum": metrics.psnr(estimate, truth, border=border, data_range=None),
        "ssim": metrics.ssim(estimate, truth, border=border),
        "uiq": metrics.uiq(estimate, truth, border=border),
        "rmse_all": 1e4 * np.sqrt((metrics.rmse(estimate, truth, border=border) ** 2).mean()),
        "ergas": metrics.ergas(estimate, truth, border=border),
        "sam": metrics.sam(estimate, truth, border=border),
    }


@pytest.mark.parametrize("gap", [False, True])
def test_streamed_measures_are_those_of_whole_images(checkpoint: Checkpoint, gap: bool) -> None:
    cube = two_grids((48, 40), seed=3)
    if gap:
        cube["B06"][20, 30] = np.nan
        cube["B02"][60:70, 10] = np.nan
    table = evaluate(cube.chunk(CHUNKS), ["bicubic", checkpoint.path], border=6)
    assert list(table["model"].values) == ["bicubic", "random"]
    for label, method in (("bicubic", "bicubic"), ("random", checkpoint.path)):
        expected = oracle(cube, method, 6)
        assert set(expected) == set(table.data_vars)
        for name, value in expected.items():
            assert_allclose(table[name].sel(model=label), value, rtol=2e-5, err_msg=name)
    assert (table["rmse"] > 0).all()


def test_times_are_pooled() -> None:
    cube = two_grids((36, 36), n_times=2, seed=4)
    table = evaluate(cube, ["bicubic"], border=4)
    each = [evaluate(cube.isel(time=t), ["bicubic"], border=4) for t in range(2)]
    assert_allclose(table["rmse"] ** 2, (each[0]["rmse"] ** 2 + each[1]["rmse"] ** 2) / 2)
    assert_allclose(table["ssim"], (each[0]["ssim"] + each[1]["ssim"]) / 2)


def test_without_reference_the_figures_are_those_of_whole_images() -> None:
    cube = two_grids((40, 36), seed=5)
    table = evaluate(cube.chunk(CHUNKS), ["bicubic"], scale="full", border=4)
    coarse, fine = stacked(cube, BANDS_20M), stacked(classical(cube, "bicubic"), BANDS_20M)
    intensity = stacked(cube, BANDS_10M).mean(0, keepdims=True)
    seen = degrade(fine, BANDS_20M)
    assert_allclose(table["consistency"].values[0], 1e4 * metrics.rmse(seen, coarse, border=4), rtol=1e-5)
    low = np.concatenate([coarse, degrade(intensity, ("B08",))])
    high = np.concatenate([fine, intensity])
    change = {
        (i, j): abs(metrics.uiq(high[[i]], high[[j]], border=8)[0] - metrics.uiq(low[[i]], low[[j]], border=4)[0])
        for i in range(7)
        for j in range(i + 1, 7)
    }
    d_lambda = np.mean([value for (_, j), value in change.items() if j < 6])
    d_s = np.mean([value for (_, j), value in change.items() if j == 6])
    assert_allclose(table["d_lambda"], [d_lambda], rtol=1e-5)
    assert_allclose(table["d_s"], [d_s], rtol=1e-5)
    assert_allclose(table["qnr"], [(1 - d_lambda) * (1 - d_s)], rtol=1e-5)


def test_a_consistent_result_is_found_consistent() -> None:
    cube = two_grids((40, 36), seed=6)
    exact, plain = (
        evaluate(cube, ["ginet-xs"], scale="full", degradation="box", consistency=consistency)["consistency"].max()
        for consistency in ("exact", "none")
    )
    assert exact < 0.01 < plain


def test_the_command_prints_and_writes_the_table(tmp_path: Path) -> None:
    two_grids((40, 40), seed=7).chunk().ginet.to_zarr(tmp_path / "cube.zarr")
    for suffix in ("json", "csv", "md"):
        out = tmp_path / f"table.{suffix}"
        command = ["evaluate", str(tmp_path / "cube.zarr"), "--model", "bicubic", "--model", "regression"]
        result = CliRunner().invoke(app, [*command, "--border", "4", "--out", str(out)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert "| regression | ergas |" in result.output
        assert "bicubic" in out.read_text()
    table = evaluate(xr.open_zarr(tmp_path / "cube.zarr", decode_coords="all"), ["bicubic"], border=4)
    assert json.loads((tmp_path / "table.json").read_text())["rmse"]["bicubic"] == table["rmse"].values[0].tolist()
    wrong = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "x.txt")])
    assert wrong.exit_code == 1
    assert "must end in .json, .csv, .md" in wrong.output


def test_what_cannot_be_judged_is_refused() -> None:
    single = two_grids().drop_dims(["y_20m", "x_20m"])
    with pytest.raises(ValueError, match=r"no y_20m: its 20 m bands must lie on .* evaluate the cube that it was made"):
        evaluate(single, ["bicubic"])
    cube = two_grids((24, 24))
    with pytest.raises(ValueError, match="scale='half': must be 'reduced' or 'full'"):
        evaluate(cube, scale="half")
    with pytest.raises(ValueError, match="with border=8 at 20 m no 11 pixels are left"):
        evaluate(cube)
    with pytest.raises(FileNotFoundError, match="no weights 'best'"):
        evaluate(cube, ["best"], border=2)


@needs_shared
def test_a_real_scene_has_the_published_error() -> None:
    name = "ben_T35VPK_20170924_41_29"
    cube = scene_cube(SHARED / "scenes" / f"{name}.npz").isel(
        y=slice(4, -4), x=slice(4, -4), y_20m=slice(2, -2), x_20m=slice(2, -2)
    )  # 56 of 60 pixels: a multiple of 8, centred
    assert read_scene(SHARED / "scenes", name).coarse.shape[-2:] == (60, 60)
    table = evaluate(cube, ["bicubic", "ginet-s"])
    assert_allclose(table["rmse_all"], [148.8, 40.7], atol=0.06)
