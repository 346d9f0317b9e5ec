"""Residual blocks in 8 bits: what they round, against double precision that rounds alike, and what that costs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import needs_shared, random_checkpoint, real_scene
from torch import Tensor, nn

import xr_ginet
from xr_ginet.mapping.predictor import Predictor
from xr_ginet.network import Checkpoint, load_checkpoint, save_checkpoint
from xr_ginet.network.eight_bits import MARGIN, EightBitBlocks, activation_ranges, in_eight_bits, ranges_of


def images(seed: int = 0, scale: float = 0.4) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return scale * torch.rand(1, 4, 48, 64), scale * torch.rand(1, 6, 24, 32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Return a network with random weights and the ranges of its activations on a random image."""
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    network = random_checkpoint(path, n_blocks=2).network().float()
    return save_checkpoint(path, network, {"ranges": activation_ranges(network, [images()]).tolist()})


def test_blocks_equal_double_precision_with_the_same_rounding(checkpoint: Checkpoint) -> None:
    def convolution(layer: nn.Conv2d, x: Tensor, before: Tensor, after: Tensor) -> Tensor:
        weight = layer.weight * before[:, None, None] / after[:, None, None, None]
        scale = weight.abs().amax((1, 2, 3), keepdim=True) / 63
        rounded = (weight / scale).round().double() * scale.double()
        return F.conv2d(x, rounded, layer.bias.double() / after, padding=1)

    blocks, ranges = checkpoint.network().stages[1].correction.blocks, ranges_of(checkpoint)[1]
    torch.manual_seed(1)
    x = torch.randn(2, 16, 20, 28) * ranges[0, 0, :, None, None]  # some of it beyond the range
    expected = x.double()
    for number, (block, largest) in enumerate(zip(blocks, ranges, strict=True)):
        outer, inner = MARGIN * largest.clamp(min=1e-6)
        steps, low, high = (255, 0, 255) if number else (127, -128, 127)
        rounded = (expected.float() * (steps / outer[:, None, None])).round().clamp(low, high).double() / steps
        y = convolution(block.conv_a, rounded, outer, inner).relu()
        y = (y * 255).round().clamp(0, 255) / 255
        expected = (convolution(block.conv_b, y, inner, torch.ones(16)) + expected).relu()
    with torch.inference_mode():
        got = EightBitBlocks(blocks, ranges)(x.clone().contiguous(memory_format=torch.channels_last))
        plain = blocks(x.clone())
    apart = (got - expected).abs().flatten()
    assert apart.quantile(0.999) < 1e-5  # a number between two steps may fall to the other side
    assert apart.max() < (plain - got).abs().max() / 3


def test_ranges_are_the_largest_magnitudes_over_all_images(checkpoint: Checkpoint) -> None:
    network = checkpoint.network()
    one, other, both = (
        activation_ranges(network, i) for i in ([images(1)], [images(2, 0.8)], [images(1), images(2, 0.8)])
    )
    assert torch.equal(both, torch.maximum(one, other))
    assert not torch.equal(one, both)
    assert (one > 0).any(-1).all()
    seen = []
    hook = network.stages[0].correction.blocks[1].register_forward_pre_hook(lambda _, x: seen.append(x[0].clone()))
    with torch.inference_mode():
        network(*images(1))
    hook.remove()
    assert torch.equal(one[0, 1, 0], seen[0].abs().amax((0, 2, 3)))


def test_ranges_that_are_too_small_would_show(checkpoint: Checkpoint) -> None:
    with torch.inference_mode():
        plain = checkpoint.network()(*images())
        fit, narrow = (
            (in_eight_bits(checkpoint.network(), ranges_of(checkpoint) * factor)(*images()) - plain).abs().max()
            for factor in (1, 0.2)
        )
    assert 0 < fit < narrow / 3


@needs_shared
def test_real_scenes_lose_little_and_chunks_show_no_more_than_rounding() -> None:
    fine, coarse = real_scene("rastertools_T30TYP")
    cube = xr_ginet.pair(fine.isel(y=slice(256), x=slice(256)), coarse.isel(y=slice(128), x=slice(128)), scale=1e-4)
    plain = cube.ginet.superresolve(weights="ginet-s")
    whole = cube.ginet.superresolve(weights="ginet-s", precision="int8")
    chunked = cube.chunk(y=96, x=160, y_20m=48, x_20m=80).ginet.superresolve(weights="ginet-s", precision="int8")
    assert whole.attrs["ginet_precision"] == "int8"
    names = ["B05", "B8A", "B12"]
    plain, whole, chunked = (result[names].to_dataarray().values for result in (plain, whole, chunked))
    assert whole.dtype == np.float32
    assert 1e-5 < np.abs(whole - plain).max() < 1e-2
    assert np.sqrt(((whole - plain) ** 2).mean()) < 1e-3
    assert np.sqrt(((chunked - whole) ** 2).mean()) < np.sqrt(((whole - plain) ** 2).mean()) / 5


@pytest.mark.parametrize(
    ("ranges", "match"),
    [
        (None, "needs the ranges of activations, and .* holds none. Type precision='float32'"),
        ([[1.0]], "holds none of this network"),
        ([[1.0], [1.0, 2.0]], "holds none of this network"),
        ("all", "holds none of this network"),
        (np.full((2, 3, 2, 16), np.nan).tolist(), "holds none of this network"),
        (np.full((2, 3, 2, 16), -1.0).tolist(), "holds none of this network"),
    ],
    ids=["none", "other shape", "ragged", "text", "nan", "negative"],
)
def test_weights_without_ranges_are_refused(ranges: object, match: str, tmp_path: Path) -> None:
    network = random_checkpoint(tmp_path / "random.safetensors").network()
    card = {} if ranges is None else {"ranges": ranges}
    with pytest.raises(ValueError, match=match):
        Predictor.of(save_checkpoint(tmp_path / "w.safetensors", network, card), device="cpu", precision="int8")


def test_other_devices_are_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(ValueError, match="precision='int8' with device='cuda:0': 8 bits are for processors"):
        Predictor.of(checkpoint, device="cuda:0", precision="int8", elsewhere=True)


def test_a_torch_without_onednn_says_so(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(ValueError, match="precision='int8', but this torch has no oneDNN"):
        Predictor.of(checkpoint, device="cpu", precision="int8")


@pytest.mark.parametrize("name", ["ginet-s", "ginet-s-box"])
def test_packaged_weights_have_ranges(name: str) -> None:
    assert (ranges_of(load_checkpoint(name)).amax(-1) > 0).all()
