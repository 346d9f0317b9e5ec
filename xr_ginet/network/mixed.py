"""The network in mixed precision: the convolutions that are nearly all of its arithmetic work in 16 bits, for GPUs.

Estimate, projections, attention and sums stay in 32 bits. Convolutions of the same images become one; their widths are
padded with zeros to what matrix units take.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import may_compile
from .ginet import ATTENTION_CHANNELS, Correction, GINet, Guide, ResidualBlock, Stage, cluster_shares

MULTIPLE = 8
"""Channels in 16 bits come in multiples of it."""
WIDE = frozenset(range(65, 160)) - {128}
"""Channels of residual blocks that `convolution_gpu` is for; libraries are as fast or faster at others."""


def mix(network: GINet, dtype: torch.dtype = torch.float16) -> GINet:
    """Replace a network's guide and corrections by their forms in mixed precision, for inference, and return it."""
    if network.config.guide == "learned":
        network.guide = cast(Guide, MixedGuide(network.guide, dtype))
    for stage in cast(Iterable[Stage], network.stages):
        stage.correction = cast(Correction, MixedCorrection(stage.correction, dtype))
    return network


class MixedGuide(nn.Module):
    """What a `Guide` computes, with its convolutions in ``dtype``; hard clusters are found in 32 bits.

    The images come twice, rounded and what rounding left of them, in channels that would be zeros otherwise.
    """

    def __init__(self, plain: Guide, dtype: torch.dtype) -> None:
        super().__init__()
        self.hard, self.n_clusters = plain.assignment == "hard", plain.n_clusters
        self.bands = plain.output.out_channels // plain.n_clusters
        first, second, third = (layer for layer in plain.classify if isinstance(layer, nn.Conv2d))
        kind = torch.float32 if self.hard else dtype
        weights = (
            (torch.cat([first.weight] * 2, dim=1), first.bias),
            (second.weight, second.bias),
            (third.weight, third.bias),
        )
        self.classify = nn.ModuleList(_convolution(*weight, kind) for weight in weights)
        self.hidden = self._by_cluster(torch.cat([plain.hidden.weight] * 2, dim=1), plain.hidden.bias, dtype)
        self.output = self._by_cluster(plain.output.weight, plain.output.bias, dtype)

    def _by_cluster(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.ModuleList:
        parts = zip(weight.chunk(self.n_clusters), cast(Tensor, bias).chunk(self.n_clusters), strict=True)
        return nn.ModuleList(_convolution(w, b, dtype) for w, b in parts)

    def forward(self, ms: Tensor) -> Tensor:  # (N, 4, H, W) -> (N, B, H, W)
        first, second, third = cast(Iterable[nn.Conv2d], self.classify)
        logits = third(_relu(second, _relu(first, _twice(ms, first))))[:, : self.n_clusters]
        share = cluster_shares(logits.to(ms.dtype), hard=self.hard)
        x = _twice(ms, cast(nn.Conv2d, self.hidden[0]))
        guide = ms.new_zeros(())
        for cluster, layers in enumerate(zip(self.hidden, self.output, strict=True)):
            hidden, output = cast(tuple[nn.Conv2d, nn.Conv2d], layers)
            part = _relu(output, _relu(hidden, x))[:, : self.bands]
            guide = guide + share[:, cluster : cluster + 1] * part
        return guide.contiguous()


class MixedCorrection(nn.Module):
    """What a `Correction` computes, with everything but the attention in ``dtype``."""

    metrics: Tensor
    values: Tensor
    bias: Tensor

    def __init__(self, plain: Correction, dtype: torch.dtype) -> None:
        super().__init__()
        self.error_keys, self.guide_keys, self.attention = plain.error_keys, plain.guide_keys, plain.attention
        for name, tensor in zip(("metrics", "values", "bias"), plain.attention.folded(), strict=True):
            self.register_buffer(name, tensor.detach(), persistent=False)
        self.bands = plain.reconstruct.out_channels
        passed_on = torch.empty(ATTENTION_CHANNELS, ATTENTION_CHANNELS, 3, 3).to(plain.error_features.weight)
        nn.init.dirac_(passed_on)
        features = _side_by_side(passed_on, plain.error_features.weight, plain.guide_features.weight)
        self.features = _convolution(features, None, dtype)
        self.blocks = nn.ModuleList(
            nn.ModuleList(_convolution(c.weight, c.bias, dtype) for c in (block.conv_a, block.conv_b))
            for block in cast(Iterable[ResidualBlock], plain.blocks)
        )
        self.reconstruct = _convolution(plain.reconstruct.weight, None, dtype)
        self.products: nn.ModuleList | None = None
        """The same convolutions as `convolution_gpu` takes them, once they were used."""

    def forward(self, error: Tensor, guide: Tensor) -> Tensor:  # 2 × (N, B, H, W) -> (N, B, H, W)
        is_wide = self.features.weight.shape[0] in WIDE
        by_products = is_wide and error.is_cuda and may_compile(error) and copies_blocks(error.device)
        y = self._by_products(error, guide) if by_products else self._by_convolutions(error, guide)
        return y[:, : self.bands].to(error.dtype, memory_format=torch.contiguous_format)

    def _by_convolutions(self, error: Tensor, guide: Tensor) -> Tensor:
        x = _measured(self.features, self._attend(error, guide))
        for block in self.blocks:
            conv_a, conv_b = cast(Iterable[nn.Conv2d], block)
            x = _relu(conv_b, _relu(conv_a, x), add=x)
        return _measured(self.reconstruct, x)

    def _by_products(self, error: Tensor, guide: Tensor) -> Tensor:
        from .convolution_gpu import Bordered, Convolution

        blocks = cast(Iterable[nn.ModuleList], self.blocks)
        layers = [self.features, *(layer for block in blocks for layer in block), self.reconstruct]
        if self.products is None:
            self.products = nn.ModuleList(Convolution(cast(nn.Conv2d, layer)) for layer in layers)
        features, *inner, reconstruct = self.products
        width, inputs = self.features.weight.shape[:2]
        start = Bordered.empty(len(error), inputs, *error.shape[2:], like=self.features.weight)
        self._attend_on_gpu(error, guide, start.images)
        x, y = start.new(width), start.new(width)
        features(start, x, relu=False)
        for conv_a, conv_b in zip(inner[::2], inner[1::2], strict=True):
            conv_b(conv_a(x, y), x, add=True)
        return reconstruct(x, start.new(self.reconstruct.weight.shape[0]), relu=False).images

    def _attend(self, error: Tensor, guide: Tensor) -> Tensor:
        """Return ``[attended, error, guide]`` as the features' convolution takes them."""
        if error.is_cuda and may_compile(error):
            weight = self.features.weight
            shape = len(error), weight.shape[1], *error.shape[2:]
            x = torch.empty(shape, dtype=weight.dtype, device=error.device, memory_format=torch.channels_last)
            return self._attend_on_gpu(error, guide, x)
        attended = self.attention(self.error_keys(error), self.guide_keys(guide))
        return _narrow(torch.cat([attended, error, guide], dim=1), self.features)

    def _attend_on_gpu(self, error: Tensor, guide: Tensor, x: Tensor) -> Tensor:
        """Write what `_attend` returns to ``x``."""
        from .attention_gpu import attend, embed

        margin = self.attention.reach
        convolutions = self.error_keys.weight, self.guide_keys.weight
        queries, keys = embed(error, guide, *convolutions, self.metrics, x, margin=margin)
        attend(
            queries,
            keys,
            self.values,
            self.bias,
            margin=margin,
            window_size=self.attention.window_size,
            patch_size=self.attention.patch_size,
            out=x[:, :ATTENTION_CHANNELS],
        )
        return x


@lru_cache
def copies_blocks(device: torch.device) -> bool:
    """Return whether `convolution_gpu` serves on a CUDA device."""
    try:
        from . import convolution_gpu  # noqa: F401
    except ImportError:  # before Triton 3.4
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def _side_by_side(*weights: Tensor) -> Tensor:
    """Return the weight of the convolution that makes the outputs of several ones of their inputs side by side."""
    taps = [torch.block_diag(*(weight.detach()[:, :, y, x] for weight in weights)) for y in range(3) for x in range(3)]
    return torch.stack(taps, dim=-1).unflatten(-1, (3, 3))


def _convolution(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Conv2d:
    """Return a convolution padded with zeros to multiples of channels."""
    outputs, inputs = (-n % MULTIPLE for n in weight.shape[:2])
    layer = nn.Conv2d(1, 1, 1, padding=weight.shape[-1] // 2, bias=bias is not None)  # its tensors are replaced
    weight = F.pad(weight.detach(), (0, 0, 0, 0, 0, inputs, 0, outputs)).to(dtype)
    layer.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(F.pad(bias.detach(), (0, outputs)).to(dtype), requires_grad=False)
    return layer


def _narrow(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """Return images as a layer takes them: its dtype and channels, which lie side by side."""
    missing = x.new_zeros(()).expand(x.shape[0], layer.weight.shape[1] - x.shape[1], *x.shape[2:])
    return torch.cat([x, missing], dim=1).to(layer.weight.dtype, memory_format=torch.channels_last)


def _measured(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Return ``layer(x)`` by the fastest algorithm: with few channels the guessed one took four times as long."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
        return layer(x)


def _twice(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """Return images, and what rounding leaves of them, as a layer takes them."""
    return _narrow(torch.cat([x, x - x.to(layer.weight.dtype)], dim=1), layer)


def _relu(layer: nn.Conv2d, x: Tensor, *, add: Tensor | None = None) -> Tensor:
    """Return ``ReLU(layer(x) + add)``, in one pass over memory on CUDA devices."""
    padding = cast(tuple[int, int], layer.padding)
    if x.is_cuda:
        geometry = (1, 1), padding, (1, 1), 1  # stride, padding, dilation, groups
        if add is None:
            return torch.cudnn_convolution_relu(x, layer.weight, layer.bias, *geometry)
        return torch.cudnn_convolution_add_relu(x, layer.weight, add, 1.0, layer.bias, *geometry)
    y = F.conv2d(x, layer.weight, layer.bias, padding=padding)
    return (y if add is None else y.add_(add)).relu_()
