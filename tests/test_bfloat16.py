"""Residual blocks in bfloat16: what they round, against double precision that rounds alike, and what that costs."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import needs_shared, random_checkpoint, real_scene
from torch import Tensor

import xr_ginet
from xr_ginet.mapping.predictor import Predictor, _network
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


def test_processors_that_have_no_such_instructions_compute_the_same_function(checkpoint: Checkpoint) -> None:
    torch.manual_seed(2)
    ms, hs = 0.4 * torch.rand(1, 4, 48, 64), 0.4 * torch.rand(1, 6, 24, 32)
    with torch.inference_mode():
        here, there = (in_bfloat16(checkpoint.network(), kind)(ms, hs) for kind in (torch.bfloat16, torch.float32))
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
def test_auto_is_what_is_faster_here_unless_somebody_chose(
    checkpoint: Checkpoint, faster: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bfloat16, "is_faster", lambda: faster)
    assert Predictor.of(checkpoint, device="cpu").precision == precision
    assert Predictor.of(checkpoint, device="cpu", precision="float32").precision == "float32"
    assert Predictor.of(checkpoint, device="cpu", precision="bfloat16").precision == "bfloat16"
    assert Predictor.of(checkpoint, device="cuda", elsewhere=True).precision == "mixed"


@pytest.mark.parametrize("here", [True, False])
def test_what_a_worker_multiplies_was_decided_where_the_graph_was_built(
    checkpoint: Checkpoint, here: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(bfloat16, "is_faster", lambda: here)
    predictor = Predictor.of(checkpoint, precision="bfloat16")
    monkeypatch.setattr(bfloat16, "is_faster", lambda: not here)  # the worker's processor
    _network.cache_clear()
    block = np.full((4, 32, 32), 0.1, "float32"), np.full((6, 16, 16), 0.2, "float32")
    pickle.loads(pickle.dumps(predictor))(*block)
    network = _network(predictor.path, predictor.sha256, "cpu", "bfloat16", predictor.multiplied)
    assert _network.cache_info().misses == 1  # this is the one that has computed
    assert {blocks.kind for blocks in network.modules() if isinstance(blocks, RoundedBlocks)} == {
        torch.bfloat16 if here else torch.float32
    }
    assert ("multiplies bfloat16 slowly" in caplog.text) == here
    _network.cache_clear()


ZEN4 = "fma avx2 avx512f avx512bw avx512_vnni avx512_bf16"
SAPPHIRE_RAPIDS = f"{ZEN4} amx_tile amx_bf16 amx_int8 avx512_fp16"


@pytest.mark.parametrize(
    ("vendor", "instructions", "limit", "expected"),
    [
        ("GenuineIntel", SAPPHIRE_RAPIDS, "", True),
        ("GenuineIntel", SAPPHIRE_RAPIDS, "DEFAULT", True),
        ("GenuineIntel", SAPPHIRE_RAPIDS, "AVX512_CORE_AMX", True),
        ("GenuineIntel", SAPPHIRE_RAPIDS, "AVX512_CORE_FP16", False),
        ("GenuineIntel", SAPPHIRE_RAPIDS, "AVX2", False),
        ("GenuineIntel", ZEN4, "", False),  # AMX hidden by a virtual machine
        ("AuthenticAMD", ZEN4, "", True),
        ("AuthenticAMD", ZEN4, "AVX512_CORE_BF16", True),
        ("AuthenticAMD", ZEN4, "AVX512_CORE", False),
        ("AuthenticAMD", ZEN4.replace("avx512_bf16", ""), "", False),
        ("", "", "", False),
    ],
)
def test_what_is_faster_is_told_by_the_processors_instructions(
    vendor: str, instructions: str, limit: str, expected: bool
) -> None:
    assert bfloat16.multiplies_faster(vendor, frozenset(instructions.split()), limit) is expected


@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_instructions_that_onednn_may_not_use_do_not_count(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat16, "_processor", lambda: ("AuthenticAMD", frozenset(ZEN4.split())))
    for other in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(other, raising=False)
    assert bfloat16.is_faster.__wrapped__()
    monkeypatch.setenv(name, "avx2")
    assert not bfloat16.is_faster.__wrapped__()


def test_no_clock_decides_what_is_computed() -> None:
    package = Path(bfloat16.__file__).parents[1]
    modules = [path for folder in ("network", "mapping", "sentinel2") for path in (package / folder).glob("*.py")]
    assert len(modules) > 20
    clocks = r"perf_counter|monotonic|process_time|\btime\.time\b|timeit"
    read = {path.name for path in modules if re.search(clocks, path.read_text(encoding="utf-8"))}
    assert read <= {"search.py"}  # a catalogue that takes too long is an error


def test_other_devices_are_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(ValueError, match="precision='bfloat16' with device='cuda:0': it is for processors"):
        Predictor.of(checkpoint, device="cuda:0", precision="bfloat16", elsewhere=True)
