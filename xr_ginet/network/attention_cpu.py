"""One attention head on processors, compiled: rows stay in the cache, and no plane per window position is kept.

The torch form in `attention` writes a plane per window position and head to memory and reads it again for each step of
the softmax. Here a thread takes a few rows: the products of one row with its window, their box sums over the last
``patch_size`` rows, the softmax and the weighted sum follow each other while the row is at hand. Loops run along rows,
which compilers turn into vector instructions. A pixel's sums are in one order wherever it lies and whoever works on it:
they do not depend, to the last bit, on how an image is cut.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

ROWS, COLUMNS = 64, 320
"""Pixels that a thread takes at once: the rows around them are worked on twice, the row's window must fit the cache."""

f32 = np.float32


def compiled(function: Callable[..., None]) -> Any:
    """Compile a function at its first call, once per machine where the compiled code can be kept."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
    try:
        return numba.njit(function, cache=True, **options)
    except RuntimeError:  # no folder that can be written to
        return numba.njit(function, **options)


def attend(
    out: NDArray,
    keys: NDArray,
    values: NDArray,
    metric: NDArray,
    mix: NDArray,
    *,
    margin: int,
    window_size: int,
    patch_size: int,
    threads: int,
) -> None:
    """Add ``mix`` of the sum over each pixel's window of ``values``, weighted by the softmax of patchwise products.

    Parameters
    ----------
    out : (N, Cv, H, W), float32
        What is added to.
    keys : (N, C, margin + H + margin, margin + W + margin), float32
        The image within zeros. The logit of a window position is the inner product of the queries' patch around the
        pixel and the keys' patch around the position, 0 where the position lies outside the image.
    values : (N, Cv, margin + H + margin, margin + W + margin), float32
        Likewise: zero outside the image, with the weight that the logit 0 gives.
    metric : (C, C), float32
        What makes queries of the keys.
    mix : (Cv, Cv), float32
    margin : int
        At least ``window_size // 2 + patch_size // 2``.
    window_size, patch_size : int
        Odd widths in pixels.
    threads : int
        How many to work with.
    """
    n, _, height, width = out.shape

    def work(part: tuple[int, int, int]) -> None:
        i, top, left = part
        bottom, right = min(top + ROWS, height), min(left + COLUMNS, width)
        shape = margin, window_size, patch_size, top, bottom, left, right
        _attend(out[i], keys[i], values[i], metric, mix, *shape)

    parts = product(range(n), range(0, height, ROWS), range(0, width, COLUMNS))
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, parts))


@compiled
def _attend(
    out: NDArray,  # (Cv, H, W)
    keys: NDArray,  # (C, margin + H + margin, margin + W + margin), as values
    values: NDArray,
    metric: NDArray,
    mix: NDArray,
    margin: int,
    window_size: int,
    patch_size: int,
    top: int,
    bottom: int,
    left: int,
    right: int,
) -> None:
    """Add the rows ``top:bottom`` and columns ``left:right`` of one image's output."""
    n_values, height, width = out.shape
    radius, reach = window_size // 2, patch_size // 2
    size = right - left
    n_positions = window_size * window_size
    queries = np.empty((keys.shape[0], size + 2 * reach), f32)
    products = np.empty(size + 2 * reach, f32)
    sums = np.empty((n_positions, patch_size, size), f32)  # of the last rows' products, over a patch's width
    logits = np.empty((n_positions, size), f32)
    largest, total = np.empty(size, f32), np.empty(size, f32)
    mean = np.empty((n_values, size), f32)
    exponents = np.empty(size, np.int32)
    a, b = left - reach + margin, right + reach + margin
    for below in range(top - reach, bottom + reach):  # the lowest row of the patches around ``row``
        y = below + margin
        for q in range(keys.shape[0]):
            queries[q] = 0
            for c in range(keys.shape[0]):
                _add_scaled(queries[q], keys[c, y, a:b], metric[q, c])
        for k in range(n_positions):
            dy, dx = k // window_size - radius, k % window_size - radius
            _multiply(products, queries[0], keys[0, y + dy, a + dx : b + dx])
            for c in range(1, keys.shape[0]):
                _multiply_add(products, queries[c], keys[c, y + dy, a + dx : b + dx])
            line = sums[k, below % patch_size]
            line[:] = products[:size]
            for d in range(1, patch_size):
                _add(line, products[d : d + size])
        row = below - reach
        if row < top:
            continue

        for k in range(n_positions):
            dy, dx = k // window_size - radius, k % window_size - radius
            line = logits[k]
            line[:] = sums[k, (below + 1) % patch_size]
            for d in range(2, patch_size + 1):  # from the uppermost row on, wherever the part begins
                _add(line, sums[k, (below + d) % patch_size])
            if row + dy < 0 or row + dy >= height:
                line[:] = 0
            else:
                line[: max(0, -left - dx)] = 0
                line[max(0, width - dx - left) :] = 0
            if k == 0:
                largest[:] = line
            else:
                _maximum(largest, line)

        total[:] = 0
        mean[:] = 0
        for k in range(n_positions):
            dy, dx = k // window_size - radius, k % window_size - radius
            _exponential(logits[k], largest, exponents)
            _add(total, logits[k])
            for c in range(n_values):
                line = values[c, row + dy + margin, left + dx + margin : right + dx + margin]
                _multiply_add(mean[c], logits[k], line)
        for c in range(n_values):
            _divide(mean[c], total)
        for v in range(n_values):
            for c in range(n_values):
                _add_scaled(out[v, row, left:right], mean[c], mix[v, c])


@compiled
def _multiply(out: NDArray, x: NDArray, y: NDArray) -> None:
    for i in range(out.size):
        out[i] = x[i] * y[i]


@compiled
def _multiply_add(out: NDArray, x: NDArray, y: NDArray) -> None:
    for i in range(out.size):
        out[i] += x[i] * y[i]


@compiled
def _add(out: NDArray, x: NDArray) -> None:
    for i in range(out.size):
        out[i] += x[i]


@compiled
def _add_scaled(out: NDArray, x: NDArray, factor: float) -> None:
    for i in range(out.size):
        out[i] += x[i] * factor


@compiled
def _divide(out: NDArray, x: NDArray) -> None:
    for i in range(out.size):
        out[i] /= x[i]


@compiled
def _maximum(out: NDArray, x: NDArray) -> None:
    for i in range(out.size):
        out[i] = np.maximum(x[i], out[i])


@compiled
def _exponential(x: NDArray, largest: NDArray, exponents: NDArray) -> None:
    """Replace ``x`` by ``exp(x - largest)``, to two units in the last place; NaN stays NaN.

    numpy's exponential would be called number by number. Here ``exp(v)`` is ``2ⁿ exp(r)`` with ``|r| ≤ ln 2 / 2``, a
    polynomial of ``r`` and the power of two from its bits.

    References
    ----------
    Cody, Waite: "Software Manual for the Elementary Functions", 1980; coefficients of the Cephes library's `expf`.
    """
    for i in range(x.size):
        v = x[i] - largest[i]
        v = f32(-87) if v < f32(-87) else v  # below it the power of two is no normal number
        n = np.floor(v * f32(1.44269504) + f32(0.5))
        r = v - n * f32(0.693359375) + n * f32(2.12194440e-4)
        p = f32(1.9875691500e-4)
        p = p * r + f32(1.3981999507e-3)
        p = p * r + f32(8.3334519073e-3)
        p = p * r + f32(4.1665795894e-2)
        p = p * r + f32(1.6666665459e-1)
        p = p * r + f32(5.0000001201e-1)
        x[i] = p * r * r + r + f32(1)
        exponents[i] = (np.int32(n) + np.int32(127)) << np.int32(23)
    powers = exponents.view(f32)
    for i in range(x.size):
        x[i] *= powers[i]
