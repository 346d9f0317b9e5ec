"""The main job on real pixels: COGs behind a STAC API, searched, super-resolved, written, read back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import dask
import numpy as np
import pytest
import xarray as xr
from conftest import needs_shared, no_compute, real_scene, scene_item, two_grids, with_classification
from dask.callbacks import Callback
from local_stac import serve
from numpy.testing import assert_allclose
from typer.testing import CliRunner

import xr_ginet
from xr_ginet.cli import _print_plan, app
from xr_ginet.mapping.likeness import Choice
from xr_ginet.network import Checkpoint, load_checkpoint
from xr_ginet.sentinel2.bands import BANDS_10M, BANDS_20M
from xr_ginet.simulation import simulate, write_cogs
from xr_ginet.training.degradation import degrade
from xr_ginet.training.metrics import rmse

pytestmark = pytest.mark.filterwarnings("ignore:.*unclosed:ResourceWarning")


@pytest.fixture(scope="module")
def gers(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """Write a part of a real scene with CRS and transform as COGs; return its item and their folder."""
    folder = tmp_path_factory.mktemp("gers")
    fine, coarse = real_scene("rastertools_T30TYP")
    fine, coarse = fine.isel(y=slice(400, 720), x=slice(300, 556)), coarse.isel(y=slice(200, 360), x=slice(150, 278))
    item = write_cogs(
        fine.to_array().values,
        coarse.to_array().values,
        folder,
        transform=tuple(fine.rio.transform(recalc=True))[:6],
        crs="EPSG:32630",
        datetime="2018-10-23T10:50:00Z",
        item_id="T30TYP_20181023",
    )
    return item, folder


class Order(Callback):
    """The names of the tasks that Dask starts, in order."""

    def __init__(self) -> None:
        self.started: list[str] = []
        super().__init__(pretask=lambda key, dsk, state: self.started.append(key[0] if type(key) is tuple else key))


@needs_shared
@pytest.mark.parametrize("options", [{}, {"resume": True}, {"progress": True}], ids=str)
def test_a_cube_is_read_worked_on_and_written_row_by_row(
    gers: tuple[dict, Path], options: dict[str, bool], tmp_path: Path
) -> None:
    item, _ = gers
    sr = xr_ginet.open_stac([item], chunks=32).ginet.superresolve(weights="ginet-xs", depth="auto")
    with Order() as order, dask.config.set(scheduler="sync"):
        sr.ginet.to_zarr(tmp_path / "cube.zarr", **options)
    kinds = [
        next((k for k in ("reflectance", "ginet-windows", "ginet-store") if n.startswith(k)), "") for n in order.started
    ]
    reads, calls, writes = (
        np.cumsum([kind == k for kind in kinds]) for k in ("reflectance", "ginet-windows", "ginet-store")
    )
    assert calls[-1] == 80
    assert (reads[-1], writes[-1]) == (800, 800)
    for done in (10, 40, 70):
        there = int(np.searchsorted(calls, done))
        assert reads[there] < 10 * (done + 8 + 2)  # those, the next row, and its corner
        assert writes[there] > 10 * (done - 2)


@needs_shared
def test_a_real_scene_from_catalogue_to_cube(gers: tuple[dict, Path], tmp_path: Path) -> None:
    item, folder = gers
    with serve([item], folder) as url:
        ds = xr_ginet.open_stac(url, datetime="2018-10", chunks=128)
        with no_compute():
            sr = ds.ginet.superresolve()
        sr.ginet.to_zarr(tmp_path / "cube.zarr", dtype="uint16")
    cube = xr.open_zarr(tmp_path / "cube.zarr", decode_coords="all").isel(time=0)
    native_10m, native_20m = real_scene("rastertools_T30TYP")
    assert cube.rio.crs.to_epsg() == 32630
    assert tuple(cube.rio.transform())[:6] == (10, 0, 742_920 + 3000, 0, -10, 4_848_600 - 4000)
    for band in BANDS_10M:  # 10 m bands pass through, at their own coordinates
        expected = native_10m[band].sel(y=cube["y"], x=cube["x"]).astype("float64") / 1e4
        assert_allclose(cube[band].values, expected, atol=0.51e-4)
    # 20 m bands gained detail, and seen through the instrument's blur they are still what was measured.
    result = cube[list(BANDS_20M)].to_array().values
    measured = native_20m.isel(y=slice(200, 360), x=slice(150, 278)).to_array().values / 1e4
    consistency = rmse(degrade(result, BANDS_20M), measured, border=8)
    assert (consistency < 0.25 * measured.std(axis=(1, 2))).all()
    repeated = measured.repeat(2, 1).repeat(2, 2)
    gradient = [np.abs(np.diff(image[:, 16:-16, 16:-16:2], axis=2)).mean() for image in (result, repeated)]
    assert gradient[0] > gradient[1]


@needs_shared
def test_the_default_weights_beat_atprk_on_scenes_they_never_saw() -> None:
    from evaluation import predict, read_scene, wald_pair

    network = load_checkpoint("default").network()
    shared = Path(__file__).parents[2] / "shared" / "data" / "scenes"
    for name, atprk in (("ucnn_usa", 82.5), ("ucnn_vietnam", 177.8)):
        ms, hs, truth = wald_pair(read_scene(shared, name), "mtf")
        error = rmse(predict(network, ms, hs), truth, border=8) * 1e4
        assert np.sqrt((error**2).mean()) < atprk


def test_the_demo_runs_on_two_workers_and_beats_bicubic(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import demo

    demo.main(tmp_path, size=256)
    printed = capsys.readouterr().out
    assert float(printed.rsplit(":", 1)[1]) < 0.6
    assert (tmp_path / "before_after.png").stat().st_size > 10_000
    cube = xr.open_zarr(tmp_path / "cube.zarr")
    assert dict(cube.sizes) == {"time": 1, "y": 256, "x": 256}
    assert not any(cube[band].isnull().any() for band in BANDS_20M)


def test_a_tiny_network_is_trained_from_a_catalogue_and_beats_bicubic_elsewhere(tmp_path: Path) -> None:
    import train_from_stac

    assert train_from_stac.main(tmp_path, size=288, steps=120) < 0.9


# -- command line -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def item_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("simulated")
    scene = simulate((96, 80), seed=1)
    item = scene_item(scene, folder)
    path = folder / "item.json"
    path.write_text(json.dumps(item))
    return path


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_cli_writes_the_cube_that_the_library_writes(item_file: Path, tmp_path: Path, checkpoint: Checkpoint) -> None:
    store = tmp_path / "cli.zarr"
    output = run("superresolve", item_file, store, "--weights", checkpoint.path, "--chunks", 64, "--dtype", "float32")
    assert "100% Completed" in output
    assert f"wrote {store}: time 1 × y 96 × x 80, 10 bands" in output
    expected = xr_ginet.open_stac([json.loads(item_file.read_text())], chunks=64).ginet.superresolve(
        weights=checkpoint.path
    )
    xr.testing.assert_allclose(xr.open_zarr(store, decode_coords="all").load(), expected.compute())


def test_cli_searches_a_catalogue(item_file: Path, tmp_path: Path, checkpoint: Checkpoint) -> None:
    item = json.loads(item_file.read_text())
    with serve([item], item_file.parent) as url:
        west, south, east, north = item["bbox"]
        box = (west, south, (west + east) / 2, north)
        arguments = ("superresolve", url, tmp_path / "c.zarr", "--weights", checkpoint.path, "--datetime", "2024-06")
        run(*arguments, "--bbox", *box, "--quiet")
        assert 36 <= xr.open_zarr(tmp_path / "c.zarr").sizes["x"] < 60
        assert "error: no item of 'sentinel-2-l2a'" in run(*arguments[:-1], "2023-06", code=1)


def test_cli_dry_run_tells_the_plan_and_writes_nothing(item_file: Path, tmp_path: Path) -> None:
    with no_compute():
        output = run("superresolve", item_file, tmp_path / "c.zarr", "--chunks", 32, "--dry-run")
    assert "items    1: simulated" in output
    assert "read     8.45e-05 GB" in output  # (4 · 96 · 80 + 6 · 48 · 40) · 2 bytes
    assert "9 chunks" in output
    assert "weights  ginet-s" in output
    assert "GB per process" in output
    assert not (tmp_path / "c.zarr").exists()


def test_the_plan_for_a_gpu_tells_of_its_memory(checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    cube = two_grids((48, 32), n_times=1)
    cube.attrs |= {"source_items": ["one"], "radiometry": "reflectance"}
    result = cube.chunk(y=16, x=16).ginet.superresolve(weights=checkpoint).assign_attrs(ginet_precision="mixed")
    _print_plan(cube, result, "cube.zarr", Choice(checkpoint, None, "cuda", "mixed"))
    expected = "memory   at most 0.069 GB of cuda's memory for the network, one block of 96 × 64 at a time"
    assert expected in capsys.readouterr().out  # (8 · 16 + 10 · 6 · 4) · 96 · 64 + 2²⁶


def test_the_plan_for_one_large_block_is_of_its_parts(
    checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    cube = two_grids((1000, 700), n_times=1).astype("float32")
    cube.attrs |= {"source_items": ["one"], "radiometry": "reflectance"}
    told = []
    for precision in ("float32", "float64"):
        result = cube.chunk().ginet.superresolve(weights=checkpoint, precision=precision, device="cpu")
        _print_plan(cube, result, "cube.zarr", Choice(checkpoint, None, "cpu", precision))
        [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("memory")]
        told.append(line)
    assert told[0].startswith("memory   at most 1.5 GB per process for the network, one block of 2000 × 1400 at a time")
    assert told[0].endswith("in parts of at most 1284 × 1284")
    assert told[1].endswith("in parts of at most 644 × 644")


def test_cli_exit_codes(item_file: Path, tmp_path: Path, checkpoint: Checkpoint) -> None:
    store = tmp_path / "c.zarr"
    common = ("superresolve", item_file, store, "--weights", checkpoint.path, "--quiet")
    run(*common)
    assert "holds a Zarr store already" in run(*common, code=1)
    run(*common, "--overwrite")
    assert "no weights 'best'" in run("superresolve", item_file, store, "--weights", "best", code=1)
    assert "neither the URL of a STAC API nor a file" in run("superresolve", "nowhere", store, code=1)
    (tmp_path / "empty.json").write_text('{"type": "FeatureCollection", "features": [{}]}')
    assert "holds no STAC item" in run("superresolve", tmp_path / "empty.json", store, code=1)
    assert "depth=" in run(*common, "--overwrite", "--depth", "7", code=1)
    run("superresolve", item_file, store, "--chunks", "many", code=2)
    run("superresolve", item_file, store, "--dtype", "int8", code=2)
    assert "Use --overwrite" in run(*common, code=1)
    assert "depth='six'" in run(*common, "--overwrite", "--depth", "six", code=1)
    assert "error:" in run("superresolve", "http://127.0.0.1:9/", store, code=1)
    broken = json.loads(item_file.read_text())
    (tmp_path / "B02.tif").write_text("no raster")
    broken["assets"]["blue"]["href"] = "B02.tif"
    (tmp_path / "broken.json").write_text(json.dumps(broken))
    output = run("superresolve", tmp_path / "broken.json", tmp_path / "b.zarr", "--quiet", code=1)
    assert str(tmp_path / "B02.tif") in output  # resolved against the item file


def test_cli_goes_on_with_a_store_of_the_same_kind(item_file: Path, tmp_path: Path, checkpoint: Checkpoint) -> None:
    store = tmp_path / "c.zarr"
    common = ("superresolve", item_file, store, "--weights", checkpoint.path, "--quiet", "--resume")
    run(*common)
    assert xr_ginet.status(store, verify=True).all()
    run(*common)
    assert "was made differently: ginet_depth" in run(*common, "--depth", "4", code=1)
    assert "either grows now, or is replaced" in run(*common, "--overwrite", code=1)


def test_cli_masks_clouds(item_file: Path, tmp_path: Path, checkpoint: Checkpoint) -> None:
    common = ("--weights", checkpoint.path, "--quiet", "--mask-clouds")
    assert "no asset with SCL" in run("superresolve", item_file, tmp_path / "a.zarr", *common, code=1)
    item = json.loads(item_file.read_text())
    classes = np.full((48, 40), 4, "uint8")
    classes[10:20, 5:9] = 9
    item = with_classification(item, classes, tmp_path / "scl.tif")
    (tmp_path / "item.json").write_text(json.dumps(item))
    run("superresolve", tmp_path / "item.json", tmp_path / "b.zarr", *common)
    missing = xr.open_zarr(tmp_path / "b.zarr")["B11"].isel(time=0).isnull().values
    assert (missing == (classes == 9).repeat(2, 0).repeat(2, 1)).all()


def test_cli_writes_to_a_url(item_file: Path, checkpoint: Checkpoint) -> None:
    url = "memory://cli/c.zarr"
    run("superresolve", item_file, url, "--weights", checkpoint.path, "--quiet")
    assert xr.open_zarr(url).sizes["x"] == 80
    assert json.loads(run("info", url))["sizes"]["y"] == 96


def test_cli_info_of_a_store_and_of_weights(item_file: Path, tmp_path: Path, checkpoint: Checkpoint) -> None:
    run("superresolve", item_file, tmp_path / "c.zarr", "--weights", checkpoint.path, "--quiet")
    cube = json.loads(run("info", tmp_path / "c.zarr"))
    assert cube["sizes"] == {"time": 1, "y": 96, "x": 80}
    assert cube["crs"] == "EPSG:32630"
    assert cube["dtype"] == "uint16"
    assert cube["attributes"]["ginet_weights_sha256"] == checkpoint.sha256
    assert cube["attributes"]["source_items"] == ["simulated"]
    weights = json.loads(run("info", checkpoint.path))
    assert weights["config"]["n_stages"] == 2
    assert weights["receptive_radius"] == 30
    assert json.loads(run("info", "default"))["card"]["degradation"] == "mtf"
    assert "no weights 'nothing'" in run("info", "nothing", code=1)


def test_the_program_is_installed() -> None:
    program = Path(sys.executable).parent / "xr-ginet"
    output = subprocess.run([program, "--help"], capture_output=True, text=True, check=True).stdout
    assert "superresolve" in output
