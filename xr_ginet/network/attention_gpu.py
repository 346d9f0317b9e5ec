"""The attention on CUDA devices, as one Triton kernel for all heads: nothing but the output is written to memory.

A program takes a few rows of pixels. Row by row of the window it sums the products of patches, which lie in the cache,
and takes each position up in a running softmax: largest logit, denominator and weighted sum so far. A second kernel
makes the attention's images of those that a correction starts from.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 2, 64
"""Pixels of a program: powers of two."""


def attend(
    queries: Tensor,
    keys: Tensor,
    mix: Tensor,
    bias: Tensor,
    *,
    margin: int,
    window_size: int,
    patch_size: int,
    out: Tensor | None = None,
) -> Tensor:
    """Return the affine combination of the three heads' window means.

    Parameters
    ----------
    queries : (N, Cy + Cx + Cx + Cy, margin + H + margin, margin + W + margin), float32
        Of the geometric, the spectral and the mixed head, within zeros.
    keys : (N, Cx + Cy, margin + H + margin, margin + W + margin), float32
        The images ``x`` and ``y`` themselves, within zeros; the values are ``x``.
    mix : (3, Cx, Cx), float32
        What takes each head's mean of the values to its part of the output.
    bias : (1,), float32
    margin : int
        At least ``window_size // 2 + patch_size // 2``.
    window_size, patch_size : int
        Odd widths in pixels.
    out : (N, Cx, H, W), optional
        Where to write to, of any dtype and strides.

    Returns
    -------
    (N, Cx, H, W), float32 if not in ``out``
    """
    n, _, height, width = keys.shape
    height, width, channels = height - 2 * margin, width - 2 * margin, mix.shape[1]
    if out is None:
        out = torch.empty((n, channels, height, width), dtype=keys.dtype, device=keys.device)
    _attend[triton.cdiv(width, COLUMNS), triton.cdiv(height, ROWS), n](
        queries.contiguous(),
        keys.contiguous(),
        mix.contiguous(),
        bias,
        out,
        *out.stride(),
        height,
        width,
        margin,
        X=channels,
        Y=keys.shape[1] - channels,
        RADIUS=window_size // 2,
        REACH=patch_size // 2,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
    )
    return out


def embed(
    error: Tensor,
    guide: Tensor,
    error_weight: Tensor,
    guide_weight: Tensor,
    metrics: Tensor,
    beside: Tensor,
    *,
    margin: int,
) -> tuple[Tensor, Tensor]:
    """Return queries and keys for `attend` of the images that a correction starts from.

    Parameters
    ----------
    error, guide : (N, B, H, W), float32
    error_weight, guide_weight : (Cx, B, 3, 3), (Cy, B, 3, 3), float32
        Convolutions of them.
    metrics : (Cy + Cx + Cx + Cy, Cx + Cy), float32
        What takes keys to queries.
    beside : (N, C, H, W)
        Of any dtype and strides: behind its first Cx channels ``error``, ``guide`` and zeros are written.
    margin : int
        Zeros around queries and keys.
    """
    n, bands, height, width = error.shape
    shape = height + 2 * margin, width + 2 * margin
    queries, keys = (torch.empty((n, c, *shape), dtype=error.dtype, device=error.device) for c in metrics.shape)
    _embed[triton.cdiv(shape[1], COLUMNS), triton.cdiv(shape[0], ROWS), n](
        *(tensor.contiguous() for tensor in (error, guide, error_weight, guide_weight, metrics)),
        queries,
        keys,
        beside,
        *beside.stride(),
        height,
        width,
        margin,
        BANDS=bands,
        X=len(error_weight),
        Y=len(guide_weight),
        BESIDE=beside.shape[1],
        ROWS=ROWS,
        COLUMNS=COLUMNS,
    )
    return queries, keys


@triton.jit
def _attend(
    queries,
    keys,
    mix,
    bias,
    out,
    image_stride,
    channel_stride,
    row_stride,
    column_stride,
    height,
    width,
    margin,
    X: tl.constexpr,
    Y: tl.constexpr,
    RADIUS: tl.constexpr,
    REACH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write ``ROWS × COLUMNS`` pixels of one image's output."""
    lane = tl.arange(0, ROWS * COLUMNS)
    y = tl.program_id(1) * ROWS + lane // COLUMNS
    x = tl.program_id(0) * COLUMNS + lane % COLUMNS
    there = (y < height) & (x < width)
    line = width + 2 * margin
    plane = (height + 2 * margin) * line
    here = (y + margin) * line + x + margin
    image = tl.program_id(2).to(tl.int64)
    queries += image * 2 * (X + Y) * plane
    keys += image * (X + Y) * plane
    out += image * image_stride

    geometric = _mean(
        queries, keys + X * plane, keys, here, there, y, x, height, width, plane, line, Y, X, RADIUS, REACH
    )
    spectral = _mean(queries + Y * plane, keys, keys, here, there, y, x, height, width, plane, line, X, X, RADIUS, 0)
    mixed = _mean(
        queries + (X + Y) * plane, keys, keys, here, there, y, x, height, width, plane, line, X + Y, X, RADIUS, REACH
    )
    for o in tl.static_range(X):
        total = tl.zeros((ROWS * COLUMNS,), tl.float32) + tl.load(bias)
        for c in tl.static_range(X):
            total += tl.load(mix + (o * X + c)) * geometric[c]
            total += tl.load(mix + ((X + o) * X + c)) * spectral[c]
            total += tl.load(mix + ((2 * X + o) * X + c)) * mixed[c]
        tl.store(out + o * channel_stride + y * row_stride + x * column_stride, total, there)


@triton.jit
def _mean(
    queries,
    keys,
    values,
    here,
    there,
    y,
    x,
    height,
    width,
    plane,
    line,
    N_KEYS: tl.constexpr,
    N_VALUES: tl.constexpr,
    RADIUS: tl.constexpr,
    REACH: tl.constexpr,
):
    """Return one head's mean of each value: a tuple."""
    nothing = tl.zeros(here.shape, tl.float32)
    largest, total = nothing + float("-inf"), nothing
    sums = ()  # of the values, weighted
    for _ in tl.static_range(N_VALUES):
        sums = sums + (nothing,)
    for dy in range(-RADIUS, RADIUS + 1):
        logits = ()
        for _ in tl.static_range(2 * RADIUS + 1):
            logits = logits + (nothing,)
        for c in range(N_KEYS):
            query, key = queries + c * plane + here, keys + c * plane + dy * line + here
            added = ()
            for dx in tl.static_range(-RADIUS, RADIUS + 1):
                logit = logits[dx + RADIUS]
                for oy in tl.static_range(-REACH, REACH + 1):
                    for ox in tl.static_range(-REACH, REACH + 1):  # the compiler loads once what is here many times
                        q = tl.load(query + (oy * line + ox), there, 0)
                        logit += q * tl.load(key + (oy * line + (dx + ox)), there, 0)
                added = added + (logit,)
            logits = added
        for dx in tl.static_range(-RADIUS, RADIUS + 1):
            inside = (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
            logit = tl.where(inside, logits[dx + RADIUS], 0)
            before = largest
            largest = tl.maximum(largest, logit)
            share, weight = tl.exp(before - largest), tl.exp(logit - largest)
            total = total * share + weight
            updated = ()
            for c in tl.static_range(N_VALUES):
                value = tl.load(values + (c * plane + dy * line + dx) + here, there, 0)
                updated = updated + (sums[c] * share + weight * value,)
            sums = updated
    means = ()
    for c in tl.static_range(N_VALUES):
        means = means + (sums[c] / total,)
    return means


@triton.jit
def _embed(
    error,
    guide,
    error_weight,
    guide_weight,
    metrics,
    queries,
    keys,
    beside,
    image_stride,
    channel_stride,
    row_stride,
    column_stride,
    height,
    width,
    margin,
    BANDS: tl.constexpr,
    X: tl.constexpr,
    Y: tl.constexpr,
    BESIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write ``ROWS × COLUMNS`` pixels of one image's queries and keys, and of what goes beside."""
    lane = tl.arange(0, ROWS * COLUMNS)
    top, left = tl.program_id(1) * ROWS + lane // COLUMNS, tl.program_id(0) * COLUMNS + lane % COLUMNS
    line = width + 2 * margin
    plane = (height + 2 * margin) * line
    y, x = top - margin, left - margin
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    image = tl.program_id(2).to(tl.int64)
    error += image * BANDS * height * width
    guide += image * BANDS * height * width
    there = (top < height + 2 * margin) & (left < line)
    here = top * line + left

    both = _convolve(error, error_weight, inside, y, x, height, width, BANDS, X)
    both = both + _convolve(guide, guide_weight, inside, y, x, height, width, BANDS, Y)
    for c in tl.static_range(X + Y):
        tl.store(keys + (image * (X + Y) + c) * plane + here, both[c], there)
    for q in tl.static_range(2 * (X + Y)):
        query = tl.zeros((ROWS * COLUMNS,), tl.float32)
        for c in tl.static_range(X + Y):
            query += tl.load(metrics + (q * (X + Y) + c)) * both[c]
        tl.store(queries + (image * 2 * (X + Y) + q) * plane + here, query, there)

    beside += image * image_stride + y * row_stride + x * column_stride
    for c in tl.static_range(BANDS):
        centre = c * height * width + y * width + x
        tl.store(beside + (X + c) * channel_stride, tl.load(error + centre, inside, 0), inside)
        tl.store(beside + (X + BANDS + c) * channel_stride, tl.load(guide + centre, inside, 0), inside)
    for c in tl.static_range(X + 2 * BANDS, BESIDE):
        tl.store(beside + c * channel_stride, tl.zeros((ROWS * COLUMNS,), tl.float32), inside)


@triton.jit
def _convolve(image, weight, inside, y, x, height, width, BANDS: tl.constexpr, OUT: tl.constexpr):
    """Return the channels of a 3 × 3 convolution, zero outside the image: a tuple."""
    sums = ()
    for _ in tl.static_range(OUT):
        sums = sums + (tl.zeros(x.shape, tl.float32),)
    for c in range(BANDS):
        for tap in tl.static_range(9):
            row, column = y + (tap // 3 - 1), x + (tap % 3 - 1)
            there = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            value = tl.load(image + c * height * width + row * width + column, there, 0)
            added = ()
            for o in tl.static_range(OUT):
                added = added + (sums[o] + value * tl.load(weight + ((o * BANDS + c) * 9 + tap)),)
            sums = added
    return sums
