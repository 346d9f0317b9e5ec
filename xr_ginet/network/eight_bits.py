"""The network with its residual blocks in 8 bits, for processors: faster, and less exact.

The inputs of their convolutions are rounded to 255 steps of a range that each channel has, their weights to 63 steps on
either side of zero; sums, the skip connection and everything else stay in 32 bits. The ranges are fixed, so that pixels
are rounded alike in whatever block they lie; what exceeds them is cut off.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from .checkpoints import Checkpoint
from .ginet import ATTENTION_CHANNELS, GUIDE_FEATURES, GINet, GINetConfig, ResidualBlock, Stage

MARGIN = 1.5
"""Times the largest magnitudes seen are still told apart, larger ones are not."""

WEIGHT_STEPS = 63
"""Two products of 8 bits and 7 fit into the 16 bits in which processors without VNNI add them."""

GEOMETRY = [1, 1], [1, 1], [1, 1], 1
"""Stride, padding, dilation and groups of the blocks' convolutions."""


def activation_ranges(network: GINet, images: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Return how large the inputs of the residual blocks' convolutions become.

    Parameters
    ----------
    network : GINet
    images : iterable of (ms, hs)
        As the network takes them: reflectance, as different as it will ever be.

    Returns
    -------
    (n_stages, n_blocks, 2, n_features + 10)
        The largest magnitude of each channel, of each block's input and of its inner map: what a model card holds as
        ``ranges``.
    """
    found = torch.zeros(_shape(network.config))

    def watch(convolution: nn.Conv2d, largest: Tensor) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, inputs: tuple[Tensor]) -> None:
            torch.maximum(largest, inputs[0].abs().amax((0, 2, 3)), out=largest)

        return convolution.register_forward_pre_hook(hook)

    hooks = []
    for stage, ranges in zip(cast(Iterable[Stage], network.stages), found, strict=True):
        for block, (outer, inner) in zip(cast(Iterable[ResidualBlock], stage.correction.blocks), ranges, strict=True):
            hooks += [watch(block.conv_a, outer), watch(block.conv_b, inner)]
    with torch.inference_mode():
        for ms, hs in images:
            network(ms, hs)
    for handle in hooks:
        handle.remove()
    return found


def _shape(config: GINetConfig) -> tuple[int, ...]:
    return config.n_stages, config.n_blocks, 2, config.n_features + ATTENTION_CHANNELS + GUIDE_FEATURES


def ranges_of(checkpoint: Checkpoint) -> Tensor:
    """Return the ranges that a checkpoint's card holds.

    Raises
    ------
    ValueError
        If it holds none, or others than the network's.
    """
    held = checkpoint.card.get("ranges")
    try:
        ranges = torch.tensor(held, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        ranges = torch.empty(0)
    if ranges.shape != _shape(checkpoint.config) or not (ranges.isfinite() & (ranges >= 0)).all():
        raise ValueError(
            f"precision='int8' needs the ranges of activations, and {checkpoint.path} holds "
            f"{'none' if held is None else 'none of this network'}. Type precision='float32', or store what "
            "xr_ginet.network.eight_bits.activation_ranges finds in its card, as benchmarks/eight_bits.py does"
        )
    return ranges


def in_eight_bits(network: GINet, ranges: Tensor) -> GINet:
    """Replace a network's residual blocks by their form in 8 bits, for inference on processors, and return it."""
    for stage, of_stage in zip(cast(Iterable[Stage], network.stages), ranges, strict=True):
        stage.correction.blocks = cast(nn.Sequential, EightBitBlocks(stage.correction.blocks, of_stage))
    return network


class EightBitBlocks(nn.Module):
    """What a stage's residual blocks compute, in the memory of their input."""

    def __init__(self, blocks: nn.Sequential, ranges: Tensor) -> None:  # (blocks, 2, C)
        super().__init__()
        self.layers: list[tuple[Tensor, Rounding, Layer, Layer]] = []
        pairs = zip(cast(Iterable[ResidualBlock], blocks), MARGIN * ranges.clamp(min=1e-6), strict=True)
        for number, (block, (outer, inner)) in enumerate(pairs):
            rounding = UNSIGNED if number else SIGNED  # the first block's input is no ReLU's
            conv_a = _pack(block.conv_a, outer, inner, rounding)
            conv_b = _pack(block.conv_b, inner, torch.ones_like(inner), UNSIGNED)
            self.layers.append((1 / (rounding[0] * outer[:, None, None]), rounding, conv_a, conv_b))

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W), float32
        for per_unit, rounding, (*conv_a, bias_a), (*conv_b, bias_b) in self.layers:
            rounded = x.mul(per_unit).add_(rounding[1]).round_().clamp_(0, 255).to(torch.uint8)
            inner = torch.ops.onednn.qconv2d_pointwise(
                rounded, *rounding, *conv_a, bias_a, *GEOMETRY, *UNSIGNED, torch.uint8, "relu", [], ""
            )
            # ReLU(convolution + x), in the memory of x
            x = torch.ops.onednn.qconv2d_pointwise.binary(
                inner, *UNSIGNED, *conv_b, x, bias_b, *GEOMETRY, 1.0, 0, x.dtype, 1.0, 0, "sum", 1.0, "relu", [], ""
            )
        return x


Rounding = tuple[float, int]
"""Size of a step, and the number that stands for zero, of maps that are divided by their ranges."""

Layer = tuple[Tensor, Tensor, Tensor, Tensor]
"""A convolution's weight as oneDNN wants it, its scales and zeros, and the bias."""

SIGNED: Rounding = 1 / 127, 128
UNSIGNED: Rounding = 1 / 255, 0


def _pack(convolution: nn.Conv2d, before: Tensor, after: Tensor, rounding: Rounding) -> Layer:
    """Return a convolution of maps that are divided by ``before``, which divides its own by ``after``."""
    weight = convolution.weight.detach() * before[:, None, None] / after[:, None, None, None]
    scale = weight.abs().amax((1, 2, 3)).clamp(min=1e-12) / WEIGHT_STEPS
    rounded = (weight / scale[:, None, None, None]).round().to(torch.int8)
    packed = torch.ops.onednn.qconv_prepack(rounded, scale, *rounding, *GEOMETRY)
    bias = cast(Tensor, convolution.bias).detach() / after
    return packed, scale, torch.zeros(len(scale), dtype=torch.int64), bias
