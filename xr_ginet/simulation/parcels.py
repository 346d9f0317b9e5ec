"""Farmland: blocks between roads, in each parallel strips, cut into plots; a plot is a parcel.

Also what varies within parcels by their geometry: gradients, crop rows, irrigation. What grows on them is not decided
here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

from .canvas import CELL, Double, Float, Index, random_stream

BLOCK = 620.0  # metres between the centres of blocks
MAX_STRIPS, MAX_PLOTS = 32, 16  # strips in a block, plots in a strip


@dataclass(frozen=True)
class Parcels:
    """Parcels in strips in blocks, and how far each cell ``(y, x)`` lies from their edges."""

    parcel: Index
    n_parcels: int
    block: Index
    neighbour: Index
    """The second nearest block."""
    to_block_edge: Float
    """Metres."""
    to_parcel_edge: Float
    """Metres."""
    kind: Float
    """Uniform, 0 to 1, one value per parcel."""
    rows: Float
    """Gradient and crop rows, as standard deviations of density."""
    irrigation: Float
    """Added to moisture."""


def draw_parcels(wy: Float, wx: Float, seed: int) -> Parcels:
    """Return the parcels over cells whose warped places, in metres, are ``wy`` and ``wx``."""
    rng = random_stream(seed, "blocks")
    sites, block, neighbour, to_block_edge = _draw_blocks(wy, wx, rng)
    n = len(sites)

    angle = rng.uniform(0, np.pi) + 0.35 * rng.standard_normal(n) + np.pi / 2 * rng.integers(0, 2, n)
    cosine, sine = np.cos(angle).astype(np.float32)[block], np.sin(angle).astype(np.float32)[block]
    dy, dx = wy - sites[:, 0].astype(np.float32)[block], wx - sites[:, 1].astype(np.float32)[block]
    u, v = cosine * dx + sine * dy, cosine * dy - sine * dx
    width = rng.lognormal(np.log(95), 0.45, n).clip(45, 240).astype(np.float32)
    length = (width * rng.uniform(1.6, 4.0, n)).clip(140, 520).astype(np.float32)

    n_strips = n * MAX_STRIPS
    strip, s, strip_edge = _cut(u, width[block], block, rng.uniform(-0.38, 0.38, (n, MAX_STRIPS + 1)))
    row = block * MAX_STRIPS + strip
    shift = rng.uniform(-0.5, 0.5, n_strips).astype(np.float32)[row] * length[block]
    plot, p, plot_edge = _cut(v + shift, length[block], row, rng.uniform(-0.3, 0.3, (n_strips, MAX_PLOTS + 1)))
    parcel = row * MAX_PLOTS + plot
    n_parcels = n_strips * MAX_PLOTS
    rows, irrigation = _draw_management(parcel, n_parcels, u, s, p, rng)
    return Parcels(
        parcel=parcel,
        n_parcels=n_parcels,
        block=block,
        neighbour=neighbour,
        to_block_edge=to_block_edge,
        to_parcel_edge=np.minimum(strip_edge, plot_edge),
        kind=rng.random(n_parcels).astype(np.float32)[parcel],
        rows=rows,
        irrigation=irrigation,
    )


def _draw_blocks(wy: Float, wx: Float, rng: np.random.Generator) -> tuple[Double, Index, Index, Float]:
    """Return jittered sites ``(n, 2)``, each cell's nearest and second nearest, and metres to the edge between them."""
    shape = wy.shape
    rows, columns = (int(n * CELL / BLOCK) + 4 for n in shape)
    grid = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1).reshape(-1, 2)
    sites = (grid - 1.5 + rng.uniform(-0.42, 0.42, grid.shape)) * BLOCK
    distance, nearest = cKDTree(sites).query(np.stack([wy.ravel(), wx.ravel()], -1), k=2)
    apart = np.linalg.norm(sites[nearest[:, 0]] - sites[nearest[:, 1]], axis=1)
    to_edge = (distance[:, 1] ** 2 - distance[:, 0] ** 2) / (2 * apart)
    block, neighbour = (index.astype(np.int32).reshape(shape) for index in nearest.T)
    return sites, block, neighbour, to_edge.astype(np.float32).reshape(shape)


def _cut(position: Float, width: Float, row: Index, jitter: Double) -> tuple[Index, Float, Float]:
    """Cut lines into pieces: which piece, where in it (0 to 1), metres to its nearer end. ``row`` picks the jitter."""
    count = jitter.shape[1] - 1
    flat = jitter.astype(np.float32).ravel()
    first = row * (count + 1)

    def start(piece: Index) -> Float:
        return piece + flat[first + piece]

    t = np.clip(position / width + np.float32(count / 2), 1, count - 1.001)
    whole = t.astype(np.int32)
    piece = whole - (t < start(whole)) + (t >= start(whole + 1))
    left, right = start(piece), start(piece + 1)
    return piece, (t - left) / (right - left), np.minimum(t - left, right - t) * width


def _draw_management(
    parcel: Index, n_parcels: int, u: Float, s: Float, p: Float, rng: np.random.Generator
) -> tuple[Float, Float]:
    """Return gradient and crop rows, and irrigation: ``u`` in metres across rows, ``s`` and ``p`` 0 to 1 in a plot."""

    def each(values: Double) -> Float:
        per_cell: Float = values.astype(np.float32)[parcel]
        return per_cell

    # Rows of 10 to 40 m along the strip. They are below what 20 m pixels resolve and above what 5 m cells do.
    period = rng.choice([12.0, 18.0, 24.0, 36.0], n_parcels)
    strength = np.where(rng.random(n_parcels) < 0.35, rng.uniform(0.4, 1.3, n_parcels), 0.0)
    rows = each(strength) * np.sin(u * each(2 * np.pi / period) + each(rng.uniform(0, 6.28, n_parcels)))
    gradient = each(0.5 * rng.standard_normal(n_parcels)) * (s - 0.5) * 2
    gradient += each(0.5 * rng.standard_normal(n_parcels)) * (p - 0.5) * 2
    # A straight edge that only the short-wave infrared sees: one part of some parcels has been watered.
    watered = np.where(rng.random(n_parcels) < 0.22, rng.uniform(0.2, 0.8, n_parcels), 2.0)
    return rows + gradient, np.where(p > each(watered), np.float32(1.7), np.float32(0))
