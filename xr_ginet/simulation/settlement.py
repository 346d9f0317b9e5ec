"""What people built: villages and farms, lanes and roads.

Not houses true to life: a roof is a rectangle of one spectrum, its shadow another beside it.
"""

from __future__ import annotations

import numpy as np

from .canvas import CELL, Double, Float, distance_to_curve, random_stream, smooth
from .land import Land
from .parcels import Parcels
from .spectra import ROOFS


def draw_villages(land: Land) -> None:
    """Draw villages of gardens, lanes and houses, and single farms with a large hall."""
    rng = random_stream(land.seed, "villages")
    height, breadth = land.extent
    frayed = smooth(land.shape, 70, rng)
    for _ in range(max(1, round(height * breadth / 6e6))):
        centre = rng.uniform(0.1, 0.9, 2) * (height, breadth)
        _draw_village(land, centre, rng.uniform(130, 330), frayed, rng)
    for _ in range(max(1, round(height * breadth / 1.2e6))):
        centre = rng.uniform(0, 1, 2) * (height, breadth)
        _draw_village(land, centre, rng.uniform(28, 55), frayed, rng, pitch=rng.uniform(38, 55), fill=0.7)


def _draw_village(
    land: Land,
    centre: Double,
    radius: float,
    frayed: Float,
    rng: np.random.Generator,
    *,
    pitch: float = 26.0,
    fill: float = 0.65,
) -> None:
    """Draw plots of ``pitch`` metres in rows, lanes between every two, a house in most and its shadow behind it."""
    window = land.window(centre, 1.5 * radius)
    rows, columns = (np.arange(s.start, s.stop, dtype=np.float32) * np.float32(CELL) for s in window)
    dy, dx = rows[:, None] - np.float32(centre[0]), columns[None, :] - np.float32(centre[1])
    angle = rng.uniform(0, np.pi)
    u, v = np.cos(angle) * dx + np.sin(angle) * dy, np.cos(angle) * dy - np.sin(angle) * dx
    u, v = (u + 12 * np.sin(v / 90)).astype(np.float32), v.astype(np.float32)
    within = np.hypot(dy, dx) + 0.22 * radius * frayed[window] < radius
    within &= ~land.is_water(window)

    half = int(1.5 * radius / pitch) + 2
    i, j = (np.clip(np.floor(q / pitch).astype(np.int32) + half, 0, 2 * half - 1) for q in (u, v))
    cell = i * (2 * half) + j
    n = (2 * half) ** 2
    lane_u, lane_v = np.abs((u + pitch) % (2 * pitch) - pitch), np.abs((v + 3 * pitch) % (6 * pitch) - 3 * pitch)
    land.paint(within, "garden", cell, window=window)
    land.paint(within & (np.minimum(lane_u, lane_v) < 3.0), "asphalt", window=window)

    size = rng.uniform(0.15, 0.34, (2, n)).astype(np.float32) * np.float32(pitch)
    shift = rng.uniform(-0.08, 0.08, (2, n)).astype(np.float32) * np.float32(pitch)
    built = (rng.random(n) < fill)[cell] & (rng.random(n)[cell] < 1.6 - np.hypot(dy, dx) / np.float32(radius))
    sun_u, sun_v = 4 * (np.cos(angle) + np.sin(angle)), 4 * (np.cos(angle) - np.sin(angle))  # in the south-east
    u, v = ((q / pitch - np.floor(q / pitch) - 0.5) * np.float32(pitch) for q in (u, v))
    roof = rng.choice(len(ROOFS), n, p=[0.47, 0.22, 0.04, 0.22, 0.05])[cell]
    du, dv = u - shift[0][cell], v - shift[1][cell]
    shadow = (np.abs(du + sun_u) < size[0][cell]) & (np.abs(dv + sun_v) < size[1][cell])
    land.paint(within & built & shadow, "shadow", window=window)
    house = within & built & (np.abs(du) < size[0][cell]) & (np.abs(dv) < size[1][cell])
    for number, name in enumerate(ROOFS):
        land.paint(house & (roof == number), name, cell, window=window)


def draw_roads(land: Land, parcels: Parcels, wy: Float, wx: Float) -> None:
    """Draw lanes and tracks between blocks, cut by water, and two main roads, one with a bridge over the river."""
    rng = random_stream(land.seed, "roads")
    height, breadth = land.extent
    n_blocks = int(max(parcels.block.max(), parcels.neighbour.max())) + 1
    fate = rng.random(n_blocks)
    edge = (fate[parcels.block] + fate[parcels.neighbour]) % 1  # the same from both sides
    dry = ~land.is_water()
    land.paint(dry & (parcels.to_block_edge < 2.6) & (edge < 0.35), "gravel", parcels.block)
    land.paint(dry & (parcels.to_block_edge < 3.4) & (edge > 0.55), "asphalt")
    land.paint(dry & (parcels.to_block_edge > 5) & (parcels.to_block_edge < 11) & (edge > 0.85), "hedge")

    for start, along, across in ((height * rng.uniform(0.2, 0.8), wx, wy), (breadth * rng.uniform(0.6, 0.85), wy, wx)):
        road = np.abs(distance_to_curve(along, across, rng, start=start, reach=70, period=4200))
        land.paint(road < 11, "margin")
        land.paint(road < 7, "asphalt")
