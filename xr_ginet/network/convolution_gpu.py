"""Wide 3 × 3 convolutions in 16 bits as a Triton kernel, for CUDA devices that copy blocks by themselves (Hopper).

Images lie within a border of zeros, the channels of a pixel side by side, rows end to end. So a convolution is a matrix
product: a pixel's factors are, in each of three rows, the channels of three pixels, which lie one after the other, and
those of the next pixel begin one pixel further on. The left matrix is the image itself, read with rows that overlap.

Libraries take widths in steps of 64 or more; here 144 are 128 and 16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn
from triton.tools.tensor_descriptor import TensorDescriptor

STEP = 64
"""Factors that are taken at once."""
PIXELS, WARPS, STAGES = 128, 4, 3
"""Of a program. Of those that were tried, the fastest at 144 channels on an H200: two programs share a processor, and
one multiplies while the other writes."""


@dataclass(frozen=True)
class Bordered:
    """Images ``(N, C, H, W)`` within zeros of one pixel."""

    pixels: Tensor
    """``(pixels, C)``, with zeros behind the last one as far as the last matrix row reaches."""
    n: int
    height: int
    width: int

    @classmethod
    def empty(cls, n: int, channels: int, height: int, width: int, *, like: Tensor) -> Bordered:
        """Return images of which nothing but the border is written."""
        count = n * (height + 2) * (width + 2)
        behind = triton.cdiv(_factors(channels), channels)
        images = cls(like.new_empty((count + behind, channels)), n, height, width)
        images.pixels[count:] = 0
        whole = images._whole
        for border in (whole[:, 0], whole[:, -1], whole[:, :, 0], whole[:, :, -1]):
            border.zero_()
        return images

    @property
    def channels(self) -> int:
        return self.pixels.shape[1]

    @property
    def count(self) -> int:
        """Return the number of pixels, border included."""
        return self.n * (self.height + 2) * (self.width + 2)

    @property
    def _whole(self) -> Tensor:  # (N, 1 + H + 1, 1 + W + 1, C)
        return self.pixels[: self.count].view(self.n, self.height + 2, self.width + 2, -1)

    @property
    def images(self) -> Tensor:
        """Return a view, ``(N, C, H, W)``."""
        return self._whole[:, 1:-1, 1:-1].permute(0, 3, 1, 2)

    def new(self, channels: int) -> Bordered:
        """Return as many others of the same size."""
        return self.empty(self.n, channels, self.height, self.width, like=self.pixels)


class Convolution(nn.Module):
    """A convolution as the right matrix of the product, its columns in two parts whose widths are powers of two.

    Parameters
    ----------
    layer : Conv2d
        3 × 3, of a multiple of 8 channels.
    """

    left: Tensor
    right: Tensor | None
    bias: Tensor

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        outputs, inputs = layer.weight.shape[:2]
        taps = layer.weight.detach().permute(2, 3, 1, 0).reshape(3, 3 * inputs, outputs)
        left, right = parts(outputs)
        matrix = F.pad(taps, (0, left + right - outputs, 0, _factors(inputs) - 3 * inputs)).flatten(0, 1)
        bias = matrix.new_zeros(outputs) if layer.bias is None else layer.bias.detach()
        self.register_buffer("left", matrix[:, :left].contiguous(), persistent=False)
        self.register_buffer("right", matrix[:, left:].contiguous() if right else None, persistent=False)
        self.register_buffer("bias", F.pad(bias, (0, left + right - outputs)).float(), persistent=False)

    def forward(self, x: Bordered, out: Bordered, *, add: bool = False, relu: bool = True) -> Bordered:
        """Write the convolution of ``x``, or with ``add`` its sum with ``out``, to ``out`` and return it."""
        left, right = self.left, self.right
        factors = _factors(x.channels)
        _convolve[(triton.cdiv(x.count, PIXELS),)](
            TensorDescriptor(x.pixels, [x.count, factors], [x.channels, 1], [PIXELS, STEP]),
            TensorDescriptor.from_tensor(left, [STEP, left.shape[1]]),
            left if right is None else TensorDescriptor.from_tensor(right, [STEP, right.shape[1]]),
            self.bias,
            out.pixels,
            x.height + 2,
            x.width + 2,
            x.count,
            CHANNELS=out.channels,
            STEPS=factors // STEP,
            LEFT=left.shape[1],
            RIGHT=0 if right is None else right.shape[1],
            ADD=add,
            RELU=relu,
            PIXELS=PIXELS,
            STEP=STEP,
            STAGES=STAGES,
            num_warps=WARPS,
        )
        return out


def parts(channels: int) -> tuple[int, int]:
    """Return two powers of two of at least 16, the larger one first, or one and zero, that have room for channels.

    Examples
    --------
    >>> parts(144), parts(64), parts(112), parts(8)
    ((128, 16), (64, 0), (128, 0), (16, 0))
    """
    left = max(1 << (channels.bit_length() - 1), 16)
    if channels <= left:
        return left, 0
    right = max(1 << (channels - left - 1).bit_length(), 16)
    return (left, right) if right < left else (2 * left, 0)


def _factors(channels: int) -> int:
    """Return how many factors a pixel has in one row: the last ones meet zeros."""
    return triton.cdiv(3 * channels, STEP) * STEP


@triton.jit
def _convolve(
    x,
    left,
    right,
    bias,
    out,
    height,
    width,
    count,
    CHANNELS: tl.constexpr,
    STEPS: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    ADD: tl.constexpr,
    RELU: tl.constexpr,
    PIXELS: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write some pixels that follow on one another, except the border."""
    first = tl.program_id(0) * PIXELS
    sums = tl.zeros((PIXELS, LEFT), tl.float32)
    if RIGHT > 0:
        others = tl.zeros((PIXELS, RIGHT), tl.float32)
    for k in tl.range(3 * STEPS, num_stages=STAGES):
        row = k // STEPS
        factors = x.load([first + (row - 1) * width - 1, (k - row * STEPS) * STEP])
        sums = tl.dot(factors, left.load([k * STEP, 0]), sums)
        if RIGHT > 0:
            others = tl.dot(factors, right.load([k * STEP, 0]), others)
    pixel = first + tl.arange(0, PIXELS)
    row, column = pixel // width % height, pixel % width
    inside = (row > 0) & (row < height - 1) & (column > 0) & (column < width - 1) & (pixel < count)
    _write(out, bias, sums, pixel, inside, 0, CHANNELS, LEFT, ADD, RELU)
    if RIGHT > 0:
        _write(out, bias, others, pixel, inside, LEFT, CHANNELS, RIGHT, ADD, RELU)


@triton.jit
def _write(
    out,
    bias,
    sums,
    pixel,
    inside,
    start,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    ADD: tl.constexpr,
    RELU: tl.constexpr,
):
    channel = start + tl.arange(0, WIDTH)
    sums += tl.load(bias + channel)[None, :]
    here = out + pixel.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
    there = inside[:, None] & (channel < CHANNELS)[None, :]
    if ADD:
        sums += tl.load(here, there, 0).to(tl.float32)
    if RELU:
        sums = tl.maximum(sums, 0)
    tl.store(here, sums.to(out.dtype.element_ty), there)
