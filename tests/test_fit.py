"""Fitting: the loss, one patch learned by heart, adaptation to a cube."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from conftest import random_checkpoint, two_grids
from numpy.testing import assert_allclose

import xr_ginet
from xr_ginet.network import Checkpoint, GINet, GINetConfig, load_checkpoint
from xr_ginet.sentinel2.bands import BANDS_10M, BANDS_20M
from xr_ginet.simulation import simulate
from xr_ginet.training.fit import COLDEST, FitOptions, Fitting, _StateFile, fit, write_picture
from xr_ginet.training.objective import relative_error, start_from_clusters, start_near_bicubic
from xr_ginet.training.patches import Patches, PatchOptions


def simulated_cube(side: int = 128, seed: int = 5) -> xr.Dataset:
    scene = simulate((side, side), seed=seed)

    def grid(bands: tuple[str, ...], images: np.ndarray, pixel: float) -> xr.Dataset:
        centres = pixel * (np.arange(images.shape[-1]) + 0.5)
        data = {band: (("y", "x"), image) for band, image in zip(bands, images, strict=True)}
        return xr.Dataset(data, {"y": -centres, "x": centres})

    cube = xr_ginet.pair(grid(BANDS_10M, scene.fine, 10), grid(BANDS_20M, scene.coarse, 20))
    return cube.chunk({"y": side, "x": side, "y_20m": side // 2, "x_20m": side // 2})


def test_relative_error_by_hand() -> None:
    hs = torch.full((2, 6, 2, 2), 0.3)
    truth = F.interpolate(hs, scale_factor=2, mode="bicubic") + torch.tensor([0.1, 0.2])[:, None, None, None]
    bicubic = F.interpolate(hs, scale_factor=2, mode="bicubic")
    expected = np.mean([0.1 / 0.101 + 0.1 / 0.102, 0.2 / 0.201 + 0.2 / 0.202])
    assert relative_error(bicubic, truth, hs).item() == pytest.approx(expected, rel=1e-4)
    assert relative_error(truth, truth, hs).item() < 1e-3


CPU = {"accelerator": "cpu", "batch_size": 1}


def weights_of(fitting: Fitting) -> list[torch.Tensor]:
    return list(fitting.result().state_dict().values())


def test_one_patch_is_learned_by_heart_and_so_are_the_clusters() -> None:
    torch.manual_seed(0)
    patches = Patches([simulated_cube(48)], PatchOptions(size=24, augment=False))
    network = GINet(GINetConfig(n_features=6, n_stages=1, assignment="soft"))
    before = network.guide.classify[0].weight.clone()
    fitted = fit(network, patches, FitOptions(steps=150, learning_rate=4e-3, warm_up=20, averaging=0.9, **CPU))
    assert fitted.losses[-1] < 0.5 * min(fitted.losses[0], 2)
    assert (network.guide.classify[0].weight - before).abs().max() > 1e-3


def test_a_share_lies_between_the_start_and_the_average() -> None:
    torch.manual_seed(3)
    start = GINet(GINetConfig(n_features=4, n_stages=1, assignment="soft"))
    results = []
    for share in (1.0, 0.25):
        patches = Patches([simulated_cube(48)], PatchOptions(size=24))
        options = FitOptions(steps=3, learning_rate=1e-2, warm_up=1, averaging=0.5, share=share, **CPU)
        results.append(weights_of(fit(copy.deepcopy(start), patches, options)))
    assert any(not torch.equal(a, b) for a, b in zip(start.parameters(), results[0], strict=True))
    for before, whole, quarter in zip(start.state_dict().values(), *results, strict=True):
        torch.testing.assert_close(quarter, 0.75 * before + 0.25 * whole)


@pytest.mark.parametrize("learn", [True, False])
def test_hard_clusters_get_a_gradient_only_where_they_are_mixed_while_learning(learn: bool) -> None:
    torch.manual_seed(1)
    network = GINet(GINetConfig(n_features=4, n_stages=1, assignment="hard"))
    before = [p.clone() for p in network.guide.classify.parameters()]
    patches = Patches([simulated_cube(48)], PatchOptions(size=24))
    options = FitOptions(steps=4, learning_rate=1e-3, warm_up=1, learn_clusters=learn, **CPU)
    fitted = fit(network, patches, options)
    moved = [bool((p.grad is not None) and p.grad.abs().max() > 0) for p in network.guide.classify.parameters()]
    assert moved == [learn] * len(before)
    assert fitted.result().guide.temperature is None  # what results assigns hard
    if learn:
        assert network.guide.temperature == pytest.approx(COLDEST ** (3 / 4))


def test_a_cold_mixture_is_the_likeliest_cluster() -> None:
    torch.manual_seed(2)
    network = GINet(GINetConfig(n_features=4, n_stages=1, assignment="hard"))
    ms = torch.rand(1, 4, 12, 12)
    hard = network.guide(ms)
    network.guide.temperature = 1e-6
    assert_allclose(network.guide(ms).detach(), hard.detach(), atol=1e-6)
    network.guide.temperature = 1.0
    assert (network.guide(ms) - hard).abs().max() > 1e-3


def test_clusters_start_as_k_means_assigns() -> None:
    from sklearn.cluster import KMeans

    rng = np.random.default_rng(3)
    spectra = rng.random((5, 4))[rng.integers(5, size=400)] * 0.4 + rng.normal(0, 0.01, (400, 4)).clip(-0.02, 0.02)
    spectra = torch.tensor(spectra.clip(0), dtype=torch.float32)
    network = GINet(GINetConfig(n_features=4, n_stages=1, cluster_features=(6, 5)))
    start_from_clusters(network, spectra, seed=0)
    logits = network.guide.classify(spectra.T.reshape(1, 4, 20, 20))[0].flatten(1)
    means = KMeans(5, n_init=4, random_state=0).fit(spectra.double().numpy())
    assert_allclose(logits.argmax(0).numpy(), means.predict(spectra.double().numpy()))
    distance = ((spectra.double().numpy()[:, None] - means.cluster_centers_) ** 2).sum(-1)
    shares = torch.softmax(torch.tensor(-distance / (means.inertia_ / 400)), 1)
    assert_allclose(logits.softmax(0).T.detach(), shares, atol=1e-3)


def test_clusters_that_cannot_start_from_k_means_are_refused() -> None:
    for config, spectra, match in (
        ({"cluster_features": (3, 8)}, torch.rand(9, 4), r"at least 4 features; this one is 'learned' with \(3, 8\)"),
        ({"guide": "external"}, torch.rand(9, 4), "this one is 'external'"),
        ({}, torch.rand(3, 4), "3 spectra for 5 clusters"),
    ):
        with pytest.raises(ValueError, match=match):
            start_from_clusters(GINet(GINetConfig(n_features=4, n_stages=1, **config)), spectra)


@pytest.mark.parametrize("factor", [2, 3, 6])
def test_training_starts_near_bicubic_and_projects_a_constant_onto_itself(factor: int) -> None:
    torch.manual_seed(0)
    network = GINet(GINetConfig(n_features=6, n_stages=2, factor=factor))
    start_near_bicubic(network)
    inner = slice(2 * factor, -2 * factor)
    flat = network.stages[0].up(torch.full((1, 6, 8, 8), 0.3)).detach()
    assert_allclose(flat[..., inner, inner], 0.3, rtol=1e-5)
    ms, hs = torch.rand(1, 4, 8 * factor, 8 * factor), torch.rand(1, 6, 8, 8)
    bicubic = F.interpolate(hs, scale_factor=factor, mode="bicubic")
    assert (network(ms, hs) - bicubic).std() < 0.3 * hs.std()


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    cube = simulated_cube(48)
    network = GINet(GINetConfig(n_features=4, n_stages=1))
    network.stages[0].correction.reconstruct.weight.data.fill_(torch.inf)
    before = [p.clone() for p in network.parameters()]
    fitted = fit(network, Patches([cube], PatchOptions(size=24)), FitOptions(steps=2, warm_up=1, **CPU))
    assert not np.isfinite(fitted.losses).any()
    for old, new in zip(before, network.parameters(), strict=True):
        assert_allclose(old.detach(), new.detach())


def run_in_pieces(folder, stops: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> Fitting:
    """Fit for 12 steps, and be interrupted after each of ``stops``; the state is saved every 3 steps."""
    options = FitOptions(steps=12, warm_up=2, save_every=3, validate_every=5, averaging=0.8, **CPU | {"batch_size": 2})
    cubes = [simulated_cube(64, seed) for seed in (1, 2)]
    step = Fitting.training_step
    for stop in (*stops, None):

        def stopping(self: Fitting, batch: object, index: int, stop: int | None = stop) -> torch.Tensor:
            if self.global_step == stop:
                raise InterruptedError
            return step(self, batch, index)

        monkeypatch.setattr(Fitting, "training_step", stopping)
        torch.manual_seed(0)
        network = GINet(GINetConfig(n_features=4, n_stages=1, assignment="soft"))
        patches, watched = (Patches(cubes, PatchOptions(size=16, augment=a, buffer=3)) for a in (True, False))
        try:
            fitted = fit(network, patches, options, validation=watched, folder=folder)
        except InterruptedError:
            continue
    return fitted


def test_an_interrupted_run_ends_at_the_same_bits(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_in_pieces(tmp_path / "whole", (), monkeypatch)
    pieces = run_in_pieces(tmp_path / "pieces", (2, 4, 10), monkeypatch)
    assert len(pieces.losses) == 3  # the last piece began at step 9
    assert pieces.losses == whole.losses[-3:]
    assert all(torch.equal(a, b) for a, b in zip(weights_of(whole), weights_of(pieces), strict=True))
    assert not torch.equal(weights_of(whole)[0], next(iter(whole.network.state_dict().values())))  # it is an average
    assert pieces.rmse == whole.rmse
    assert "rmse" in (tmp_path / "whole" / "log" / "metrics.csv").read_text()
    assert (tmp_path / "whole" / "pictures" / "step_000010.png").exists()


TWO_PROCESSES = """
import sys
from pathlib import Path
from typing import Any

import torch
from test_fit import simulated_cube
from xr_ginet.network import GINet, GINetConfig
from xr_ginet.training.fit import Fitting, FitOptions, fit
from xr_ginet.training.patches import Patches, PatchOptions

folder, stop = Path(sys.argv[1]), int(sys.argv[2])
step = Fitting.training_step

def stopping(self, batch, index):
    if self.global_step == stop:
        raise InterruptedError
    return step(self, batch, index)

Fitting.training_step = stopping
torch.manual_seed(0)
network = GINet(GINetConfig(n_features=4, n_stages=1, assignment="hard"))
patches = Patches([simulated_cube(64, 1), simulated_cube(64, 2)], PatchOptions(size=16, buffer=3))
options = FitOptions(
    steps=6, warm_up=2, save_every=2, averaging=0.8, learn_clusters=False, devices=2, batch_size=2,
    accelerator="cpu", threads=1,
)
fitted = fit(network, patches, options, folder=folder)
rank = torch.distributed.get_rank()
torch.save({"weights": fitted.result().state_dict(), "losses": fitted.losses}, folder / f"rank{rank}.pt")
"""


@pytest.mark.slow  # three runs of two processes, each of which imports torch
def test_two_processes_share_the_data_and_go_on_at_the_same_bits(tmp_path) -> None:
    script = tmp_path / "script.py"
    script.write_text(TWO_PROCESSES)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}

    def run(folder: str, stop: int) -> int:
        command = [sys.executable, str(script), str(tmp_path / folder), str(stop)]
        return subprocess.run(command, env=environment, capture_output=True, check=False).returncode

    assert run("whole", -1) == 0
    assert run("pieces", 4) != 0
    assert run("pieces", -1) == 0
    whole, pieces = (
        [torch.load(tmp_path / folder / f"rank{rank}.pt") for rank in (0, 1)] for folder in ("whole", "pieces")
    )
    assert whole[0]["losses"] != whole[1]["losses"]  # each process has patches of its own
    for rank in (0, 1):
        assert pieces[rank]["losses"] == whole[rank]["losses"][4:]
        for name, value in whole[0]["weights"].items():
            assert torch.equal(whole[rank]["weights"][name], value)
            assert torch.equal(pieces[rank]["weights"][name], value)


def test_a_run_with_other_options_is_not_gone_on_with(tmp_path) -> None:
    for options, match in (
        ({}, None),
        ({"learning_rate": 1e-2}, "had {'learning_rate': 0.0007}, and {'learning_rate': 0.01} is asked"),
    ):
        patches = Patches([simulated_cube(48)], PatchOptions(size=24))
        network = GINet(GINetConfig(n_features=4, n_stages=1))
        fitting = FitOptions(steps=2, save_every=1, **CPU | options)
        if match is None:
            fit(network, patches, fitting, folder=tmp_path)
        else:
            with pytest.raises(ValueError, match=match):
                fit(network, patches, fitting, folder=tmp_path)


OTHERWISE = {"precision": "bf16-mixed", "accelerator": "gpu", "log": "tensorboard", "threads": 7}


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(FitOptions)])
def test_every_option_but_the_threads_must_be_that_of_the_run_that_is_gone_on_with(name: str) -> None:
    before = FitOptions()
    value = getattr(before, name)
    other = OTHERWISE.get(name, not value if isinstance(value, bool) else value / 2 if isinstance(value, float) else 9)
    now = dataclasses.replace(before, **{name: other})
    network = GINet(GINetConfig(n_features=4, n_stages=1))
    saved: dict[str, Any] = {}
    Fitting(network, before).on_save_checkpoint(saved)
    if name == "threads":
        Fitting(network, now).on_load_checkpoint(saved)
        return
    with pytest.raises(ValueError, match=rf"the run to go on with had {{'{name}': .*}}, and {{'{name}': .*}} is asked"):
        Fitting(network, now).on_load_checkpoint(saved)


def test_mixed_precision_learns_too() -> None:
    torch.manual_seed(0)
    patches = Patches([simulated_cube(48)], PatchOptions(size=24, augment=False))
    network = GINet(GINetConfig(n_features=6, n_stages=1, assignment="soft"))
    start_near_bicubic(network)
    options = FitOptions(steps=40, learning_rate=2e-3, warm_up=5, averaging=0.9, precision="bf16-mixed", **CPU)
    fitted = fit(network, patches, options)
    assert fitted.losses[-1] < 0.95 * fitted.losses[0]
    assert next(network.parameters()).dtype == torch.float32


def test_a_picture_shows_its_images_side_by_side(tmp_path) -> None:
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning

    left, right = np.zeros((3, 4, 5)), np.ones((3, 4, 5)) * np.linspace(0, 1, 5)
    write_picture(tmp_path / "new" / "p.png", [left, right])
    with pytest.warns(NotGeoreferencedWarning), rasterio.open(tmp_path / "new" / "p.png") as file:
        pixels = file.read()
    assert pixels.shape == (3, 4, 10)
    assert (pixels[..., :5] == 0).all()
    assert (np.diff(pixels[0, 0, 5:].astype(int)) > 50).all()


def test_fit_options_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="steps=0: must be at least 1"):
        FitOptions(steps=0)
    with pytest.raises(ValueError, match="averaging=1: must be at least 0 and below 1"):
        FitOptions(averaging=1)
    with pytest.raises(ValueError, match="share=0: must be above 0 and at most 1"):
        FitOptions(share=0)


def test_adapted_weights_are_an_ordinary_checkpoint_and_fit_better(checkpoint: Checkpoint, tmp_path) -> None:
    cube = simulated_cube().assign_attrs(source_items=["simulated"])
    options = PatchOptions(size=16, seed=3)
    adapted = cube.ginet.adapt(
        tmp_path / "mine.safetensors", weights=checkpoint.path, steps=40, learning_rate=2e-3, options=options
    )
    assert adapted.card["adapted_from"] == {"name": "random", "sha256": checkpoint.sha256, "card": {}}
    assert adapted.card["degradation"] == "mtf"
    assert adapted.card["adapted_on"] == ["simulated"]
    assert adapted.config == checkpoint.config
    [sample] = Patches([cube], PatchOptions(size=64, augment=False))
    errors = [
        relative_error(c.network()(sample.ms[None], sample.hs[None]), sample.truth[None], sample.hs[None]).item()
        for c in (checkpoint, load_checkpoint(adapted.path))
    ]
    assert errors[1] < 0.8 * errors[0]
    result = cube.ginet.superresolve(weights=adapted)
    assert result.attrs["ginet_weights"] == "mine"


def test_a_cube_without_a_valid_patch_is_refused(checkpoint: Checkpoint, tmp_path) -> None:
    cube = two_grids((16, 16)) * np.nan
    with pytest.raises(ValueError, match="no patch of 8 pixels at 20 m is free of missing"):
        cube.ginet.adapt(tmp_path / "x.safetensors", weights=checkpoint.path, options=PatchOptions(size=8))


def test_adapt_refuses_before_it_works(checkpoint: Checkpoint, tmp_path) -> None:
    cube = simulated_cube(48)
    sixty = random_checkpoint(tmp_path / "two.safetensors", bands=("B01", "B09"))
    wild = {"learning_rate": 1e30, "steps": 9, "options": PatchOptions(size=8)}
    for arguments, error, match in (
        ({"steps": 0}, ValueError, "steps=0: must be at least 1"),
        ({"path": tmp_path / "nowhere" / "x.safetensors"}, FileNotFoundError, "no folder .*nowhere"),
        (
            {"weights": sixty, "options": PatchOptions(size=8)},
            ValueError,
            "for B01, B09 and factor 2; patches are of B05",
        ),
        (wild, ValueError, "the loss is .* nothing was written"),
    ):
        with pytest.raises(error, match=match):
            cube.ginet.adapt(**{"path": tmp_path / "x.safetensors", "weights": checkpoint.path} | arguments)
    assert not (tmp_path / "x.safetensors").exists()


def test_the_state_of_a_run_is_the_old_one_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, state = tmp_path / "last.ckpt", _StateFile()
    state.save_checkpoint({"step": 1}, path)

    def killed(content: object, file: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            state.save_checkpoint({"step": 2}, path)
    assert state.load_checkpoint(path, weights_only=True) == {"step": 1}
    (tmp_path / f".last.ckpt.{'0' * 32}.part").write_bytes(b"half")
    state.save_checkpoint({"step": 2}, path)
    assert state.load_checkpoint(path, weights_only=True) == {"step": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"last.ckpt is no state that a run can go on with .* Delete it"):
        state.load_checkpoint(path, weights_only=True)
