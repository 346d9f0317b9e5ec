"""Attention with its gradient as Triton kernels for CUDA devices: what training uses there.

A thread makes one pixel. The gradient takes two kernels per head: the first goes back through the softmax and writes
the weights and the logits' gradient of each window position; the second gathers them, for the queries, the keys and
the values at a pixel, from the positions that had to do with it. So nothing is added up by two threads, and a step
gives the same bits each time.
"""

from __future__ import annotations

import torch.nn.functional as F
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from .attention_gpu import _add_products, _repeat, _take_up

LANES = 128
"""Pixels of a program: a power of two."""


def means(queries: Tensor, z: Tensor, heads: NDArray, n_values: int, window_size: int) -> Tensor:
    """Return what `attention_grad.Attend` does."""
    return _Images(queries, z, heads, window_size).attend(n_values)[0].flatten(1, 2)


def gradients(
    gradient: Tensor, queries: Tensor, z: Tensor, heads: NDArray, n_values: int, window_size: int
) -> tuple[Tensor, Tensor]:
    """Return what `attention_grad.Gradients` does."""
    images = _Images(queries, z, heads, window_size)
    return images.gradients(images.lay(gradient.unflatten(1, (len(heads), n_values))), *images.attend(n_values))


class _Images:
    """Queries and keys within zeros that windows and patches do not leave."""

    def __init__(self, queries: Tensor, z: Tensor, heads: NDArray, window_size: int) -> None:
        self.n, _, self.height, self.width = z.shape
        self.heads, self.window_size = heads.tolist(), window_size
        self.margin = window_size // 2 + int(heads[:, 3].max()) // 2
        self.queries, self.keys = self.lay(queries), self.lay(z)

    def lay(self, image: Tensor) -> Tensor:
        return F.pad(image.detach(), (self.margin,) * 4).contiguous()

    def new(self, *channels: int, margin: int = 0) -> Tensor:
        """Return zeros, ``(N, *channels, H, W)``."""
        return self.keys.new_zeros((self.n, *channels, self.height + 2 * margin, self.width + 2 * margin))

    def attend(self, n_values: int) -> tuple[Tensor, Tensor]:
        """Return each head's means, ``(N, heads, n_values, H, W)``, and the logarithm of its denominator."""
        out, logarithms = self.new(len(self.heads), n_values), self.new(len(self.heads))
        for h, head in enumerate(self.heads):
            self._launch(_means, h, head, out, logarithms, values=n_values)
        return out, logarithms

    def gradients(self, gradient: Tensor, out: Tensor, logarithms: Tensor) -> tuple[Tensor, Tensor]:
        """Return those in the queries and in the keys, of that in the means: within zeros."""
        d_queries, d_keys = self.new(self.queries.shape[1]), self.new(self.keys.shape[1])
        weights, d_logits = (self.new(self.window_size**2, margin=self.margin) for _ in range(2))
        for h, head in enumerate(self.heads):
            self._launch(_softmax_gradient, h, head, out, logarithms, gradient, weights, d_logits, values=out.shape[2])
            self._launch(_gather, h, head, gradient, weights, d_logits, d_queries, d_keys, values=out.shape[2])
        return d_queries, d_keys

    def _launch(self, kernel: triton.JITFunction, h: int, head: list[int], *tensors: Tensor, values: int) -> None:
        query, key, n_keys, patch_size = head
        kernel[triton.cdiv(self.height * self.width, LANES), self.n](
            self.queries,
            self.keys,
            *tensors,
            h,
            len(self.heads),
            query,
            self.queries.shape[1],
            key,
            self.keys.shape[1],
            self.height,
            self.width,
            self.margin,
            KEYS=n_keys,
            VALUES=values,
            RADIUS=self.window_size // 2,
            REACH=patch_size // 2,
            LANES=LANES,
        )


@triton.jit
def _means(
    queries,
    keys,
    out,
    logarithms,
    h,
    heads,
    query,
    n_queries,
    key,
    n_keys,
    height,
    width,
    margin,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    RADIUS: tl.constexpr,
    REACH: tl.constexpr,
    LANES: tl.constexpr,
):
    """Write a head's means and the logarithm of its denominator."""
    SIDE: tl.constexpr = 2 * RADIUS + 1
    image, pixel, there, y, x, line, plane, here = _pixels(height, width, margin, LANES)
    queries += (image * n_queries + query) * plane + here
    keys += image * n_keys * plane + here
    nothing = tl.zeros((LANES,), tl.float32)
    head = (nothing - float("inf"),) + _repeat(nothing, VALUES + 1)
    for dy in range(-RADIUS, RADIUS + 1):
        logits = _logits(queries, keys + key * plane + dy * line, nothing, plane, line, KEYS, RADIUS, REACH)
        values = ()
        for c in tl.static_range(VALUES):
            for k in tl.static_range(SIDE):
                values = values + (tl.load(keys + (c * plane + dy * line + k - RADIUS)),)
        head = _take_up(head, logits, values, x, (y + dy >= 0) & (y + dy < height), width, VALUES, SIDE)
    for c in tl.static_range(VALUES):
        tl.store(out + ((image * heads + h) * VALUES + c) * height * width + pixel, head[2 + c] / head[1], there)
    tl.store(logarithms + (image * heads + h) * height * width + pixel, head[0] + tl.log(head[1]), there)


@triton.jit
def _softmax_gradient(
    queries,
    keys,
    out,
    logarithms,
    gradient,
    weights,
    d_logits,
    h,
    heads,
    query,
    n_queries,
    key,
    n_keys,
    height,
    width,
    margin,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    RADIUS: tl.constexpr,
    REACH: tl.constexpr,
    LANES: tl.constexpr,
):
    """Write a head's weights and the gradient in its logits."""
    SIDE: tl.constexpr = 2 * RADIUS + 1
    image, pixel, there, y, x, line, plane, here = _pixels(height, width, margin, LANES)
    queries += (image * n_queries + query) * plane + here
    keys += image * n_keys * plane + here
    nothing = tl.zeros((LANES,), tl.float32)
    logarithm = tl.load(logarithms + (image * heads + h) * height * width + pixel)
    common, slopes = nothing, ()
    for c in tl.static_range(VALUES):
        channel = (image * heads + h) * VALUES + c
        slope = tl.load(gradient + channel * plane + here)
        slopes = slopes + (slope,)
        common += slope * tl.load(out + channel * height * width + pixel)
    for dy in range(-RADIUS, RADIUS + 1):
        logits = _logits(queries, keys + key * plane + dy * line, nothing, plane, line, KEYS, RADIUS, REACH)
        for k in tl.static_range(SIDE):
            column = x + (k - RADIUS)
            inside = (column >= 0) & (column < width) & (y + dy >= 0) & (y + dy < height)
            weight = tl.exp(tl.where(inside, logits[k], 0) - logarithm)
            slope = nothing
            for c in tl.static_range(VALUES):
                slope += slopes[c] * tl.load(keys + (c * plane + dy * line + k - RADIUS))
            position = (image * SIDE * SIDE + (dy + RADIUS) * SIDE + k) * plane + here
            tl.store(weights + position, weight, there)
            tl.store(d_logits + position, tl.where(inside, weight * (slope - common), 0), there)


@triton.jit
def _gather(
    queries,
    keys,
    gradient,
    weights,
    d_logits,
    d_queries,
    d_keys,
    h,
    heads,
    query,
    n_queries,
    key,
    n_keys,
    height,
    width,
    margin,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    RADIUS: tl.constexpr,
    REACH: tl.constexpr,
    LANES: tl.constexpr,
):
    """Write the gradient in a head's queries, and add that in its keys and values."""
    SIDE: tl.constexpr = 2 * RADIUS + 1
    image, pixel, there, _, _, line, plane, here = _pixels(height, width, margin, LANES)
    queries += (image * n_queries + query) * plane + here
    keys += (image * n_keys + key) * plane + here
    gradient += (image * heads + h) * VALUES * plane + here
    weights += image * SIDE * SIDE * plane + here
    d_logits += image * SIDE * SIDE * plane + here
    nothing = tl.zeros((LANES,), tl.float32)
    of_queries, of_keys, of_values = _repeat(nothing, KEYS), _repeat(nothing, KEYS), _repeat(nothing, VALUES)
    for position in range(SIDE * SIDE):
        shift = (position // SIDE - RADIUS) * line + position % SIDE - RADIUS
        slope = _box_sum(d_logits + position * plane, nothing, line, REACH)
        met = _box_sum(d_logits + position * plane - shift, nothing, line, REACH)
        weight = tl.load(weights + position * plane - shift)
        of_queries_now, of_keys_now, of_values_now = (), (), ()
        for c in tl.static_range(KEYS):
            of_queries_now = of_queries_now + (of_queries[c] + slope * tl.load(keys + (c * plane + shift)),)
            of_keys_now = of_keys_now + (of_keys[c] + met * tl.load(queries + (c * plane - shift)),)
        for c in tl.static_range(VALUES):
            of_values_now = of_values_now + (of_values[c] + weight * tl.load(gradient + (c * plane - shift)),)
        of_queries, of_keys, of_values = of_queries_now, of_keys_now, of_values_now
    d_queries += (image * n_queries + query) * height * width + pixel
    d_keys += image * n_keys * height * width + pixel
    for c in tl.static_range(KEYS):
        tl.store(d_queries + c * height * width, of_queries[c], there)
        _add(d_keys + (key + c) * height * width, of_keys[c], there)
    for c in tl.static_range(VALUES):
        _add(d_keys + c * height * width, of_values[c], there)


@triton.jit
def _pixels(height, width, margin, LANES: tl.constexpr):
    """Return a program's image, its pixels, which of them exist, and where all are, within zeros too.

    What does not exist repeats the last pixel.
    """
    pixel = tl.program_id(0) * LANES + tl.arange(0, LANES)
    there = pixel < height * width
    pixel = tl.minimum(pixel, height * width - 1)
    y, x, line = pixel // width, pixel % width, width + 2 * margin
    return tl.program_id(1), pixel, there, y, x, line, (height + 2 * margin) * line, (y + margin) * line + x + margin


@triton.jit
def _logits(queries, keys, nothing, plane, line, KEYS: tl.constexpr, RADIUS: tl.constexpr, REACH: tl.constexpr):
    """Return the logits of one row of the window: a tuple."""
    logits = _repeat(nothing, 2 * RADIUS + 1)
    for c in range(KEYS):
        for o in tl.static_range(-REACH, REACH + 1):
            shift = c * plane + o * line
            logits = _add_products(logits, queries + shift, keys + shift, RADIUS, REACH)
    return logits


@triton.jit
def _box_sum(image, nothing, line, REACH: tl.constexpr):
    total = nothing
    for oy in tl.static_range(-REACH, REACH + 1):
        for ox in tl.static_range(-REACH, REACH + 1):
            total += tl.load(image + (oy * line + ox))
    return total


@triton.jit
def _add(where, x, there):
    tl.store(where, tl.load(where, there, 0) + x, there)
