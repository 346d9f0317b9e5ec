"""Fitting: the loss, one patch learned by heart, adaptation to a cube."""

from __future__ import annotations

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
from xr_ginet.training.fit import Fit, relative_error
from xr_ginet.training.patches import Patches, PatchOptions, Sample


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


def test_one_patch_is_learned_by_heart() -> None:
    torch.manual_seed(0)
    [sample] = Patches([simulated_cube(48)], PatchOptions(size=24, augment=False))
    batch = Sample(*(image[None] for image in sample))
    fit = Fit(GINet(GINetConfig(n_features=6, n_stages=1, assignment="soft")), learning_rate=3e-3, averaging=0.9)
    losses = [fit.step(batch, rate=min(1, (i + 1) / 30)) for i in range(250)]
    assert losses[-1] < 0.5 * min(losses[0], 2)
    gradients = {name: p.grad for name, p in fit.network.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    assert any(gradients[name].abs().max() > 0 for name in gradients if "classify" in name)  # the clustering learns


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    fit = Fit(GINet(GINetConfig(n_features=4, n_stages=1)), learning_rate=1e-2, averaging=0.9)
    before = [p.clone() for p in fit.network.parameters()]
    fit.step(Sample(torch.full((1, 4, 8, 8), torch.nan), torch.rand(1, 6, 4, 4), torch.rand(1, 6, 8, 8)), rate=1)
    for old, new in zip(before, fit.network.parameters(), strict=True):
        assert_allclose(old.detach(), new.detach())


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
        ({"weights": sixty}, ValueError, "for B01, B09 and factor 2"),
        (wild, ValueError, "the loss is .* nothing was written"),
    ):
        with pytest.raises(error, match=match):
            cube.ginet.adapt(**{"path": tmp_path / "x.safetensors", "weights": checkpoint.path} | arguments)
    assert not (tmp_path / "x.safetensors").exists()
