"""A tiny run of each benchmark, so that they do not rot.

What they count is checked (tasks, pixels, errors, bytes), and that what they time is a number, whichever: a machine
that is busy with something else must not fail a test.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import attention
import bfloat16
import cluster
import depths
import faults
import gaps
import loader
import mutations
import numpy as np
import peers
import pipeline
import pytest
import quality
import scenes
import sixty
import studies
import supreme
import throughput
import tile
import torch
import training
from conftest import SHARED, needs_cuda, needs_shared
from numpy.testing import assert_allclose

import xr_ginet.network.bfloat16
from xr_ginet.mapping.classical import upsample
from xr_ginet.network import load_checkpoint
from xr_ginet.sentinel2.bands import BANDS, BANDS_20M
from xr_ginet.simulation import simulate
from xr_ginet.training import degradation
from xr_ginet.training.metrics import rmse
from xr_ginet.training.run import Run

TIMED = re.compile(r"-?\d+(\.\d+)?%?")
"""A time, a rate or a share of them: its value is the machine's."""

GPU_KIT = Path(attention.__file__).parent / "gpu"


def gpu_kit(name: str) -> ModuleType:
    """Return a script of benchmarks/gpu as a module."""
    spec = importlib.util.spec_from_file_location(f"gpu_{name}", GPU_KIT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of(page: Path) -> list[list[str]]:
    """Return the cells of all tables of a page, row by row, with their headers."""
    return [line.strip("| ").split(" | ") for line in page.read_text().splitlines() if line.startswith("| ")]


def test_attention_benchmark_writes_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xr_ginet.network.bfloat16, "is_faster", lambda: True)
    attention.main(["--size", "48", "--runs", "1", "--out", str(tmp_path / "results.md")])
    rows = rows_of(tmp_path / "results.md")[1:]
    assert [row[0] for row in rows] == [
        "attention",
        "attention in torch",
        "compact network",
        "compact network, bfloat16",
    ]
    assert all(TIMED.fullmatch(cell) for row in rows for cell in row[1:])


@needs_shared
def test_depths_benchmark_writes_its_table(tmp_path: Path) -> None:
    command = ["--scenes", str(SHARED / "scenes"), "--size", "96", "--weights", "ginet-xs"]
    depths.main([*command, "--out", str(tmp_path / "depths.md")])
    cells = (tmp_path / "depths.md").read_text().splitlines()[-1].split(" | ")
    assert float(cells[1]) > 1e-3 > 1e-5 > float(cells[5])
    assert int(cells[11]) == load_checkpoint("ginet-xs").card["depth"]


@needs_shared
def test_bfloat16_benchmark_writes_its_tables(tmp_path: Path) -> None:
    judged = ["--judged", "ben_T35VPK_20170924_41_29", "--side", "64", "--weights", "ginet-s"]
    bfloat16.main(["--scenes", str(SHARED / "scenes"), *judged, "--out", str(tmp_path / "bfloat16.md")])
    rows = [line.split(" | ") for line in (tmp_path / "bfloat16.md").read_text().splitlines() if "| ginet-s |" in line]
    assert float(rows[0][2]) == pytest.approx(float(rows[0][3]), rel=0.002)
    assert 0 < float(rows[0][5]) < float(rows[0][6].rstrip(" |")) < 20
    assert len(rows) == 2


@needs_shared
def test_gaps_benchmark_tells_that_nothing_changes_beyond_the_network_s_reach(tmp_path: Path) -> None:
    out = tmp_path / "gaps.md"
    gaps.main(["--scenes", str(SHARED / "scenes"), "--size", "96", "--weights", "ginet-xs", "--out", str(out)])
    first, *_, last = out.read_text().splitlines()[-3].split(" | ")[2:]
    assert float(first) > 1
    assert float(last.rstrip(" |")) < 1e-3


@needs_shared
@pytest.mark.slow
def test_quality_benchmark_writes_its_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["quality", "--scenes", str(SHARED), "--out", str(tmp_path / "quality.md")])
    quality.main()
    assert "| ucnn_vietnam | test | 272.3 |" in (tmp_path / "quality.md").read_text()


@pytest.mark.parametrize("path", sorted((Path(quality.__file__).parent / "train").glob("*.toml")), ids=lambda p: p.stem)
def test_training_configurations_are_of_the_packaged_weights(path: Path) -> None:
    run = Run.from_toml(path)
    packaged = load_checkpoint(path.stem)
    assert run.name == path.stem
    assert run.patches.degradation == packaged.card["degradation"]
    assert (load_checkpoint(run.start).config if run.start else run.network) == packaged.config
    assert [Path(e["path"]).stem for e in run.train] == packaged.card["data"]["train"]


def test_gpu_kit_degrades_as_the_package_does() -> None:
    train = gpu_kit("train")
    image = np.random.default_rng(0).random((6, 24, 32), "float32")
    gains = [BANDS[b].mtf_gain for b in BANDS_20M]
    assert_allclose(train.degrade(torch.from_numpy(image), gains), degradation.degrade(image, BANDS_20M), atol=1e-6)
    box = degradation.degrade(image, BANDS_20M, degradation="box")
    assert_allclose(train.degrade(torch.from_numpy(image), None), box, atol=1e-6)


@needs_shared
def test_gpu_kit_trains_in_pieces_with_torch_and_numpy_alone(tmp_path: Path) -> None:
    data, state = tmp_path / "data.npz", tmp_path / "state.pt"
    places = ("ben_T33UUP_20170613_87_48",), ("ben_T35VPK_20170924_41_29",)
    gpu_kit("pack").pack(SHARED / "scenes", data, *places)
    bare = "import sys, runpy; sys.modules |= dict.fromkeys(('xarray', 'dask', 'scipy', 'safetensors')); "
    bare += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", bare, str(GPU_KIT / "train.py"), "--data", str(data), "--state", str(state)]
    command += ["--minutes", "0.02", "--total-minutes", "300", "--features", "4", "--stages", "1", "--batch", "2"]

    def piece() -> dict:
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])

    first = piece()
    told = torch.load(state, weights_only=True)
    torch.save(told | {"elapsed": told["elapsed"] + 7200}, state)  # as if it had taken two hours
    second = piece()
    assert 0 < first["step"] < second["step"]
    assert second["elapsed"] >= first["elapsed"] + 7200
    gpu_kit("convert").convert(state, tmp_path / "ginet.safetensors")
    card = load_checkpoint(tmp_path / "ginet.safetensors").card
    assert card["steps"] == second["step"]
    assert card["rmse_validation"] == second["rmse"]


@needs_shared
@pytest.mark.gpu
@needs_cuda
def test_gpu_kit_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = gpu_kit("measure")
    monkeypatch.setattr(measure, "TILE", 400)
    monkeypatch.setattr(measure, "BLOCKS", 2)
    gpu_kit("pack").pack(SHARED / "scenes", tmp_path / "data.npz", (), ("ben_T35VPK_20170924_41_29",))
    command = ["--data", str(tmp_path / "data.npz"), "--out", str(tmp_path / "page.md"), "--sides", "64", "128", "192"]
    measure.main([*command, "--scene", "ben_T35VPK_20170924_41_29"])
    text = (tmp_path / "page.md").read_text()
    assert text.count("| ginet-s | mixed |") == 4
    assert "| ginet | 128 |" in text


@needs_shared
def test_studies_write_their_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("ben_T33UUP_20170613_87_48", "ben_T35VNH_20170924_43_47")
    for name in names:
        scenes.scene_cube(SHARED / "scenes" / f"{name}.npz").ginet.to_zarr(tmp_path / "scenes" / f"{name}.zarr")
    text = Path(studies.HERE / "train" / "ginet-xs.toml").read_text().replace("../../build", str(tmp_path))
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "ginet-xs.toml").write_text(text)
    for name, value in (
        ("HERE", tmp_path),
        ("TRAIN", names),
        ("VALIDATION", ()),
        ("TEST", names[:1]),
        ("SIMULATED_SIDE", 96),
        ("available_weights", lambda: ["ginet-s", "ginet-xs"]),
    ):
        monkeypatch.setattr(studies, name, value)
    command = ["--data", str(SHARED), "--folder", str(tmp_path / "runs"), "--steps", "1", "--places", "T33UUP"]
    studies.main(command)
    text = (tmp_path / "studies.md").read_text()
    assert text.count("| soft mixture") == 2
    assert "| ben_T33UUP_20170613_87_48 |" in text
    assert all(f"| {name} |" in text for name in ("ginet-s", "ginet-xs"))
    curve = text.partition("## Learning curves")[2].partition("##")[0].splitlines()
    assert [line.split(" | ")[:3] for line in curve if line.startswith("| 2 ")] == [["| 2", "2", "6"]]
    assert [line.split(" | ")[1:3] for line in curve[-4:] if line.startswith("| 1 ")] == [["1", "6"], ["2", "12"]]
    learned = {p.stem: load_checkpoint(p).card["data"]["train"] for p in tmp_path.glob("runs/*/*.safetensors")}
    assert learned["without-T33UUP"] == [names[1]]
    assert learned["clusters-3"] == list(names)
    assert learned["simulated-only"] == [f"scene-{seed}" for seed in range(4)]
    assert load_checkpoint(tmp_path / "runs/simulated-first/simulated-first.safetensors").card["start"] is not None


@needs_shared
def test_60_m_benchmark_writes_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sixty, "TRAIN", ("ssc_coastal", "ben_T35VLC_20170927_66_56"))
    monkeypatch.setattr(sixty, "VALIDATION", ())
    command = ["--scenes", str(SHARED), "--steps", "1", "--held-out", "T35VLC"]
    sixty.main([*command, "--out", str(tmp_path / "sixty.md")])
    lines = [line.split(" | ") for line in (tmp_path / "sixty.md").read_text().splitlines() if line.startswith("| ")]
    assert lines[2][0] == "| ben_T35VLC_20170927_66_56"
    assert 2 * float(lines[2][4]) < float(lines[2][2])  # B09 by regression, against bicubic
    assert lines[3][3] == "1.00"


def test_cluster_benchmark_writes_its_table(tmp_path: Path) -> None:
    command = ["--side", "64", "--chunk", "32", "--dates", "2", "--weights", "ginet-xs", "--workers", "1"]
    command += ["--simulated", "1", "--simulated-side", "64"]
    command += ["--schedulers", "threads", "--schedulers-side", "64"]
    cluster.main([*command, "--blocks", "16", "--out", str(tmp_path / "cluster.md")])
    rows = rows_of(tmp_path / "cluster.md")
    assert [row[0] for row in rows[2:4]] == ["1", "1, simulated"]
    assert rows[2][2] == "1.00"  # relative to itself
    assert rows[-1][0] == "threads"
    assert float(rows[-1][2]) > 0  # memory
    assert all(TIMED.fullmatch(cell) for row in (*rows[2:4], rows[-1]) for cell in row[1:])


def test_faults_benchmark_finds_every_complete_date_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GDAL_HTTP_LOW_SPEED_TIME", "1")
    monkeypatch.setattr("xr_ginet.sentinel2.patience.FIRST_PAUSE", 0.01)
    found = [row for row, _ in zip(faults.rows(tmp_path, 96, 0), range(2), strict=False)]
    assert [row[3:] for row in found] == [["0 of 4", "yes", "yes"], ["4 of 4", "yes", "yes"]]


def test_pipeline_benchmark_writes_its_tables(tmp_path: Path) -> None:
    command = ["--side", "192", "--chunk", "96", "--dates", "1", "3", "--weights", "ginet-xs"]
    pipeline.main([*command, "--out", str(tmp_path / "pipeline.md")])
    rows = rows_of(tmp_path / "pipeline.md")
    assert [row[1] for row in rows[2:4]] == ["4", "12"]
    assert rows[2][5] == rows[3][5]  # tasks per block
    assert [row[0] for row in rows[-2:]] == ["ginet-xs"] * 2
    assert all(TIMED.fullmatch(cell) for row in rows[-2:] for cell in row[2:])


def test_training_benchmark_writes_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def here(script: str, flag: str, weights: str, precision: str, form: str, path: Path, _: str, steps: int) -> dict:
        return training.measure(weights, precision, form, path, steps)

    monkeypatch.setattr(training, "in_fresh_process", here)
    command = ["--weights", "ginet-xs", "--precisions", "32-true", "--steps", "2", "--rounds", "1", "--side", "96"]
    training.main([*command, "--chunk", "96", "--out", str(tmp_path / "training.md")])
    row = rows_of(tmp_path / "training.md")[-1]
    assert row[:2] == ["ginet-xs", "32-true"]
    assert all(TIMED.fullmatch(cell) for cell in row[2:])


def test_training_benchmark_tells_the_best_of_its_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [{"torch": 0.5, "compiled": 0.125}, {"torch": 0.25, "compiled": 0.2}]
    taken = iter(seconds for once in found for seconds in once.values())
    monkeypatch.setattr(training, "in_fresh_process", lambda *_: {"seconds": next(taken), "waits": 0.015})
    row = training.row("ginet-xs", "32-true", Path(), steps=2, rounds=2)
    assert row == ["ginet-xs", "32-true", "4.00", "8.00", "2.00", "1.5%"]


def test_noise_is_found_beside_edges() -> None:
    rows, columns = np.indices((180, 180))
    image = 0.2 + 0.001 * rows + 0.3 * (columns > 90) + 0.1 * ((rows // 30 + columns // 40) % 2)
    noisy = image + np.array([0.001, 0.004])[:, None, None] * np.random.default_rng(0).standard_normal((2, 180, 180))
    found = studies.noise(noisy) / [0.001, 0.004]
    assert ((found > 0.7) & (found < 1)).all()  # the smoothest windows have a little less than the noise


def test_loader_benchmark_writes_its_table(tmp_path: Path) -> None:
    loader.main(["--side", "96", "--chunk", "96", "--steps", "1", "--out", str(tmp_path / "loader.md")])
    rows = [line.split("|")[1:-1] for line in (tmp_path / "loader.md").read_text().splitlines() if "|" in line]
    assert [row[0].strip() for row in rows[2:]] == ["ours", "xbatcher"]
    assert rows[2][3].strip() == "1.0"  # we read each chunk once
    assert float(rows[3][3]) > 1


def test_supreme_blurs_as_the_degradation_does() -> None:
    image = np.random.default_rng(1).random((1, 40, 36))
    blurred = np.fft.ifft2(supreme.transfer(0.3, image.shape[1:]) * np.fft.fft2(image)).real[:, ::2, ::2]
    inner = (slice(None), slice(3, -3), slice(3, -3))  # circular at the border, and mirrored there
    assert_allclose(blurred[inner], degradation.mtf_mean(image, 2, [0.3])[inner], atol=1e-12)


def test_supreme_told_the_blur_beats_bicubic_and_told_another_is_worse() -> None:
    scene = simulate((96, 96), seed=3)
    truth, gains = scene.reference[-6:], [BANDS[band].mtf_gain for band in BANDS_20M]
    plain, told, untold = (
        rmse(image, truth, border=8).mean()
        for image in (
            upsample(scene.coarse, 2),
            supreme.supreme(scene.fine, scene.coarse, gains),
            supreme.supreme(scene.fine, scene.coarse, [0.7] * 6),
        )
    )
    assert told < 0.6 * plain
    assert told < 0.8 * untold


def test_tile_benchmark_writes_its_table(tmp_path: Path) -> None:
    size = ["--sides", "256", "--scene", "128", "--chunk", "256", "--weights", "ginet-xs"]
    tile.main([*size, "--folder", str(tmp_path), "--out", str(tmp_path / "tile.md")])
    cells = (tmp_path / "tile.md").read_text().splitlines()[-1].split(" | ")
    assert cells[1] == "256 × 256"
    assert 0 < float(cells[4].rstrip(" |")) < 4


def test_throughput_benchmark_writes_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "is_faster", lambda: True)
    tiny = ["--weights", "ginet-xs", "--sides", "64", "--threads", "1", "--rounds", "1"]
    throughput.main([*tiny, "--out", str(tmp_path / "throughput.md")])
    rows = rows_of(tmp_path / "throughput.md")
    assert [row[1] for row in rows[2:5]] == ["float32", "bfloat16", "float64"]
    assert rows[-1][:2] == ["ginet-xs", "64"]
    assert all(TIMED.fullmatch(cell) for row in (*rows[2:5], rows[-1]) for cell in row[2:])


def test_mutations_page_tells_the_line_of_what_was_not_noticed() -> None:
    module = "sentinel2/native"
    source = (mutations.ROOT / "xr_ginet" / f"{module}.py").read_text()
    function = next(n for n in ast.walk(ast.parse(source)) if getattr(n, "name", None) == "_even")
    before = ast.unparse(function)
    name = "xr_ginet.sentinel2.native.x__even__mutmut_7"
    place = mutations.place(module, name, before, before.replace("// 2 * 2", "// 2 * 3"))
    assert "// 2 * 2" in source.splitlines()[place[0] - 1]
    assert place[1].replace("// 2 * 2", "// 2 * 3") == place[2]
    found = mutations.Found(module, 300, 40, Counter({"killed": 35, "survived": 2, "not checked": 3}), [place])
    assert found.row() == [f"`{module}`", "300", "37", "35", "95%"]
    assert f"| {place[0]} | `{place[1]}` | `{place[2]}` |" in mutations.page([found], 0)


def test_mutations_of_messages_are_left_out() -> None:
    def plain(text: str) -> str:
        return ast.dump(mutations._WithoutMessages().visit(ast.parse(text)))

    assert plain("if a: raise ValueError(f'{a} is bad')") == plain("if a: raise ValueError(None)")
    assert plain("warnings.warn('a', stacklevel=2)") == plain("warnings.warn('XXaXX', stacklevel=3)")
    assert plain("if a: raise ValueError") != plain("if not a: raise ValueError")
    assert plain("b = 'a'") != plain("b = 'XXaXX'")


@needs_shared
def test_peers_benchmark_measures_ours_without_a_peer(tmp_path: Path) -> None:
    scene = "ben_T35VPK_20170924_41_29"
    peers.main(["--scenes", str(SHARED / "scenes"), "--names", scene, "--out", str(tmp_path / "peers.md")])
    rows = [line.strip("| ").split(" | ") for line in (tmp_path / "peers.md").read_text().splitlines()[-4:]]
    assert [row[1] for row in rows] == ["ginet-xs", "ginet-s", "ginet-xs-box", "ginet-s-box"]
    assert all(35 < float(row[3]) < 60 for row in rows)
