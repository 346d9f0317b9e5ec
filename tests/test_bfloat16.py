"""Residual blocks in bfloat16: what they round, against double precision that rounds alike, and what that costs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import needs_shared, random_checkpoint, real_scene
from torch import Tensor

import xr_ginet
from xr_ginet.mapping.predictor import Predictor
from xr_ginet.network import Checkpoint, bfloat16
from xr_ginet.network.bfloat16 import RoundedBlocks, in_bfloat16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return random_checkpoint(tmp_path_factory.mktemp("weights") / "random.safetensors", n_blocks=2)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_blocks_equal_double_precision_with_the_same_rounding(checkpoint: Checkpoint, kind: torch.dtype) -> None:
    def rounded(x: Tensor) -> Tensor:
        return x.bfloat16().double()

    def convolution(layer: torch.nn.Conv2d, x: Tensor) -> Tensor:
        return F.conv2d(rounded(x), rounded(layer.weight), rounded(layer.bias), padding=1)

    blocks = checkpoint.network().stages[1].correction.blocks
    torch.manual_seed(1)
    x = torch.randn(2, 16, 20, 28)
    expected = x.double()
    for block in blocks:
        expected = (rounded(convolution(block.conv_b, convolution(block.conv_a, expected).relu())) + expected).relu()
    with torch.inference_mode():
        got = RoundedBlocks(blocks, kind)(x.clone().contiguous(memory_format=torch.channels_last))
        plain = blocks(x.clone())
    apart = (got - expected).abs().flatten()
    assert apart.quantile(0.98) < 1e-5  # a number between two steps may fall to the other side
    assert apart.max() < (plain - got).abs().max()
    assert got.dtype == torch.float32


@pytest.mark.parametrize("faster", [False, True])
def test_processors_that_have_no_such_instructions_compute_the_same_function(
    checkpoint: Checkpoint, faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(2)
    ms, hs = 0.4 * torch.rand(1, 4, 48, 64), 0.4 * torch.rand(1, 6, 24, 32)
    monkeypatch.setattr(bfloat16, "is_faster", lambda: faster)
    with torch.inference_mode():
        here = in_bfloat16(checkpoint.network())(ms, hs)
        monkeypatch.setattr(bfloat16, "is_faster", lambda: not faster)
        there = in_bfloat16(checkpoint.network())(ms, hs)
        plain = checkpoint.network()(ms, hs)
    apart, lost = ((other - here).square().mean().sqrt() for other in (there, plain))
    assert 0 < lost < 1e-3
    assert apart < lost / 2


@needs_shared
def test_real_scenes_lose_nothing_that_counts_and_chunks_do_not_show_by_a_bit() -> None:
    fine, coarse = real_scene("rastertools_T30TYP")
    cube = xr_ginet.pair(fine.isel(y=slice(256), x=slice(256)), coarse.isel(y=slice(128), x=slice(128)), scale=1e-4)
    plain = cube.ginet.superresolve(weights="ginet-s", precision="float32")
    whole = cube.ginet.superresolve(weights="ginet-s", precision="bfloat16")
    chunked = cube.chunk(y=96, x=160, y_20m=48, x_20m=80).ginet.superresolve(weights="ginet-s", precision="bfloat16")
    assert whole.attrs["ginet_precision"] == "bfloat16"
    names = ["B05", "B8A", "B12"]
    plain, whole, chunked = (result[names].to_dataarray().values for result in (plain, whole, chunked))
    assert whole.dtype == np.float32
    assert 1e-5 < np.abs(whole - plain).max() < 1e-3
    assert np.sqrt(((whole - plain) ** 2).mean()) < 1e-4
    np.testing.assert_array_equal(chunked, whole)


@pytest.mark.parametrize(("faster", "precision"), [(True, "bfloat16"), (False, "float32")])
def test_auto_is_what_was_measured_to_be_faster(
    checkpoint: Checkpoint, faster: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bfloat16, "is_faster", lambda: faster)
    assert Predictor.of(checkpoint, device="cpu").precision == precision
    assert Predictor.of(checkpoint, device="cpu", precision="float32").precision == "float32"
    assert Predictor.of(checkpoint, device="cuda", elsewhere=True).precision == "mixed"


def test_it_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    bfloat16.is_faster.cache_clear()
    measured = []
    monkeypatch.setattr(bfloat16, "_seconds", lambda x, _: measured.append(x.dtype) or (2.0, 1.0)[len(measured) > 5])
    try:
        assert bfloat16.is_faster()
        assert bfloat16.is_faster()
        assert measured == [torch.float32] * 5 + [torch.bfloat16] * 5
    finally:
        bfloat16.is_faster.cache_clear()


def test_other_devices_are_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(ValueError, match="precision='bfloat16' with device='cuda:0': it is for processors"):
        Predictor.of(checkpoint, device="cuda:0", precision="bfloat16", elsewhere=True)
