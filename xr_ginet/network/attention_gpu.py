"""The attention on CUDA devices, as one Triton kernel for all heads: nothing but the output is written to memory.

A thread takes a few pixels one above the other. Row by row of the window it makes the products of rows of patches, each
of which is a part of several pixels' patches, and takes the logits that they sum up to into running softmaxes. A second
kernel makes the attention's images of those that a correction starts from.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 3, 128
"""Pixels of a program of the attention; columns: a power of two. Of 2 to 4 rows the fastest on an H200."""
EMBEDDED = 2, 64
"""The same of the other kernel, both powers of two."""


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
    rows, columns = EMBEDDED
    _embed[triton.cdiv(shape[1], columns), triton.cdiv(shape[0], rows), n](
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
        ROWS=rows,
        COLUMNS=columns,
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
    """Write ``ROWS × COLUMNS`` pixels of one image's output, a column by each thread."""
    SIDE: tl.constexpr = 2 * RADIUS + 1
    HEAD: tl.constexpr = X + 2  # largest logit, denominator and weighted sum of each value so far
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    x = tl.minimum(column, width - 1)  # so that no load needs a mask
    top = tl.program_id(1) * ROWS
    line = width + 2 * margin
    plane = (height + 2 * margin) * line
    image = tl.program_id(2).to(tl.int64)
    queries += image * 2 * (X + Y) * plane
    keys += image * (X + Y) * plane
    out += image * image_stride
    nothing = tl.zeros((COLUMNS,), tl.float32)

    heads = ()  # three of each pixel, one after the other
    for _ in tl.static_range(ROWS * 3):
        heads = heads + (nothing - float("inf"),) + _repeat(nothing, X + 1)
    for dy in range(-RADIUS, RADIUS + 1):
        patches = _repeat(nothing, ROWS * 2 * SIDE)  # the geometric and the mixed head's logits of each pixel
        for row in tl.static_range(-REACH, ROWS + REACH):
            here = (tl.minimum(top + row, height - 1 + REACH) + margin) * line + x + margin
            products = _products(queries, keys + dy * line, here, nothing, plane, X, Y, RADIUS, REACH)
            added = ()
            for r in tl.static_range(ROWS):
                for k in tl.static_range(2 * SIDE):
                    if row == r - REACH:
                        added = added + (products[k],)
                    elif r - REACH < row and row <= r + REACH:
                        added = added + (patches[r * 2 * SIDE + k] + products[k],)
                    else:
                        added = added + (patches[r * 2 * SIDE + k],)
            patches = added
        updated = ()
        for r in tl.static_range(ROWS):
            y = tl.minimum(top + r, height - 1)
            here = (y + margin) * line + x + margin
            values, pixels = (), _repeat(nothing, SIDE)
            for c in tl.static_range(X):
                query = tl.load(queries + (Y + c) * plane + here)
                logits = ()
                for k in tl.static_range(SIDE):
                    value = tl.load(keys + (c * plane + dy * line + k - RADIUS) + here)
                    values = values + (value,)
                    logits = logits + (pixels[k] + query * value,)
                pixels = logits
            within = (y + dy >= 0) & (y + dy < height)
            its, before = patches[r * 2 * SIDE : (r + 1) * 2 * SIDE], heads[r * 3 * HEAD : (r + 1) * 3 * HEAD]
            updated = updated + _take_up(before[:HEAD], its[:SIDE], values, x, within, width, X, SIDE)
            updated = updated + _take_up(before[HEAD : 2 * HEAD], pixels, values, x, within, width, X, SIDE)
            updated = updated + _take_up(before[2 * HEAD :], its[SIDE:], values, x, within, width, X, SIDE)
        heads = updated
    for r in tl.static_range(ROWS):
        if top + r < height:
            here = out + (top + r) * row_stride + x * column_stride
            for o in tl.static_range(X):
                total = nothing + tl.load(bias)
                for head in tl.static_range(3):
                    for c in tl.static_range(X):
                        mean = heads[(r * 3 + head) * HEAD + 2 + c] / heads[(r * 3 + head) * HEAD + 1]
                        total += tl.load(mix + ((head * X + o) * X + c)) * mean
                tl.store(here + o * channel_stride, total, column < width)


@triton.jit
def _repeat(x, n: tl.constexpr):
    """Return a tuple."""
    many = ()
    for _ in tl.static_range(n):
        many = many + (x,)
    return many


@triton.jit
def _products(
    queries, keys, here, nothing, plane, X: tl.constexpr, Y: tl.constexpr, RADIUS: tl.constexpr, REACH: tl.constexpr
):
    """Return the products of one row of patches per column of the window, geometric ones first: a tuple."""
    geometric, mixed = _repeat(nothing, 2 * RADIUS + 1), _repeat(nothing, 2 * RADIUS + 1)
    for c in range(X):
        key = keys + c * plane + here
        mixed = _add_products(mixed, queries + (X + Y + c) * plane + here, key, RADIUS, REACH)
    for c in range(Y):
        key = keys + (X + c) * plane + here  # the compiler loads once what is here many times
        geometric = _add_products(geometric, queries + c * plane + here, key, RADIUS, REACH)
        mixed = _add_products(mixed, queries + (2 * X + Y + c) * plane + here, key, RADIUS, REACH)
    return geometric + mixed


@triton.jit
def _add_products(sums, query, key, RADIUS: tl.constexpr, REACH: tl.constexpr):
    """Return the sums with one channel's part."""
    for o in tl.static_range(-REACH, REACH + 1):
        q = tl.load(query + o)
        added = ()
        for dx in tl.static_range(-RADIUS, RADIUS + 1):
            added = added + (sums[dx + RADIUS] + q * tl.load(key + (o + dx)),)
        sums = added
    return sums


@triton.jit
def _take_up(head, logits, values, x, within, width, X: tl.constexpr, SIDE: tl.constexpr):
    """Return a head's running softmax, ``(largest logit, denominator, sum of each value)``, with one row more."""
    met = ()
    for k in tl.static_range(SIDE):
        there = x + (k - SIDE // 2)
        met = met + (tl.where((there >= 0) & (there < width) & within, logits[k], 0),)
    largest = head[0]
    for k in tl.static_range(SIDE):
        largest = tl.maximum(largest, met[k])
    share = tl.exp(head[0] - largest)
    total, sums = head[1] * share, ()
    for c in tl.static_range(X):
        sums = sums + (head[2 + c] * share,)
    for k in tl.static_range(SIDE):
        weight = tl.exp(met[k] - largest)
        total += weight
        added = ()
        for c in tl.static_range(X):
            added = added + (sums[c] + weight * values[c * SIDE + k],)
        sums = added
    return (largest, total) + sums


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
