"""Attention with its gradient on processors, compiled: what training uses there.

The torch form in `attention` makes dozens of small planes per window position, and autograd as many again. Here images
lie within zeros, their rows end to end: so a window position is one shift for all pixels, each step one loop over a
plane that stays in the cache, and what leaves the image meets a zero. What loops leave in the margins is cut off. The
gradient makes the softmax once more, which takes no longer than to keep the planes of its weights.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .attention_cpu import _add, _divide, _exponential, _maximum, _multiply, _multiply_add, compiled


class Planes(NamedTuple):
    """How images ``(…, H, W)`` lie within zeros, as flat planes."""

    margin: int
    height: int
    width: int
    window_size: int

    @classmethod
    def of(cls, z: Tensor, heads: NDArray, window_size: int) -> Planes:
        """Return them with margins that windows and patches do not leave."""
        height, width = z.shape[2:]
        return cls(window_size // 2 + int(heads[:, 3].max()) // 2, height, width, window_size)

    @property
    def row(self) -> int:
        """Return the length of a row, margins included."""
        return self.width + 2 * self.margin

    def lay(self, image: Tensor) -> NDArray:
        """Return the planes of an image."""
        return F.pad(image.detach(), (self.margin,) * 4).flatten(-2).numpy()

    def cut(self, planes: NDArray) -> Tensor:
        """Return the image in some planes."""
        image = torch.from_numpy(planes).unflatten(-1, (-1, self.row))
        return image[..., self.margin : self.margin + self.height, self.margin : self.margin + self.width]

    def work(self, function: Any, *arrays: NDArray) -> None:
        """Call a compiled function of some arrays and of how they lie, in as many threads as torch has."""
        steps = range(-(self.window_size // 2), self.window_size // 2 + 1)
        shifts = np.array([dy * self.row + dx for dy in steps for dx in steps])
        inside = self.lay(torch.ones(self.height, self.width, dtype=torch.float32))
        start = self.margin * self.row + self.margin
        stop = start + (self.height - 1) * self.row + self.width
        threads = torch.get_num_threads()
        with ThreadPoolExecutor(threads) as pool:
            share = partial(function, *arrays, inside, shifts, self.row, start, stop, threads)
            list(pool.map(share, range(threads)))


def means(queries: Tensor, z: Tensor, heads: NDArray, n_values: int, window_size: int) -> Tensor:
    """Return what `attention_grad.Attend` does."""
    planes = Planes.of(z, heads, window_size)
    q, keys = planes.lay(queries), planes.lay(z)
    out = np.zeros((len(z), len(heads), n_values, keys.shape[-1]), np.float32)
    planes.work(_means, out, q, keys, heads)
    return planes.cut(out).flatten(1, 2)


def gradients(
    gradient: Tensor, queries: Tensor, z: Tensor, heads: NDArray, n_values: int, window_size: int
) -> tuple[Tensor, Tensor]:
    """Return what `attention_grad.Gradients` does."""
    planes = Planes.of(z, heads, window_size)
    q, keys, g = planes.lay(queries), planes.lay(z), planes.lay(gradient.unflatten(1, (len(heads), n_values)))
    d_queries = np.zeros_like(q)
    d_keys = np.zeros((len(z), len(heads), *keys.shape[1:]), np.float32)  # each head's own, so that none waits
    planes.work(_gradients, d_queries, d_keys, g, q, keys, heads)
    return planes.cut(d_queries), planes.cut(d_keys.sum(1))


@compiled
def _means(
    out: NDArray,  # (N, heads, Cv, plane)
    queries: NDArray,  # (N, Q, plane)
    keys: NDArray,  # (N, C, plane)
    heads: NDArray,  # (heads, 4)
    inside: NDArray,  # (plane,): 1 in the image, 0 in the margins
    shifts: NDArray,  # (positions,)
    row: int,
    start: int,
    stop: int,
    threads: int,
    thread: int,
) -> None:
    weights, scratch = np.empty((shifts.size, stop - start), np.float32), np.zeros((4, inside.size), np.float32)
    for task in range(thread, keys.shape[0] * heads.shape[0], threads):
        i, h = task // heads.shape[0], task % heads.shape[0]
        query, key, n_keys, patch_size = heads[h]
        mine, its = queries[i, query : query + n_keys], keys[i, key : key + n_keys]
        _exponentials(weights, mine, its, inside, shifts, patch_size, row, start, stop, scratch)
        for c in range(out.shape[2]):
            for k in range(shifts.size):
                values = keys[i, c, start + shifts[k] : stop + shifts[k]]
                _multiply_add(out[i, h, c, start:stop], weights[k], values)
            _divide(out[i, h, c, start:stop], scratch[3, start:stop])


@compiled
def _gradients(
    d_queries: NDArray,  # (N, Q, plane)
    d_keys: NDArray,  # (N, heads, C, plane)
    gradient: NDArray,  # (N, heads, Cv, plane), zero outside the image
    queries: NDArray,
    keys: NDArray,
    heads: NDArray,
    inside: NDArray,
    shifts: NDArray,
    row: int,
    start: int,
    stop: int,
    threads: int,
    thread: int,
) -> None:
    weights = np.empty((shifts.size, stop - start), np.float32)
    d_weights = np.empty_like(weights)
    scratch = np.zeros((4, inside.size), np.float32)
    products, sums, common, total = scratch[0], scratch[1], scratch[2, start:stop], scratch[3, start:stop]
    g, d_logits = np.empty((gradient.shape[2], stop - start), np.float32), np.empty(stop - start, np.float32)
    for task in range(thread, keys.shape[0] * heads.shape[0], threads):
        i, h = task // heads.shape[0], task % heads.shape[0]
        query, key, n_keys, patch_size = heads[h]
        mine, its = queries[i, query : query + n_keys], keys[i, key : key + n_keys]
        _exponentials(weights, mine, its, inside, shifts, patch_size, row, start, stop, scratch)
        d_key = d_keys[i, h]
        for c in range(g.shape[0]):
            g[c] = gradient[i, h, c, start:stop]
            _divide(g[c], total)
        common[:] = 0
        for k in range(shifts.size):
            a, b = start + shifts[k], stop + shifts[k]
            d_weights[k] = 0
            for c in range(g.shape[0]):
                _multiply_add(d_weights[k], g[c], keys[i, c, a:b])
                _multiply_add(d_key[c, a:b], weights[k], g[c])
            _multiply_add(common, weights[k], d_weights[k])
        _divide(common, total)
        for k in range(shifts.size):
            a, b = start + shifts[k], stop + shifts[k]
            _softmax_gradient(products[start:stop], weights[k], d_weights[k], common, inside[a:b])
            _box_sum(d_logits, products, sums, patch_size, row, start, stop)
            for c in range(n_keys):
                _multiply_add(d_queries[i, query + c, start:stop], d_logits, its[c, a:b])
                _multiply_add(d_key[key + c, a:b], d_logits, mine[c, start:stop])


@compiled
def _exponentials(
    weights: NDArray,  # (positions, span)
    queries: NDArray,  # (C, plane)
    keys: NDArray,  # (C, plane)
    inside: NDArray,
    shifts: NDArray,
    patch_size: int,
    row: int,
    start: int,
    stop: int,
    scratch: NDArray,  # (4, plane)
) -> None:
    """Write the softmax's exponential of each window position for each pixel, and their sums into the last scratch."""
    products, sums, largest, total = scratch[0], scratch[1], scratch[2, start:stop], scratch[3, start:stop]
    for k in range(shifts.size):
        a, b = start + shifts[k], stop + shifts[k]
        _multiply(products[start:stop], queries[0, start:stop], keys[0, a:b])
        for c in range(1, queries.shape[0]):
            _multiply_add(products[start:stop], queries[c, start:stop], keys[c, a:b])
        _box_sum(weights[k], products, sums, patch_size, row, start, stop)
        _scale(weights[k], inside[a:b])
        if k == 0:
            largest[:] = weights[k]
        else:
            _maximum(largest, weights[k])
    total[:] = 0
    exponents = np.empty(stop - start, np.int32)
    for k in range(shifts.size):
        _exponential(weights[k], largest, exponents)
        _add(total, weights[k])


@compiled
def _box_sum(out: NDArray, plane: NDArray, sums: NDArray, patch_size: int, row: int, start: int, stop: int) -> None:
    """Write the sums over ``patch_size × patch_size`` pixels of a plane that is zero outside the image."""
    reach = patch_size // 2
    rows = sums[start:stop]
    rows[:] = plane[start - reach : stop - reach]
    for d in range(1, patch_size):
        _add(rows, plane[start - reach + d : stop - reach + d])
    out[:] = sums[start - reach * row : stop - reach * row]
    for d in range(1, patch_size):
        _add(out, sums[start + (d - reach) * row : stop + (d - reach) * row])


@compiled
def _scale(out: NDArray, x: NDArray) -> None:
    for i in range(out.size):
        out[i] *= x[i]


@compiled
def _softmax_gradient(out: NDArray, weights: NDArray, d_weights: NDArray, common: NDArray, inside: NDArray) -> None:
    for i in range(out.size):
        out[i] = weights[i] * (d_weights[i] - common[i]) * inside[i]
