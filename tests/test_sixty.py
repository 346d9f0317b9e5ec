"""The 60 m bands: their own grid, read, nested, and brought to 10 m."""

from __future__ import annotations

import json
from pathlib import Path

import dask.array as da
import numpy as np
import pytest
import rasterio
import torch
import xarray as xr
from conftest import SHARED, needs_shared, no_compute, random_checkpoint, scene_item, three_grids, two_grids
from numpy.testing import assert_allclose, assert_array_equal
from test_catalogues import NAMES, REAL_ITEMS, full_tile, load_item
from typer.testing import CliRunner

import xr_ginet
from xr_ginet.cli import app
from xr_ginet.mapping import classical
from xr_ginet.mapping.classical import ClusterRegression, fit_clusters, upsample
from xr_ginet.network import Checkpoint, save_checkpoint
from xr_ginet.sentinel2.bands import BANDS, BANDS_10M, BANDS_20M, BANDS_60M
from xr_ginet.sentinel2.grids import DIMS, SIXTY, Grid
from xr_ginet.sentinel2.items import read_item
from xr_ginet.simulation import simulate
from xr_ginet.training.degradation import degrade
from xr_ginet.training.metrics import rmse


@needs_shared
@pytest.mark.parametrize(("name", "epsg", "origin"), [row[:3] for row in REAL_ITEMS], ids=NAMES)
def test_a_real_item_yields_its_60_m_bands(name: str, epsg: int, origin: tuple) -> None:
    def look(href: str) -> dict:
        return full_tile(href, origin) | {
            "proj:transform": [60, 0, origin[0], 0, -60, origin[1]],
            "proj:shape": [1830, 1830],
        }

    wanted = ["B01"] if name.startswith("dea-ard3") else list(BANDS_60M)  # NBART has no B09
    if name.startswith("eopf-explorer"):
        with pytest.raises(ValueError, match=r"no asset with B01 at its native 60 m; it has reflectance/b01 \(20 m\)"):
            read_item(load_item(name), wanted, look=look)
        return
    scene = read_item(load_item(name), wanted, look=look)
    for asset in scene.bands.values():
        assert (asset.epsg, asset.grid) == (epsg, Grid(*origin, 60, -60, (1830, 1830)))


def test_a_cube_with_60_m_bands_is_snapped_to_their_pixels(checkpoint: Checkpoint, tmp_path: Path) -> None:
    scene = simulate((120, 180), seed=2)
    item = scene_item(scene, tmp_path)
    numbers = np.arange(1, 20 * 30 + 1, dtype="uint16").reshape(20, 30)
    place = rasterio.Affine(60, 0, scene.transform[2], 0, -60, scene.transform[5])
    for name in BANDS_60M:
        with rasterio.open(
            tmp_path / f"{name}.tif", "w", "GTiff", 30, 20, 1, scene.crs, place, "uint16", nodata=0
        ) as file:
            file.write(numbers, 1)
        item["assets"][name] = item["assets"]["red"] | {
            "href": str(tmp_path / f"{name}.tif"),
            "eo:bands": [{"name": name}],
            "proj:shape": [20, 30],
            "proj:transform": list(place)[:6],
        }
    west, south, east, north = item["bbox"]
    inner = (west + 0.004, south + 0.003, east - 0.005, north - 0.002)
    with no_compute():
        cube = xr_ginet.open_stac([item], bands=(*BANDS_10M, *BANDS_20M, *BANDS_60M), bbox=inner, chunks=32)
        result = cube.ginet.superresolve(weights=None, bands="all")
    grids = [Grid.from_coords(cube, dims) for dims in DIMS.values()]
    assert all(grid.bounds == grids[0].bounds for grid in grids)
    assert [n % 6 for n in grids[0].shape] == [0, 0]
    assert (grids[0].x0 - scene.transform[2]) % 60 == 0
    row, column = round((scene.transform[5] - grids[2].y0) / 60), round((grids[2].x0 - scene.transform[2]) / 60)
    height, width = grids[2].shape
    assert_allclose(cube["B09"].values[0], numbers[row : row + height, column : column + width] * 1e-4, rtol=1e-6)
    assert list(result.data_vars) == list(BANDS)
    assert result["B01"].dims == ("time", "y", "x")
    assert result.rio.transform() == cube.rio.transform()
    (tmp_path / "item.json").write_text(json.dumps(item))
    command = ["superresolve", str(tmp_path / "item.json"), str(tmp_path / "cube.zarr"), "--quiet", "--bands", "all"]
    run = CliRunner().invoke(app, [*command, "--weights", str(checkpoint.path)], catch_exceptions=False)
    assert run.exit_code == 0, run.output
    assert set(xr.open_zarr(tmp_path / "cube.zarr").data_vars) >= set(BANDS)


def test_all_bands_are_each_what_its_own_method_makes(checkpoint: Checkpoint) -> None:
    cube = three_grids(n_times=2).chunk({"time": 1, "y": 13, "x": 20})
    with no_compute():
        result = cube.ginet.superresolve(weights=checkpoint, bands="all", precision="float64")
    assert list(result.data_vars) == list(BANDS)
    assert result.attrs["ginet_method_60m"] == "regression"
    assert result.attrs["ginet_weights"] == checkpoint.name
    assert result["B01"].attrs["native_resolution"] == 60
    assert result["B01"].chunks == result["B05"].chunks
    plain = cube.ginet.superresolve(weights=checkpoint, precision="float64")
    assert "ginet_method_60m" not in plain.attrs
    xr.testing.assert_equal(result[list(plain.data_vars)], plain)
    fine, coarse = (np.stack([cube[b].values for b in bands], 1) for bands in (BANDS_10M, BANDS_60M))
    gains = tuple(BANDS[b].mtf_gain for b in BANDS_60M)
    model = fit_clusters(da.from_array(fine), da.from_array(coarse), factor=6, gains=gains, n_clusters=8).compute()
    oracle = ClusterRegression(6, gains, "float64")(fine, coarse, model)
    assert_allclose(np.stack([result[b].values for b in BANDS_60M], 1), oracle, rtol=0, atol=1e-10)


def test_the_60_m_bands_by_a_network_are_what_it_makes_of_the_whole_image(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    sixty = random_checkpoint(tmp_path / "sixty.safetensors", bands=BANDS_60M, factor=6, n_stages=1, n_blocks=0)
    cube = three_grids((8, 11)).chunk({"y": 20, "x": 24})
    with no_compute():
        result = cube.ginet.superresolve(weights=checkpoint, bands="all", weights_60m=sixty, precision="float64")
    fine, coarse = (torch.from_numpy(np.stack([cube[b].values for b in bands])) for bands in (BANDS_10M, BANDS_60M))
    oracle = sixty.network().double()(fine[None], coarse[None])[0]
    assert_allclose(np.stack([result[b].values for b in BANDS_60M]), oracle, rtol=0, atol=1e-10)
    told = [result.attrs[f"ginet_{key}_60m"] for key in ("method", "weights", "weights_sha256")]
    assert told == ["network", "sixty", sixty.sha256]
    assert result.attrs["ginet_weights"] == "random"
    alone = cube.ginet.superresolve(weights=sixty, precision="float64")
    xr.testing.assert_equal(alone[list(BANDS_60M)].drop_attrs(), result[list(BANDS_60M)].drop_attrs())


@pytest.mark.parametrize(("depth", "theirs"), [("exact", "exact"), (4, "exact"), ("auto", "auto")])
def test_the_60_m_network_has_the_depth_of_its_own_card_or_the_exact_one(
    depth: int | str, theirs: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    sixty = random_checkpoint(tmp_path / "s.safetensors", bands=BANDS_60M, factor=6, n_stages=1, n_blocks=0)
    sixty = save_checkpoint(sixty.path, sixty.network(), {"depth": 6})
    cube = three_grids((8, 11)).chunk({"y": 20, "x": 24})
    options = {"precision": "float64", "device": "cpu"}
    both = cube.ginet.superresolve(weights=checkpoint, bands="all", weights_60m=sixty, depth=depth, **options)
    found = both[list(BANDS_60M)].compute()
    exact, auto = (cube.ginet.superresolve(weights=sixty, depth=d, **options) for d in ("exact", "auto"))
    assert auto.attrs["ginet_depth"] == 6 < exact.attrs["ginet_depth"]
    expected, other = (exact, auto) if theirs == "exact" else (auto, exact)
    assert_array_equal(found["B09"], expected["B09"])
    assert abs(found["B09"] - other["B09"]).max() > 1e-6


def test_weights_for_other_bands_are_refused_for_those_of_60_m(checkpoint: Checkpoint) -> None:
    with pytest.raises(ValueError, match=r"weights_60m='random' are for B05, .* and factor 2; B01, B09 and factor 6"):
        three_grids().ginet.superresolve(weights=None, bands="all", weights_60m=checkpoint)
    with pytest.raises(ValueError, match=r"weights_60m is for the 60 m bands, which are left out. Type bands='all'"):
        three_grids().ginet.superresolve(weights=None, weights_60m=checkpoint)


def test_consistency_holds_at_60_m_too() -> None:
    cube = three_grids()
    result = cube.ginet.superresolve(weights=None, bands="all", consistency="exact", precision="float64")
    means = result["B09"].coarsen(y=6, x=6).mean()
    assert_allclose(means, cube["B09"], rtol=0, atol=1e-12)


def test_a_missing_60_m_pixel_is_missing_at_10_m_and_no_other() -> None:
    cube = three_grids()
    cube["B01"][2, 3] = np.nan
    result = cube.ginet.superresolve(weights=None, bands="all")
    expected = np.zeros((24, 36), bool)
    expected[12:18, 18:24] = True
    assert_array_equal(np.isnan(result["B01"]), expected)
    assert not np.isnan(result["B09"]).any()


def test_what_lacks_60_m_bands_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no B01, B09 in the cube.*y_60m"):
        two_grids().ginet.superresolve(weights=None, bands="all")
    cube = three_grids().isel(x=slice(34), x_20m=slice(17))
    with pytest.raises(ValueError, match="34 pixels and the coarse one 4 by 6; 6 by 6 fine pixels per coarse one"):
        cube.ginet.superresolve(weights=None, bands="all")
    with pytest.raises(ValueError, match="bands='60m': must be '20m', or 'all'"):
        three_grids().ginet.superresolve(weights=None, bands="60m")


@needs_shared
def test_on_real_60_m_bands_degraded_by_six_bicubic_is_beaten_by_far() -> None:
    with np.load(SHARED / "scenes" / "dsen2_T33UUB.npz") as file:
        fine, truth = (file[key][..., : 6 * 90 * k, : 6 * 90 * k] * 1e-4 for key, k in (("b10", 1), ("b60", 1)))
    truth = truth[:, :90, :90]
    parts = {10: degrade(fine, BANDS_10M, factor=6, degradation="mtf"), 60: degrade(truth, BANDS_60M, factor=6)}
    data = {}
    for size, bands in ((10, BANDS_10M), (60, BANDS_60M)):
        n = parts[size].shape[-1]
        data |= {band: (DIMS[size], image) for band, image in zip(bands, parts[size], strict=True)}
        data |= dict(zip(DIMS[size], (-size * (np.arange(n) + 0.5), size * (np.arange(n) + 0.5)), strict=True))
    cube = xr.Dataset(data).set_coords([*DIMS[10], *DIMS[60]])
    result = classical(cube, "regression", bands=SIXTY)
    found = rmse(np.stack([result[b].values for b in BANDS_60M]), truth, border=6)
    bicubic = rmse(upsample(parts[60], 6), truth, border=6)
    assert (found < 0.3 * bicubic).all()
