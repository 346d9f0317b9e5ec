"""The network with its residual blocks in bfloat16, for processors that multiply such numbers faster.

The inputs, weights and results of the blocks' convolutions are rounded to the 8 leading bits of bfloat16. What is added
up within them, the skip connections and everything else stay in 32 bits. The rounded numbers are multiplied in bfloat16
or, without a use for its instructions, in float32: sums then differ in their last bits, which rounding can show. So it
is decided once, where a graph is built, and by what the processor is, never by a measurement.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Set
from functools import lru_cache
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ginet import GINet, ResidualBlock, Stage

WITHOUT_DOT_PRODUCTS = frozenset(
    ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
)
"""What ONEDNN_MAX_CPU_ISA may be for oneDNN to have no products of bfloat16; other values are no such limit."""
WITHOUT_TILES = WITHOUT_DOT_PRODUCTS | {"AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512"}
"""What it may be for oneDNN to have no AMX."""


@lru_cache(maxsize=1)
def is_faster() -> bool:
    """Return whether this processor multiplies bfloat16 faster than float32, by what it is: the same in every run."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    return torch.backends.mkldnn.is_available() and multiplies_faster(*_processor(), limit.upper())


def multiplies_faster(vendor: str, instructions: Set[str], limit: str = "") -> bool:
    """Return whether a processor multiplies bfloat16 faster than float32.

    AMX does. AVX-512's dot products do on AMD's processors (Zen 4 and later: ``benchmarks/bfloat16.md``); Intel's take
    one at a time where they take two of float32, and without AMX need a fifth to a third more time for a network.

    Parameters
    ----------
    vendor : str
        As the processor tells: ``GenuineIntel``, ``AuthenticAMD``.
    instructions : set of str
        As Linux calls them, such as ``amx_bf16``.
    limit : str
        Value of ONEDNN_MAX_CPU_ISA: the last instructions that oneDNN may use.
    """
    if "amx_bf16" in instructions and limit not in WITHOUT_TILES:
        return True
    return vendor == "AuthenticAMD" and "avx512_bf16" in instructions and limit not in WITHOUT_DOT_PRODUCTS


def _processor() -> tuple[str, frozenset[str]]:
    """Return this processor's vendor and instructions; nothing where Linux does not tell them."""
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", frozenset()
    vendor, flags = (re.search(rf"^{key}\s*:(.*)$", told, re.MULTILINE) for key in ("vendor_id", "flags"))
    return vendor[1].strip() if vendor else "", frozenset(flags[1].split()) if flags else frozenset()


def in_bfloat16(network: GINet, multiplied: torch.dtype | None = None) -> GINet:
    """Replace a network's residual blocks by their form in bfloat16, for inference on processors, and return it.

    ``multiplied`` is the dtype of the products, bfloat16 or float32; None: the faster one here.
    """
    kind = multiplied or (torch.bfloat16 if is_faster() else torch.float32)
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
