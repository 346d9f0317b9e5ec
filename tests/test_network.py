"""The network against its specification: attention by hand, the literal oracle, the radius, checkpoints, errors.

Everything runs in float64 unless a test says otherwise. θ and φ are scaled up 12 times wherever attention is compared:
at default initialisation it is nearly uniform, and most mistakes would pass.
"""

import argparse
import copy
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SHARED, needs_cuda, needs_shared, packaged_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from literal_ginet import LiteralAttention, LiteralGINet
from safetensors.torch import save_file
from torch import Tensor, nn

from xr_ginet.network import (
    GINet,
    GINetConfig,
    attention,
    attention_cpu,
    attention_cpu_grad,
    attention_grad,
    from_authors,
    load_checkpoint,
    save_checkpoint,
)
from xr_ginet.network.attention import Head, WindowAttention, triton_works, window_logits, window_sum
from xr_ginet.network.mixed import MixedCorrection, mix

SMALL: dict[str, Any] = {"stages": 2, "features": 6, "clusters": 3, "blocks": 2}


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    """Make float64 the default and seed the generator."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def sharpen(network: nn.Module) -> None:
    """Scale θ and φ up, so that attention is far from uniform."""
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "theta" in name or "phi" in name:
                weight *= 12


def images(
    height: int, width: int, *, bands: int = 6, factor: int = 2, external: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return two random ``ms`` and ``hs`` and, where asked for, guides."""
    ms, hs = torch.rand(2, 4, height, width), torch.rand(2, bands, height // factor, width // factor)
    return ms, hs, torch.rand(2, bands, height, width) if external else None


def literal_ginet(ms: Tensor, **options: Any) -> LiteralGINet:
    """Return the oracle with sharp attention and with clusters that all occur in ``ms``."""
    network = LiteralGINet(**options)
    sharpen(network)
    with torch.no_grad():
        network.clustering_cnn[4].bias -= network.clustering_cnn[:5](ms).mean((0, 2, 3))
    return network


def relative_error(ours: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a share of the largest value."""
    return float((ours - expected).abs().max() / expected.abs().max())


def everywhere_inside(size: int, window_size: int, *, like: Tensor) -> Tensor:
    """Stand in for the mask of window positions, and let all of them pass."""
    return like.new_ones(window_size, size)


# Attention, by hand.

THETA = torch.tensor([[[[1.0, 2, 3], [4, 5, 6]]]], dtype=torch.float64)
PHI = torch.tensor([[[[1.0, 0, 2], [0, 1, 3]]]], dtype=torch.float64)
LOGITS = torch.tensor(
    [
        [[0, 0, 0], [0, 5, 5]],  # the upper left neighbour: outside the image for the first row and column
        [[0, 0, 0], [4, 16, 12]],
        [[0, 0, 0], [10, 10, 0]],
        [[0, 8, 8], [0, 8, 8]],
        [[6, 30, 29], [6, 30, 29]],  # the pixel itself: 1·1 + 2·0 + 4·0 + 5·1 = 6
        [[23, 23, 0], [23, 23, 0]],
        [[0, 3, 3], [0, 0, 0]],
        [[2, 11, 11], [0, 0, 0]],
        [[7, 7, 0], [0, 0, 0]],
    ],
    dtype=torch.float64,
)


def test_logits_are_the_inner_products_of_patches() -> None:
    torch.testing.assert_close(window_logits(THETA, PHI, window_size=3, patch_size=3), LOGITS[None])


def test_a_position_outside_the_image_has_logit_zero_even_where_its_patch_reaches_inside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left_of_the_corner = (0, 3, 0, 0)
    assert window_logits(THETA, PHI, window_size=3, patch_size=3)[left_of_the_corner] == 0
    monkeypatch.setattr(attention, "_inside", everywhere_inside)
    assert window_logits(THETA, PHI, window_size=3, patch_size=3)[left_of_the_corner] == 2  # 2·1 + 5·0


@pytest.mark.parametrize(("window_size", "patch_size"), [(5, 3), (3, 5), (3, 1), (7, 3), (1, 3)])
def test_logits_equal_explicit_loops_over_window_patch_and_channel(window_size: int, patch_size: int) -> None:
    theta, phi = torch.randn(2, 2, 3, 4)
    window, patch = (range(-(size // 2), size // 2 + 1) for size in (window_size, patch_size))

    def inside(y: int, x: int) -> bool:
        return 0 <= y < 3 and 0 <= x < 4

    expected = torch.zeros(window_size**2, 3, 4)
    for position, (dy, dx) in enumerate(itertools.product(window, window)):
        for y, x in itertools.product(range(3), range(4)):
            for a, b in itertools.product(patch, patch):
                if inside(y + dy, x + dx) and inside(y + a, x + b) and inside(y + dy + a, x + dx + b):
                    expected[position, y, x] += theta[:, y + a, x + b] @ phi[:, y + dy + a, x + dx + b]
    ours = window_logits(theta[None], phi[None], window_size=window_size, patch_size=patch_size)[0]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-13)


def test_the_window_sum_weighs_the_values_of_the_window() -> None:
    weights = torch.arange(1.0, 10)[None, :, None, None].expand(1, 9, 2, 3)
    expected = torch.tensor([[94.0, 154, 106], [58, 91, 58]])  # first: 5·1 + 6·2 + 8·4 + 9·5
    ours = window_sum(weights, torch.cat([THETA, 2 * THETA], 1), window_size=3)
    torch.testing.assert_close(ours, torch.stack([expected, 2 * expected])[None])


def test_positions_outside_the_image_take_part_in_the_softmax() -> None:
    head = Head(1, 1, window_size=3, patch_size=3)
    nn.init.zeros_(head.theta.weight)
    nn.init.ones_(head.value.weight)
    ones = torch.ones(1, 1, 3, 4)
    expected = torch.tensor([[4.0, 6, 6, 4], [6, 9, 9, 6], [4, 6, 6, 4]]) / 9
    torch.testing.assert_close(head(ones, ones)[0, 0], expected)


def test_heads_are_combined_in_the_order_geometric_spectral_mixed() -> None:
    module = WindowAttention(1, 1, window_size=1, patch_size=1)  # a window of one pixel: each head is its value
    with torch.no_grad():
        for head, value in ((module.geometric, 2.0), (module.spectral, 3.0), (module.mixed, 5.0)):
            head.value.weight.fill_(value)
        module.combine.weight.copy_(torch.tensor([[1.0, 10, 100]]))
        module.combine.bias.fill_(0.5)
    x = torch.tensor([[[[1.0, 2], [3, 4]]]])
    torch.testing.assert_close(module(x, torch.rand(1, 1, 2, 2)), 532 * x + 0.5)


# Attention against the oracle.


def attention_pair(x: int, y: int, *, window: int, patch: int) -> tuple[WindowAttention, LiteralAttention]:
    """Return our attention and the literal one with the same, sharp weights."""
    literal = LiteralAttention(x, y, patch, window)
    sharpen(literal)
    ours = WindowAttention(x, y, window_size=window, patch_size=patch)
    renamed = {"mix_head": "mixed", "_head": "", "spatial_weights.": "", ".g.": ".value.", "mlp": "combine"}
    state = {}
    for key, tensor in literal.state_dict().items():
        for theirs, name in renamed.items():
            key = key.replace(theirs, name)
        state[key] = tensor
    ours.load_state_dict(state)
    return ours, literal


ANY_SHAPE = {
    "shape": st.tuples(st.integers(1, 2), st.integers(1, 13), st.integers(1, 13)),
    "channels": st.tuples(st.integers(1, 4), st.integers(1, 3)),
    "window": st.sampled_from([1, 3, 5, 7]),
    "patch": st.sampled_from([1, 3, 5]),
}


@settings(max_examples=30, deadline=None, derandomize=True)
@given(**ANY_SHAPE)
def test_attention_equals_unfolded_patches_for_any_shape(
    shape: tuple[int, int, int], channels: tuple[int, int], window: int, patch: int
) -> None:
    ours, literal = attention_pair(*channels, window=window, patch=patch)
    n, *size = shape
    x, y = torch.randn(n, channels[0], *size), torch.randn(n, channels[1], *size)
    torch.testing.assert_close(ours(x, y), literal(x, y), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_attention_survives_logits_that_overflow_an_exponential(scale: float) -> None:
    ours, literal = attention_pair(3, 2, window=5, patch=3)
    with torch.no_grad():
        ours.mixed.theta.weight *= scale
        literal.mix_head.spatial_weights["theta"].weight *= scale
    x, y = torch.randn(1, 3, 7, 9), torch.randn(1, 2, 7, 9)
    theta, phi = (conv(torch.cat([x, y], 1)) for conv in (ours.mixed.theta, ours.mixed.phi))
    assert window_logits(theta, phi, window_size=5, patch_size=3).max() > 1000
    torch.testing.assert_close(ours(x, y), literal(x, y), rtol=1e-12, atol=1e-12)


def test_attention_passes_gradcheck_in_inputs_and_weights() -> None:
    module = WindowAttention(2, 1, window_size=3, patch_size=3)
    names, weights = zip(*module.named_parameters(), strict=True)

    def function(x: Tensor, y: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x, y))

    x, y = torch.randn(1, 2, 3, 4, requires_grad=True), torch.randn(1, 1, 3, 4, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, y, *weights))


# The compiled form: float32, without gradients.


@settings(max_examples=60, deadline=None, derandomize=True)
@given(**ANY_SHAPE, threads=st.integers(1, 3))
def test_compiled_attention_equals_unfolded_patches_for_any_shape(
    shape: tuple[int, int, int], channels: tuple[int, int], window: int, patch: int, threads: int
) -> None:
    ours, literal = attention_pair(*channels, window=window, patch=patch)
    n, *size = shape
    x, y = torch.randn(n, channels[0], *size) / 4, torch.randn(n, channels[1], *size) / 4
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    with torch.no_grad():
        compiled = ours.float()(x.float(), y.float())
    torch.set_num_threads(before)
    assert compiled.dtype == torch.float32
    torch.testing.assert_close(compiled.double(), literal(x, y), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (4, 3), (64, 5), (5, 64)])
def test_compiled_attention_does_not_depend_on_the_parts_by_a_bit(
    rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    frame = ((0, 0), (0, 0), (3, 3), (3, 3))
    keys, values = (np.pad(rng.standard_normal((2, c, 11, 13)).astype("float32"), frame) for c in (3, 2))
    matrices = [rng.standard_normal((c, c)).astype("float32") for c in (3, 2)]
    whole, parts = np.ones((2, 2, 2, 11, 13), "float32")
    attention_cpu.attend(whole, keys, values, *matrices, margin=3, window_size=5, patch_size=3, threads=1)
    monkeypatch.setattr(attention_cpu, "ROWS", rows)
    monkeypatch.setattr(attention_cpu, "COLUMNS", columns)
    attention_cpu.attend(parts, keys, values, *matrices, margin=3, window_size=5, patch_size=3, threads=3)
    np.testing.assert_array_equal(parts, whole)
    assert len(np.unique(whole)) > 500


def test_compiled_attention_does_not_depend_on_where_a_pixel_lies_by_a_bit() -> None:
    ours, _ = attention_pair(3, 2, window=5, patch=3)
    ours.float()
    x, y = torch.randn(1, 3, 40, 50, dtype=torch.float32), torch.randn(1, 2, 40, 50, dtype=torch.float32)
    with torch.no_grad():
        whole = ours(x, y)[..., 11:29, 12:37]
        for top, left in itertools.product(range(4), range(3)):
            part = ours(x[..., 4 + top : 36, 5 + left : 44], y[..., 4 + top : 36, 5 + left : 44])
            assert torch.equal(part[..., 7 - top : 25 - top, 7 - left : 32 - left], whole)


def test_compiled_attention_survives_logits_that_overflow_an_exponential() -> None:
    ours, literal = attention_pair(3, 2, window=5, patch=3)
    x, y = torch.randn(1, 3, 7, 9) * 20, torch.randn(1, 2, 7, 9) * 20
    theta, phi = ours.mixed.theta(torch.cat([x, y], 1)), ours.mixed.phi(torch.cat([x, y], 1))
    assert window_logits(theta, phi, window_size=5, patch_size=3).max() > 1000
    with torch.no_grad():
        compiled = ours.float()(x.float(), y.float())
    torch.testing.assert_close(compiled.double(), literal(x, y), rtol=1e-3, atol=1e-3)


def test_a_missing_value_spreads_over_its_window_in_all_forms() -> None:
    ours, _ = attention_pair(2, 1, window=3, patch=3)
    ours.float()
    x, y = torch.randn(1, 2, 12, 12, dtype=torch.float32), torch.randn(1, 1, 12, 12, dtype=torch.float32)
    x[0, 1, 6, 7] = torch.nan
    with torch.no_grad():
        compiled = ours(x, y)
    with_gradient, plain = ours(x, y), ours.double()(x.double(), y.double())
    assert 9 <= plain.isnan().any(1).sum() < 100
    torch.testing.assert_close(compiled.isnan(), plain.isnan())
    torch.testing.assert_close(with_gradient.isnan(), plain.isnan())


# The compiled form with a gradient: float32.


def gradients(module: nn.Module, *images: Tensor) -> list[Tensor]:
    """Return the output, and the gradients of an uneven sum of it in the images and in the weights."""
    leaves = [image.clone().requires_grad_() for image in images]
    output = module(*leaves)
    slope = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).to(output.device)
    (output * slope.view_as(output)).sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves), *(p.grad for p in module.parameters())]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(**ANY_SHAPE, threads=st.integers(1, 3))
def test_compiled_gradients_equal_those_of_the_torch_form_for_any_shape(
    shape: tuple[int, int, int], channels: tuple[int, int], window: int, patch: int, threads: int
) -> None:
    ours, literal = attention_pair(*channels, window=window, patch=patch)
    n, *size = shape
    x, y = torch.randn(n, channels[0], *size) / 4, torch.randn(n, channels[1], *size) / 4
    exact = gradients(ours, x, y)
    for mine, theirs in zip(exact[:3], gradients(literal, x, y), strict=False):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    ours.zero_grad()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    compiled = gradients(ours.float(), x.float(), y.float())
    torch.set_num_threads(before)
    for mine, theirs in zip(compiled, exact, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - theirs).abs().max() <= 2e-5 * theirs.abs().max() + 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strips_change_neither_attention_nor_its_gradients(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = attention_pair(3, 2, window=5, patch=3)
    ours.to(dtype)
    x, y = torch.randn(2, 3, 17, 6, dtype=dtype), torch.randn(2, 2, 17, 6, dtype=dtype)
    whole = gradients(ours, x, y)
    ours.zero_grad()
    monkeypatch.setattr(attention, "STRIP_PIXELS", 4 * 2 * 6)  # rows of both images
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    for part, all_at_once in zip(gradients(ours, x, y), whole, strict=True):
        torch.testing.assert_close(part, all_at_once, rtol=tolerance, atol=tolerance)
    monkeypatch.setattr(ours, "reach", 2)  # one row less than windows and patches together
    assert (ours(x, y) - whole[0]).abs().max() > 1e-3


def test_compiled_gradients_do_not_depend_on_the_threads_by_a_bit() -> None:
    ours, _ = attention_pair(3, 2, window=5, patch=3)
    x, y = torch.randn(3, 3, 11, 13).float(), torch.randn(3, 2, 11, 13).float()
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        ours.float().zero_grad()
        torch.set_num_threads(threads)
        results.append(gradients(ours, x, y)[:3])  # torch sums up the weights' own
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))
    assert len(results[0][1].unique()) > 1000


def test_compiled_gradients_survive_logits_that_overflow_an_exponential() -> None:
    ours, literal = attention_pair(3, 2, window=5, patch=3)
    x, y = torch.randn(1, 3, 7, 9) * 20, torch.randn(1, 2, 7, 9) * 20
    exact = gradients(literal, x, y)[:3]
    for mine, theirs in zip(gradients(ours.float(), x.float(), y.float()), exact, strict=False):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-3, atol=1e-3)
    assert exact[1].abs().max() > 1


def test_compiled_gradients_work_in_float32_within_mixed_precision() -> None:
    ours, _ = attention_pair(3, 2, window=5, patch=3)
    ours.float()
    x, y = torch.randn(2, 3, 9, 8).float(), torch.randn(2, 2, 9, 8).float()
    expected = gradients(ours, x.bfloat16().float(), y.bfloat16().float())
    ours.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = gradients(ours, x.bfloat16(), y.bfloat16())
    assert mixed[0].dtype == torch.bfloat16
    assert relative_error(mixed[0].float(), expected[0]) < 2**-8  # of the output's own rounding
    for mine, theirs in zip(mixed[3:], expected[3:], strict=True):
        assert mine.dtype == torch.float32
        assert relative_error(mine, theirs) < 2**-7


def test_compiled_gradients_are_seen_by_torchs_transforms_once() -> None:
    ours, _ = attention_pair(2, 1, window=3, patch=3)
    ours.float()
    x, y = torch.randn(1, 2, 5, 6).float(), torch.randn(1, 1, 5, 6).float()
    leaf = x.clone().requires_grad_()
    ours(leaf, y).square().sum().backward()
    torch.testing.assert_close(torch.func.grad(lambda x: ours(x, y).square().sum())(x), leaf.grad)
    (first,) = torch.autograd.grad(ours(leaf, y).square().sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"no second derivative in float32: type network\.double\(\)"):
        first.sum().backward()


# The form for GPUs: by Triton's interpreter where there is none, with larger programs, as each takes time there.


@pytest.fixture
def large_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    from xr_ginet.network import attention_gpu, attention_gpu_grad

    monkeypatch.setattr(attention_gpu, "COLUMNS", 8)
    monkeypatch.setattr(attention_gpu, "EMBEDDED", (16, 8))
    monkeypatch.setattr(attention_gpu_grad, "LANES", 32)


@pytest.mark.usefixtures("large_programs")
@pytest.mark.parametrize(("window", "patch", "channels_last"), [(1, 1, False), (5, 3, False), (3, 5, True)])
def test_attention_for_gpus_equals_unfolded_patches(window: int, patch: int, channels_last: bool) -> None:
    ours, literal = attention_pair(3, 2, window=window, patch=patch)
    n = 2 if window == 1 else 1
    x, y = torch.randn(n, 3, 5, 9), torch.randn(n, 2, 5, 9)
    z = F.pad(torch.cat([x, y], dim=1), (ours.reach,) * 4).float()
    if channels_last:
        z = z.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        fast = ours.float()._on_gpu(z, ours.reach)
    assert fast.dtype == torch.float32
    torch.testing.assert_close(fast.double(), literal(x, y), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("large_programs")
def test_attention_for_gpus_survives_logits_that_overflow_an_exponential() -> None:
    ours, literal = attention_pair(3, 2, window=5, patch=3)
    x, y = torch.randn(1, 3, 4, 6) * 20, torch.randn(1, 2, 4, 6) * 20
    with torch.no_grad():
        fast = ours.float()._on_gpu(F.pad(torch.cat([x, y], dim=1), (ours.reach,) * 4).float(), ours.reach)
    torch.testing.assert_close(fast.double(), literal(x, y), rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("large_programs")
@pytest.mark.parametrize(
    ("bands", "order"),
    [(("B01", "B09"), torch.contiguous_format), (GINetConfig().bands, torch.channels_last)],
)
def test_what_a_correction_starts_from_is_the_same_on_gpus(bands: tuple[str, ...], order: torch.memory_format) -> None:
    network = GINet(GINetConfig(bands, n_stages=1, n_features=6, window_size=3)).float()
    sharpen(network)
    mixed = MixedCorrection(network.stages[0].correction, torch.float32)
    error, guide = (torch.randn(1, len(bands), 5, 9).float() for _ in range(2))
    with torch.inference_mode():
        expected = mixed._attend(error, guide)
        found = mixed._attend_on_gpu(error, guide.contiguous(memory_format=order), torch.empty_like(expected))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert expected[:, : 5 + 2 * len(bands)].std((0, 2, 3)).min() > 0.01
    assert expected.shape[1] % 8 == 0


@pytest.mark.usefixtures("large_programs")
@pytest.mark.parametrize(("window", "patch", "scale"), [(1, 1, 1), (5, 3, 1), (3, 5, 1), (5, 3, 80)])
def test_gradients_for_gpus_equal_those_of_the_torch_form(
    window: int, patch: int, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xr_ginet.network import attention_gpu_grad

    ours, _ = attention_pair(3, 2, window=window, patch=patch)
    x, y = scale * torch.randn(2, 3, 4, 5) / 4, scale * torch.randn(2, 2, 4, 5) / 4  # the last one overflows
    exact = gradients(ours, x, y)
    ours.zero_grad()
    monkeypatch.setattr(attention_cpu_grad, "means", attention_gpu_grad.means)
    monkeypatch.setattr(attention_cpu_grad, "gradients", attention_gpu_grad.gradients)
    for mine, theirs in zip(gradients(ours.float(), x.float(), y.float()), exact, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - theirs).abs().max() <= 2e-5 * scale * theirs.abs().max() + 1e-5
    assert window == 1 or scale > 1 or min(part.abs().max() for part in exact) > 1e-3


@pytest.mark.usefixtures("large_programs")
@pytest.mark.parametrize(("n_features", "n_blocks", "n"), [(5, 2, 2), (128, 1, 1)])
def test_wide_corrections_for_gpus_equal_those_of_convolutions(n_features: int, n_blocks: int, n: int) -> None:
    config = GINetConfig(n_stages=1, n_features=n_features, n_blocks=n_blocks, window_size=3, patch_size=1)
    network = GINet(config).float()
    sharpen(network)
    mixed = MixedCorrection(network.stages[0].correction, torch.float32)
    error, guide = (torch.randn(n, 6, 5, 6).float() for _ in range(2))
    with torch.inference_mode():
        expected = mixed._by_convolutions(error, guide)
        found = mixed._by_products(error, guide)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert expected[:, :6].std((0, 2, 3)).min() > 0.003


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from xr_ginet.network import attention_gpu, attention_gpu_grad, convolution_gpu

def build(kernel, constants, types, *, numbers):
    kinds = {name: types.get(name, "i32" if name in numbers else "*fp32") for name in kernel.arg_names}
    source = ASTSource(
        fn=kernel,
        signature=kinds | dict.fromkeys(constants, "constexpr"),
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
    )
    print(kernel.__name__, len(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]))

sizes = "height width margin count image_stride channel_stride row_stride column_stride".split()
few = {"X": 2, "Y": 1, "ROWS": 2, "COLUMNS": 32}
build(attention_gpu._attend, few | {"RADIUS": 1, "REACH": 1}, {"out": "*fp16"}, numbers=sizes)
build(attention_gpu._embed, few | {"BANDS": 2, "BESIDE": 8}, {"beside": "*fp16"}, numbers=sizes)
sizes += "h heads query n_queries key n_keys".split()
for name in ("_means", "_softmax_gradient", "_gather"):
    constants = {"KEYS": 2, "VALUES": 2, "RADIUS": 1, "REACH": 1, "LANES": 32}
    build(getattr(attention_gpu_grad, name), constants, {}, numbers=sizes)
for right, add in ((16, True), (0, False)):
    constants = {"CHANNELS": 48 if right else 32, "STEPS": 2, "LEFT": 32, "RIGHT": right, "ADD": add, "RELU": add}
    types = {"x": "tensordesc<fp16[128, 64]>", "left": "tensordesc<fp16[64, 32]>", "out": "*fp16"}
    types["right"] = "tensordesc<fp16[64, 16]>" if right else "*fp16"
    build(convolution_gpu._convolve, constants | {"PIXELS": 128, "STEP": 64, "STAGES": 3}, types, numbers=sizes)
"""


def test_kernels_compile_for_gpus_without_one() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    sizes = [int(line.split()[1]) for line in run.stdout.splitlines()]
    assert len(sizes) == 7
    assert min(sizes) > 1000


def test_two_powers_of_two_have_room_for_all_channels() -> None:
    from xr_ginet.network.convolution_gpu import parts

    for channels in range(1, 300):
        left, right = parts(channels)
        assert channels <= left + right <= max(1 << (channels - 1).bit_length(), 16)
        assert left > right
        assert all(part == 0 or (part >= 16 and part.bit_count() == 1) for part in (left, right))
    assert parts(144) == (128, 16)


def test_all_positions_at_once_equal_one_after_the_other() -> None:
    for window, patch in ((1, 1), (3, 5), (5, 3)):
        head = Head(3, 4, window_size=window, patch_size=patch)
        sharpen(head)
        x, z = torch.randn(2, 3, 7, 9), torch.randn(2, 4, 7, 9)
        torch.testing.assert_close(head.at_once(x, z), head(x, z), rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize(("window", "patch"), [(1, 1), (5, 3), (3, 5)])
@pytest.mark.parametrize("size", [(1, 1), (5, 67), (130, 50)])
def test_attention_on_a_gpu_equals_unfolded_patches(size: tuple[int, int], window: int, patch: int) -> None:
    ours, literal = attention_pair(3, 2, window=window, patch=patch)
    x, y = torch.randn(2, 3, *size) / 4, torch.randn(2, 2, *size) / 4
    assert triton_works()
    with torch.no_grad():
        ours = ours.float().cuda()
        for scale in (1, 40):  # with the second one logits overflow an exponential
            fast = ours(scale * x.float().cuda(), scale * y.float().cuda())
            torch.testing.assert_close(fast.double().cpu(), literal(scale * x, scale * y), rtol=1e-3, atol=3e-5)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize(("window", "patch"), [(1, 1), (5, 3), (3, 5)])
@pytest.mark.parametrize("size", [(1, 1), (5, 67), (48, 48)])
def test_gradients_on_a_gpu_equal_those_of_the_torch_form(size: tuple[int, int], window: int, patch: int) -> None:
    ours, _ = attention_pair(3, 2, window=window, patch=patch)
    x, y = torch.randn(2, 3, *size) / 4, torch.randn(2, 2, *size) / 4
    exact = gradients(ours, x, y)
    ours.zero_grad()
    found, again = (gradients(ours.float().cuda(), x.float().cuda(), y.float().cuda()) for _ in range(2))
    for mine, theirs in zip(found[:3], exact[:3], strict=True):
        assert (mine.cpu() - theirs).abs().max() <= 2e-5 * theirs.abs().max() + 1e-5
    assert all(map(torch.equal, found[:3], again[:3]))  # no bit depends on the order of threads


def test_mixed_precision_computes_the_same_function() -> None:
    for config in (GINetConfig(n_features=7, n_stages=2), GINetConfig(("B01", "B09"), factor=6, n_features=6)):
        network = GINet(config)
        sharpen(network)
        ms, hs = torch.rand(2, 4, 36, 24), torch.rand(2, len(config.bands), 36 // config.factor, 24 // config.factor)
        with torch.inference_mode():
            plain = network(ms, hs)
            mixed = mix(network, torch.float64)(ms, hs)
        torch.testing.assert_close(mixed, plain, rtol=1e-12, atol=1e-12)
        assert (plain - F.interpolate(hs, scale_factor=config.factor, mode="bicubic")).abs().max() > 0.01


@needs_shared
@pytest.mark.parametrize("name", packaged_weights())
def test_sixteen_bits_differ_by_less_than_a_thousandth_on_a_real_scene(name: str) -> None:
    with np.load(SHARED / "scenes" / "ucnn_usa.npz") as file:
        images = file["b10"][:, 100:228, 60:188], file["b20"][:, 50:114, 30:94]
    ms, hs = (torch.from_numpy(image / 10_000)[None] for image in images)
    network = load_checkpoint(name).network()
    with torch.inference_mode():
        exact = copy.deepcopy(network).double()(ms, hs)
        mixed, coarser = (
            mix(copy.deepcopy(network).float(), dtype)(ms.float(), hs.float())
            for dtype in (torch.float16, torch.bfloat16)
        )
    error = (mixed - exact).abs()
    assert 0 < error.max() < 1e-3 < (coarser - exact).abs().max()
    assert error.pow(2).mean().sqrt() < 1e-4


def test_the_exponential_is_right_to_two_units_in_the_last_place() -> None:
    x = np.linspace(-87, 0, 100_001, dtype="float32")
    ours = x.copy()
    attention_cpu._exponential(ours, np.zeros_like(x), np.empty(x.size, np.int32))
    exact = np.exp(x.astype("float64"))
    assert np.max(np.abs(ours - exact) / np.spacing(exact.astype("float32"))) <= 2
    assert ours[-1] == 1


def test_where_compiled_code_cannot_be_kept_it_is_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numba.core.caching.CacheImpl._locator_classes", [])
    with pytest.raises(RuntimeError, match="no locator available"):
        numba.njit(lambda: None, cache=True)

    def double(x: np.ndarray) -> None:
        x *= 2

    x = np.arange(3.0)
    attention_cpu.compiled(double)(x)
    assert x.tolist() == [0, 2, 4]


@pytest.mark.parametrize("gradient", [True, False])
def test_where_the_compiled_forms_do_not_serve_they_are_not_called(
    gradient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_cpu, "attend", None)
    monkeypatch.setattr(attention_grad, "Attend", None)
    module = WindowAttention(1, 1, window_size=3, patch_size=3)
    x = torch.rand(1, 1, 4, 4)
    with torch.set_grad_enabled(gradient):
        assert module(x, x).isfinite().all()
        with pytest.raises((TypeError, AttributeError), match="'NoneType' object"):
            module.float()(x.float(), x.float())


# The network against the oracle.

PARITY = [
    pytest.param(SMALL, {}, (14, 22), id="factor_2"),
    pytest.param({**SMALL, "bands": 3, "factor": 3}, {}, (15, 21), id="factor_3"),
    pytest.param({**SMALL, "bands": 3, "factor": 4}, {}, (12, 20), id="factor_4"),
    pytest.param({**SMALL, "bands": 2, "factor": 6}, {}, (18, 30), id="factor_6"),
    pytest.param({**SMALL, "plus": False}, {"guide": "external"}, (14, 22), id="external_guide"),
    pytest.param({"stages": 3, "features": 5, "clusters": 4, "blocks": 1}, {}, (10, 26), id="other_widths"),
    pytest.param({**SMALL, "window": 7, "patch": 5}, {"window_size": 7, "patch_size": 5}, (14, 10), id="other_windows"),
    pytest.param({}, {}, (8, 12), id="paper"),
]


def parity_case(
    options: dict[str, Any], choices: dict[str, Any], size: tuple[int, int]
) -> tuple[LiteralGINet, GINetConfig, tuple[Tensor, Tensor, Tensor | None]]:
    """Return the oracle, the configuration that belongs to it, and its inputs."""
    bands, factor = options.get("bands", 6), options.get("factor", 2)
    inputs = images(*size, bands=bands, factor=factor, external="guide" in choices)
    literal = literal_ginet(inputs[0], **options)
    return literal, replace(from_authors(literal.state_dict()).config, **choices), inputs


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize(("options", "choices", "size"), PARITY)
def test_the_network_equals_the_literal_one(
    options: dict[str, Any], choices: dict[str, Any], size: tuple[int, int], prefix: str
) -> None:
    literal, config, inputs = parity_case(options, choices, size)
    network = from_authors({prefix + key: tensor for key, tensor in literal.state_dict().items()}, config)
    with torch.no_grad():
        assert relative_error(network(*inputs), literal(*inputs)) < 1e-12
    assert config.factor == literal.factor
    assert config.n_stages == len(literal.BPKernel)


def test_the_network_in_float32_without_gradients_equals_itself_in_float64() -> None:
    ms, hs, _ = images(46, 38)
    network = GINet(GINetConfig(n_stages=2, n_features=6))
    sharpen(network)
    exact = network(ms, hs).detach()
    with torch.no_grad():
        quick = network.float()(ms.float(), hs.float())
    assert relative_error(quick.double(), exact) < 1e-5


def test_every_cluster_occurs_in_the_parity_tests() -> None:
    literal, _, (ms, _, _) = parity_case(SMALL, {}, (14, 22))
    assert literal.clustering_cnn(ms).argmax(1).unique().tolist() == [0, 1, 2]


def swap(state: dict[str, Tensor], one: str, other: str) -> None:
    """Swap the tensors of every two names that differ only in ``one`` and ``other``."""
    for key in [key for key in state if one in key]:
        partner = key.replace(one, other)
        state[key], state[partner] = state[partner], state[key]


def swap_geometric_and_mixed(state: dict[str, Tensor]) -> None:
    for key in [key for key in state if key.endswith("Nonlocal.mlp.weight")]:
        state[key] = state[key][:, [2, 1, 0]]


@pytest.mark.parametrize(
    ("tamper", "choices"),
    [
        pytest.param(lambda state: None, {"patch_size": 1}, id="patch_of_one"),
        pytest.param(lambda state: None, {"patch_size": 5}, id="patch_of_five"),
        pytest.param(lambda state: None, {"window_size": 3}, id="window_of_three"),
        pytest.param(swap_geometric_and_mixed, {}, id="heads_swapped"),
        pytest.param(lambda state: swap(state, "theta", "phi"), {}, id="theta_and_phi_swapped"),
        pytest.param(lambda state: swap(state, "mlps.0", "mlps.1"), {}, id="clusters_swapped"),
        pytest.param(lambda state: swap(state, "conv1", "conv2"), {}, id="convolutions_of_a_block_swapped"),
    ],
)
def test_parity_fails_for_a_slightly_different_function(
    tamper: Callable[[dict[str, Tensor]], None], choices: dict[str, Any]
) -> None:
    literal, config, inputs = parity_case(SMALL, {}, (14, 22))
    state = dict(literal.state_dict())
    tamper(state)
    with torch.no_grad():
        assert relative_error(from_authors(state, replace(config, **choices))(*inputs), literal(*inputs)) > 1e-6


def test_parity_fails_without_the_mask_outside_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    literal, config, inputs = parity_case(SMALL, {}, (14, 22))
    monkeypatch.setattr(attention, "_inside", everywhere_inside)
    with torch.no_grad():
        assert relative_error(from_authors(literal.state_dict(), config)(*inputs), literal(*inputs)) > 1e-6


@pytest.mark.parametrize(("options", "choices", "size"), [PARITY[0], PARITY[3], PARITY[4]])
def test_gradients_equal_the_literal_ones(
    options: dict[str, Any], choices: dict[str, Any], size: tuple[int, int]
) -> None:
    literal, config, inputs = parity_case(options, choices, size)
    network = from_authors(literal.state_dict(), config).requires_grad_()
    gradients = []
    for module in (literal, network):
        leaves = [image.clone().requires_grad_() for image in inputs if image is not None]
        output = module(*leaves)
        (output * torch.linspace(-1, 2, output.numel()).view_as(output)).sum().backward()
        gradients.append([leaf.grad for leaf in leaves if leaf.grad is not None])
    for expected, ours in zip(*gradients, strict=True):
        assert relative_error(ours, expected) < 1e-12
    # The reader of checkpoints maps the literal gradients onto our parameters as it maps weights.
    named = {key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in literal.named_parameters()}
    for key, expected in from_authors(named, config).named_parameters():
        grad = network.get_parameter(key).grad
        torch.testing.assert_close(
            torch.zeros_like(expected) if grad is None else grad, expected.data, rtol=1e-9, atol=1e-12
        )


def test_the_papers_configuration_has_6_297_553_parameters() -> None:
    assert sum(p.numel() for p in GINet().parameters()) == 6_297_553


def test_blocks_means_follow_the_blur_that_starts_as_the_identity() -> None:
    network = GINet(GINetConfig(bands=("B01", "B09"), factor=6, n_stages=1, n_features=2))
    u = torch.rand(1, 2, 12, 18)
    torch.testing.assert_close(network.stages[0].down(u), u.unflatten(3, (3, 6)).unflatten(2, (2, 6)).mean((3, 5)))


# The guide.


@pytest.mark.parametrize("assignment", ["hard", "soft"])
def test_the_clustering_receives_gradient_only_with_soft_assignment(assignment: str) -> None:
    network = GINet(GINetConfig(n_stages=1, n_features=4, assignment=assignment))
    ms, hs, _ = images(8, 12)
    network(ms, hs).square().sum().backward()
    gradients = [parameter.grad for parameter in network.guide.classify.parameters()]
    if assignment == "hard":
        assert gradients == [None] * 6
    else:
        assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)


def test_soft_assignment_mixes_the_clusters_by_their_probabilities() -> None:
    literal, config, (ms, _, _) = parity_case(SMALL, {}, (14, 22))
    outputs = [mlp(ms.movedim(1, -1)).movedim(-1, 1) for mlp in literal.spectral_inter.mlps]
    shares = literal.clustering_cnn(ms).split(1, dim=1)
    expected = sum(share * output for share, output in zip(shares, outputs, strict=True))
    ours = from_authors(literal.state_dict(), replace(config, assignment="soft")).guide(ms)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-13)


def test_soft_assignment_becomes_hard_as_the_clustering_sharpens() -> None:
    literal, config, (ms, _, _) = parity_case(SMALL, {}, (14, 22))
    hard, soft = (
        from_authors(literal.state_dict(), replace(config, assignment=assignment)).guide
        for assignment in ("hard", "soft")
    )
    errors = []
    for _ in range(3):
        errors.append(relative_error(soft(ms), hard(ms)))
        soft.classify[4].weight *= 1e4
        soft.classify[4].bias *= 1e4
    assert errors[0] > 0.05
    assert errors[2] < 1e-12


def test_a_tie_goes_to_the_lowest_cluster() -> None:
    literal, config, (ms, _, _) = parity_case(SMALL, {}, (14, 22))
    nn.init.zeros_(literal.clustering_cnn[4].weight)
    nn.init.zeros_(literal.clustering_cnn[4].bias)
    first = literal.spectral_inter.mlps[0](ms.movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(from_authors(literal.state_dict(), config).guide(ms), first)


# The receptive radius and the shift law.


def measured_radius(config: GINetConfig, axis: int) -> int:
    """Return the distance along ``axis`` of the farthest input with a gradient at an output pixel of any phase."""
    network = GINet(config)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.uniform_(0.01, 0.05)
            if "theta" in name or "phi" in name:
                parameter *= 1e-3  # no position's softmax weight may round to zero
    f = config.factor
    middle = config.receptive_radius // f + 3  # coarse pixels on either side: more than the radius says
    coarse = [2, 2]
    coarse[axis] = 2 * middle + 1
    fine = [f * n for n in coarse]
    reach = 0
    for phase in range(f):
        ms, guide = (torch.rand(1, bands, *fine, requires_grad=True) for bands in (4, len(config.bands)))
        hs = (-1 - torch.rand(1, len(config.bands), *coarse)).requires_grad_()  # e > 0, and so all ReLUs are alive
        output = network(ms, hs, guide if config.guide == "external" else None)
        centre = middle * f + phase
        output.movedim(2 + axis, 0)[centre, 0, :, 1].sum().backward()

        def touched(image: Tensor) -> list[int]:
            assert image.grad is not None
            return image.grad.movedim(2 + axis, 0).flatten(1).any(1).nonzero().flatten().tolist()

        steers = guide if config.guide == "external" else ms
        reach = max(reach, *(abs(centre - y) for y in touched(steers)))
        reach = max(reach, *(max(centre - (y * f + f - 1), y * f - centre) for y in touched(hs)))
    return reach


@pytest.mark.parametrize("axis", [0, 1], ids=["y", "x"])
@pytest.mark.parametrize(
    "options",
    [
        {"n_stages": 1},
        {"n_stages": 2},
        {"n_stages": 3},
        {"n_stages": 6},
        {"n_stages": 1, "factor": 3},
        {"n_stages": 2, "factor": 3},
        {"n_stages": 2, "factor": 4},
        {"n_stages": 1, "factor": 6},
        {"n_stages": 2, "factor": 6},
        {"n_stages": 1, "factor": 5, "n_blocks": 0, "window_size": 1, "patch_size": 1},
        {"n_stages": 2, "n_blocks": 1},
        {"n_stages": 2, "window_size": 3},
        {"n_stages": 2, "patch_size": 1},
        {"n_stages": 1, "window_size": 7, "patch_size": 5, "n_blocks": 0},
        {"n_stages": 1, "guide": "external"},
        {"n_stages": 2, "guide": "external", "factor": 6},
    ],
    ids=lambda options: "-".join(f"{key}={value}" for key, value in options.items()),
)
def test_the_receptive_radius_is_the_support_of_the_gradient(options: dict[str, Any], axis: int) -> None:
    config = GINetConfig(bands=("B01", "B09"), n_features=2, n_clusters=2, assignment="soft", **options)
    assert measured_radius(config, axis) == config.receptive_radius


@pytest.mark.parametrize(("factor", "bands"), [(2, 6), (6, 2)])
def test_shifting_the_inputs_by_factor_shifts_the_output(factor: int, bands: int) -> None:
    options = {"stages": 1, "features": 4, "clusters": 3, "blocks": 1, "factor": factor, "bands": bands}
    literal, config, (ms, hs, _) = parity_case(options, {}, (84, 96))
    network = from_authors(literal.state_dict(), config)
    here = network(ms[..., :-factor, : -2 * factor], hs[..., :-1, :-2])  # one scene, seen through two frames
    there = network(ms[..., factor:, 2 * factor :], hs[..., 1:, 2:])
    here, there = here[..., factor:, 2 * factor :], there[..., :-factor, : -2 * factor]  # what both frames show
    radius = config.receptive_radius
    inner = (..., slice(radius, -radius), slice(radius, -radius))
    assert relative_error(there[inner], here[inner]) < 1e-12
    assert relative_error(there[..., :1, :], here[..., :1, :]) > 1e-3  # at a frame's border it sees something else


# Reading the authors' checkpoints.


def authors_state(**options: Any) -> dict[str, Tensor]:
    """Return a small state dict with the authors' names."""
    return dict(LiteralGINet(**{"stages": 2, "features": 4, "clusters": 2, "blocks": 1, **options}).state_dict())


def assert_reads(path: Path, state: dict[str, Tensor]) -> None:
    """Assert that a file gives the same network as the tensors it holds."""
    ours, expected = from_authors(path).state_dict(), from_authors(state).state_dict()
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in expected)


@pytest.mark.parametrize("wrap", [None, "state_dict", "model_state_dict"])
@pytest.mark.parametrize("ending", [".pt", ".ckpt"])
def test_a_pickle_of_tensors_is_read(tmp_path: Path, wrap: str | None, ending: str) -> None:
    state = authors_state()
    torch.save({wrap: state, "epoch": 3} if wrap else state, tmp_path / f"weights{ending}")
    assert_reads(tmp_path / f"weights{ending}", state)


def test_a_safetensors_file_is_read(tmp_path: Path) -> None:
    state = authors_state()
    save_file(state, tmp_path / "weights.safetensors")
    assert_reads(tmp_path / "weights.safetensors", state)


def test_the_network_read_is_ready_for_inference() -> None:
    network = from_authors(authors_state())
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


class Bomb:
    """An object whose unpickling makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_a_pickle_that_would_execute_code_is_refused_without_executing_it(tmp_path: Path) -> None:
    path, folder = tmp_path / "bomb.pt", tmp_path / "made_by_the_pickle"
    torch.save({"state_dict": authors_state(), "config": Bomb(folder)}, path)
    with pytest.raises(ValueError, match=r"bomb.pt holds objects besides tensors.*re-save its tensors"):
        from_authors(path)
    assert not folder.exists()
    torch.load(path, weights_only=False)
    assert folder.exists()  # the bomb is live


def test_a_pickle_with_an_object_of_an_own_class_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": authors_state(), "config": Bomb}, tmp_path / "own.pt")
    with pytest.raises(ValueError, match=r"own.pt holds objects besides tensors"):
        from_authors(tmp_path / "own.pt")


def test_a_namespace_of_options_beside_the_tensors_is_read(tmp_path: Path) -> None:
    state = authors_state()
    torch.save({"state_dict": state, "hyper_parameters": argparse.Namespace(lr=1e-4)}, tmp_path / "lightning.ckpt")
    assert_reads(tmp_path / "lightning.ckpt", state)


def test_a_pickle_without_a_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "epoch.pt")
    with pytest.raises(ValueError, match=r"epoch.pt holds no state dict, alone or under 'state_dict'"):
        from_authors(tmp_path / "epoch.pt")


@pytest.mark.parametrize(("name", "content"), [
    ("text.pt", b"hello"), ("empty.pt", b""), ("cut.pt", b"PK\x03\x04"), ("text.safetensors", b"hello"),
])  # fmt: skip
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        from_authors(tmp_path / name)


BROKEN: list[Any] = [
    pytest.param("lr", torch.zeros(1), r"missing \[\], left over \['lr'\]", id="left_over"),
    pytest.param("BPKernel.1.Nonlocal.mlp.bias", None, r"missing \['[\w.]+bias'\], left over \[\]", id="missing"),
    pytest.param(
        "BPKernel.0.Nonlocal.mlp.weight", torch.zeros(2, 3), r"weight \(2, 3\) instead of \(1, 3\)", id="wrong_shape"
    ),
    pytest.param(
        "downsamp_hs.0.conv_k.0.weight", torch.zeros(6, 1, 11, 11), "11 wide, which is no prime", id="no_prime_kernel"
    ),
    pytest.param(
        "spectral_inter.mlps.0.2.weight", None, r"no tensor 'spectral_inter.mlps.0.2.weight'.*it holds BPK", id="names"
    ),
    pytest.param(
        "spectral_inter.mlps.0.0.weight", torch.zeros(4, 3), "guide has 3 bands; name them with", id="guide_bands"
    ),
    pytest.param(
        "spectral_inter.mlps.1.0.weight", torch.zeros(4, 5), r"weight \(4, 5\) instead of \(4, 4\)",
        id="wrong_shape_of_a_perceptron",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("key", "tensor", "message"), BROKEN)
def test_tensors_that_do_not_fit_are_refused(key: str, tensor: Tensor | None, message: str) -> None:
    state = authors_state()
    if tensor is None:
        del state[key]
    else:
        state[key] = tensor
    with pytest.raises(ValueError, match=message):
        from_authors(state)


def test_perceptrons_of_different_widths_are_refused() -> None:
    state = authors_state()
    state["spectral_inter.mlps.0.0.weight"], state["spectral_inter.mlps.1.0.weight"] = torch.zeros(8, 4).split([5, 3])
    with pytest.raises(ValueError, match="does not fit"):
        from_authors(state)


@pytest.mark.parametrize(
    ("options", "choices"),
    [
        pytest.param({}, {}, id="factor_2"),
        pytest.param(
            {"bands": 2, "factor": 6}, {}, id="factor_6",
        ),
        pytest.param(
            {}, {"guide": "external"}, id="external_guide",
        ),
    ],
)  # fmt: skip
def test_any_missing_tensor_is_refused(options: dict[str, Any], choices: dict[str, Any]) -> None:
    state = authors_state(**options)
    config = replace(from_authors(state).config, **choices) if choices else None
    for key in state:
        with pytest.raises(ValueError, match=r"missing|no tensor|factor=1|does not fit"):
            from_authors({name: tensor for name, tensor in state.items() if name != key}, config)


def test_tensors_without_the_authors_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"does not carry the authors' names; it holds conv.weight …"):
        from_authors({"conv.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"does not carry the authors' names; it holds nothing …"):
        from_authors({})


def test_a_configuration_adds_what_no_shape_shows() -> None:
    network = from_authors(authors_state(), GINetConfig(window_size=7, assignment="soft"))
    assert (network.config.window_size, network.config.assignment) == (7, "soft")
    assert network.config.n_stages == from_authors(authors_state()).config.n_stages


def test_a_configuration_that_the_tensors_contradict_is_refused() -> None:
    config = replace(from_authors(authors_state()).config, n_stages=3)
    with pytest.raises(ValueError, match=r"config sets \{'n_stages': 3\}, but the tensors show \{'n_stages': 2\}"):
        from_authors(authors_state(), config)


# Our own checkpoints.


def test_a_checkpoint_survives_a_round_trip(tmp_path: Path) -> None:
    config = GINetConfig(bands=("B09", "B01"), factor=6, n_stages=1, n_features=3, window_size=3, assignment="soft")
    network = GINet(config)
    saved = save_checkpoint(tmp_path / "mine.safetensors", network, {"seed": 7, "data": ["Málaga"]})
    loaded = load_checkpoint(tmp_path / "mine.safetensors")
    assert loaded == saved
    assert loaded.config == config
    assert loaded.card == {"seed": 7, "data": ["Málaga"]}
    assert loaded.name == "mine"
    assert loaded.sha256 == sha256((tmp_path / "mine.safetensors").read_bytes()).hexdigest()
    expected, restored = network.state_dict(), loaded.network().state_dict()
    assert expected.keys() == restored.keys()
    assert all(torch.equal(expected[key], restored[key]) for key in expected)


def test_a_checkpoint_without_a_card_has_an_empty_one(tmp_path: Path) -> None:
    assert save_checkpoint(tmp_path / "a.safetensors", GINet(GINetConfig(n_stages=1, n_features=2))).card == {}


def test_loading_is_ready_for_inference_and_reading_a_header_is_not_loading(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "a.safetensors", GINet(GINetConfig(n_stages=1, n_features=2)))
    network = checkpoint.network()
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    checkpoint.path.unlink()
    assert checkpoint.config.n_features == 2


def test_unknown_weights_are_refused() -> None:
    with pytest.raises(FileNotFoundError, match=r"no weights 'nothing'.*Type weights='default', or the path"):
        load_checkpoint("nothing")


def test_a_file_that_is_not_safetensors_is_refused(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a.pt is not a safetensors file.*xr_ginet.from_authors\(path\)"):
        load_checkpoint(tmp_path / "a.pt")


def test_a_safetensors_file_of_another_maker_is_refused(tmp_path: Path) -> None:
    save_file(authors_state(), tmp_path / "theirs.safetensors")
    with pytest.raises(ValueError, match=r"theirs.safetensors holds no 'ginet' in its metadata"):
        load_checkpoint(tmp_path / "theirs.safetensors")


def test_a_checkpoint_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    content = json.dumps({"config": {**asdict(GINetConfig()), "n_heads": 3}, "card": {}})
    save_file({"a": torch.zeros(1)}, tmp_path / "newer.safetensors", metadata={"ginet": content})
    with pytest.raises(ValueError, match="n_heads"):
        load_checkpoint(tmp_path / "newer.safetensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"a.safetensors does not tell its configuration and card: JSONDecodeError"),
        ('{"config": 3, "card": {}}', r"does not tell its configuration and card: TypeError"),
        ('{"config": {"bands": 3}, "card": {}}', r"has a configuration that is none: .*int"),
        ('{"config": {}, "card": {}}', r"does not hold the network that it describes: a is \(1,\), needed is None"),
        ('{"config": {"n_features": 4096, "n_stages": 64}, "card": {}}', "does not hold the network that it describes"),
    ],
)
def test_a_checkpoint_that_does_not_fit_itself_is_refused_before_memory_is_taken(
    tmp_path: Path, content: str, message: str
) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", metadata={"ginet": content})
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "a.safetensors").network()


# Errors of the network and its configuration.


@pytest.mark.parametrize(
    ("choices", "shapes", "message"),
    [
        ({}, ((1, 3, 8, 12), (1, 2, 4, 6)), r"ms has shape \(1, 3, 8, 12\); .*\(N, 4, height, width\).*B02, B03"),
        ({}, ((1, 4, 8, 12), (1, 6, 4, 6)), r"hs has shape \(1, 6, 4, 6\); .*\(N, 2, height, width\).*B11, B12"),
        ({}, ((4, 8, 12), (2, 4, 6)), r"ms has shape \(4, 8, 12\)"),
        ({}, ((1, 4, 8, 12), (1, 2, 4, 5)), r"ms \(1, 4, 8, 12\) and hs \(1, 2, 4, 5\) do not nest.*2 times"),
        ({}, ((1, 4, 9, 12), (1, 2, 4, 6)), r"ms \(1, 4, 9, 12\) and hs \(1, 2, 4, 6\) do not nest"),
        ({}, ((2, 4, 8, 12), (1, 2, 4, 6)), r"ms \(2, 4, 8, 12\) and hs \(1, 2, 4, 6\) do not nest"),
        ({}, ((1, 4, 8, 12), (1, 2, 4, 6), (1, 2, 8, 12)), r"config.guide is 'learned', but guide= was given"),
        ({"guide": "external"}, ((1, 4, 8, 12), (1, 2, 4, 6)), r"config.guide is 'external', but guide= was not given"),
        (
            {"guide": "external"},
            ((1, 4, 8, 12), (1, 2, 4, 6), (1, 3, 8, 12)),
            r"guide has shape \(1, 3, 8, 12\); it must be that of the output, \(1, 2, 8, 12\)",
        ),
    ],
)
def test_inputs_that_do_not_belong_together_are_refused(
    choices: dict[str, Any], shapes: tuple[tuple[int, ...], ...], message: str
) -> None:
    network = GINet(GINetConfig(bands=("B11", "B12"), n_stages=1, n_features=2, **choices))
    with pytest.raises(ValueError, match=message):
        network(*(torch.zeros(shape) for shape in shapes))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 1}, "factor=1: must be an integer of at least 2"),
        ({"factor": 2.5}, "factor=2.5: must be an integer of at least 2"),
        ({"n_stages": 0}, "n_stages=0: must be an integer of at least 1"),
        ({"n_stages": 65}, "n_stages=65: must be an integer of at least 1, and at most 64"),
        ({"n_blocks": True}, "n_blocks=True: must be an integer of at least 0"),
        ({"cluster_features": (8, 0)}, "cluster_features=(8, 0): must be two positive widths of at most 4096"),
        ({"guide_bands": ("B02", 3)}, "guide_bands=('B02', 3): must be at most 64 names"),
        ({"window_size": 67}, "window_size=67: must be odd and positive, so that it has a centre, and at most 65"),
        ({"bands": "B05"}, "bands='B05', guide_bands="),
        ({"bands": ()}, "bands=(), guide_bands="),
        ({"window_size": 4}, "window_size=4: must be odd"),
        ({"window_size": -1}, "window_size=-1: must be odd"),
        ({"patch_size": 2}, "patch_size=2: must be odd"),
        ({"assignment": "firm"}, r"assignment='firm': must be one of ('hard', 'soft')"),
        ({"guide": "kmeans"}, r"guide='kmeans': must be one of ('learned', 'external')"),
    ],
)
def test_impossible_configurations_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        GINetConfig(**options)


def test_band_names_become_tuples_so_that_a_configuration_survives_json() -> None:
    config = GINetConfig(bands=["B11"], guide_bands=["B08", "B04"])
    assert GINetConfig(**json.loads(json.dumps(asdict(config)))) == config
