"""The network with its residual blocks in bfloat16, for processors that multiply such numbers faster.

The inputs, weights and results of the blocks' convolutions are rounded to the 8 leading bits of bfloat16. What is added
up within them, the skip connections and everything else stay in 32 bits. A processor without such instructions rounds
alike and multiplies in 32 bits, so that all of a cluster's workers compute the same function.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import lru_cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ginet import GINet, ResidualBlock, Stage

WORTHWHILE = 1.2
"""How many times as fast convolutions must be; about 2.3 where processors have instructions for them, else below 1."""


@lru_cache(maxsize=1)
def is_faster() -> bool:
    """Return whether convolutions in bfloat16 are faster here than in float32: measured once, in 20 ms."""
    taken = []
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            x, weight = torch.ones(1, 32, 96, 96, dtype=dtype), torch.ones(32, 32, 3, 3, dtype=dtype)
            x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
            F.conv2d(x, weight, padding=1)
            taken.append(min(_seconds(x, weight) for _ in range(5)))
    return taken[0] > WORTHWHILE * taken[1]


def _seconds(x: Tensor, weight: Tensor) -> float:
    start = time.perf_counter()
    F.conv2d(x, weight, padding=1)
    return time.perf_counter() - start


def in_bfloat16(network: GINet) -> GINet:
    """Replace a network's residual blocks by their form in bfloat16, for inference on processors, and return it."""
    kind = torch.bfloat16 if is_faster() else torch.float32
    for stage in cast(Iterable[Stage], network.stages):
        stage.correction.blocks = cast(nn.Sequential, RoundedBlocks(stage.correction.blocks, kind))
    return network


class RoundedBlocks(nn.Module):
    """What a stage's residual blocks compute, rounded to bfloat16, multiplied in ``kind``, in their input's memory."""

    def __init__(self, blocks: nn.Sequential, kind: torch.dtype) -> None:
        super().__init__()
        self.kind = kind
        self.layers = [
            (self._layer(block.conv_a), self._layer(block.conv_b)) for block in cast(Iterable[ResidualBlock], blocks)
        ]

    def _layer(self, convolution: nn.Conv2d) -> tuple[Tensor, Tensor]:
        weight = convolution.weight.detach().contiguous(memory_format=torch.channels_last)
        return self._rounded(weight), self._rounded(cast(Tensor, convolution.bias).detach())

    def _rounded(self, x: Tensor) -> Tensor:
        return x.bfloat16().to(self.kind)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W), float32
        for conv_a, conv_b in self.layers:
            y = F.conv2d(self._rounded(x), *conv_a, padding=1).relu_()
            y = self._rounded(F.conv2d(self._rounded(y), *conv_b, padding=1))
            x.add_(y.to(x.dtype)).relu_()
        return x
