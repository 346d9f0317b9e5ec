"""The land as a whole, from a seed: parcels first, then woods, water, villages and roads, each over what lies below.

Nothing here depends on the season, and nothing has a spectrum yet.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter

from .canvas import CELL, Float, distance_to_curve, random_stream, smooth
from .land import Land
from .parcels import Parcels, draw_parcels
from .settlement import draw_roads, draw_villages


def draw_land(shape: tuple[int, int], seed: int) -> Land:
    """Return the land of ``(y, x)`` cells."""
    y, x = np.meshgrid(*(np.arange(n, dtype=np.float32) * np.float32(CELL) for n in shape), indexing="ij", sparse=True)
    warp = random_stream(seed, "warp")
    wy = y + 30 * smooth(shape, 420, warp) + 4 * smooth(shape, 90, warp)
    wx = x + 30 * smooth(shape, 420, warp) + 4 * smooth(shape, 90, warp)

    parcels = draw_parcels(wy, wx, seed)
    texture = random_stream(seed, "texture")
    land = Land(
        seed=seed,
        material=parcels.parcel,
        n_parcels=parcels.n_parcels,
        moisture=0.75 * smooth(shape, 150, texture) + 0.6 * smooth(shape, 45, texture) + parcels.irrigation,
        chlorophyll=0.75 * smooth(shape, 110, texture) + 0.6 * smooth(shape, 35, texture),
        density=0.6 * smooth(shape, 200, texture) + 0.4 * smooth(shape, 40, texture) + parcels.rows,
        canopy=_draw_crowns(shape, texture),
    )
    _draw_woods(land, parcels)
    _draw_water(land, wy, wx)
    draw_villages(land)
    draw_roads(land, parcels, wy, wx)
    return land


def _draw_crowns(shape: tuple[int, int], rng: np.random.Generator) -> Float:
    """Return crowns of 8 to 12 m lit from the south-east: their slope, and darker gaps between them."""
    height = gaussian_filter(rng.standard_normal(shape, dtype=np.float32), 0.9, mode="wrap")
    height += np.float32(0.6) * gaussian_filter(rng.standard_normal(shape, dtype=np.float32), 1.8, mode="wrap")
    slope = np.roll(height, (1, 1), (0, 1)) - np.roll(height, (-1, -1), (0, 1))
    light = height / height.std() + np.float32(1.2) * slope / slope.std()
    crowns: Float = (light / light.std()).clip(-2.2, 2.2)
    return crowns


def _draw_woods(land: Land, parcels: Parcels) -> None:
    """Draw woods with frayed edges, woods that fill whole parcels, hedges and grass margins between parcels."""
    shape = land.shape
    rng = random_stream(land.seed, "woods")
    species = smooth(shape, 350, rng) + 0.5 * smooth(shape, 60, rng)
    blob = smooth(shape, 520, rng) + 0.35 * smooth(shape, 110, rng)
    wood = (blob > 1.15) | ((blob > 0.55) & (parcels.kind > 0.8))

    width = 2.5 + 2.0 * (parcels.kind > 0.5)
    margin = (parcels.to_parcel_edge < width) & (parcels.kind < 0.75)
    patchy = smooth(shape, 55, rng)
    hedge = (parcels.to_parcel_edge < 6.5) & (parcels.kind > 0.86) & (patchy > -0.6)
    land.paint(margin, "margin", parcels.block)
    land.paint(hedge, "hedge", parcels.block)
    stand = parcels.block * 3 + (species * 2).astype(np.int32)
    land.paint(wood & (species <= 0.35), "deciduous", stand)
    land.paint(wood & (species > 0.35), "coniferous", stand)


def _draw_water(land: Land, wy: Float, wx: Float) -> None:
    """Draw a meandering river with sand banks and riparian trees, a brook in a band of trees, and ponds."""
    rng = random_stream(land.seed, "water")
    shape, (height, breadth) = land.shape, land.extent
    patchy = smooth(shape, 90, rng)
    bank = smooth(shape, 160, rng)
    bend = 55 * smooth(shape, 260, rng)

    start = breadth * rng.uniform(0.2, 0.45)
    river = distance_to_curve(wy, wx + bend, rng, start=start, reach=180, period=1900)
    half = 21 + 5 * bank
    land.paint((np.abs(river) < half + 22) & (patchy > -0.3), "deciduous")
    land.paint((river > 0) & (river < half + 11) & (bank < -0.6), "sand")
    land.paint(np.abs(river) < half, "river")

    start = height * rng.uniform(0.2, 0.8)
    brook = np.abs(distance_to_curve(wx, wy - bend, rng, start=start, reach=150, period=1300))
    east = (river > 0) & (river > half)  # it ends in the river
    land.paint((brook < 13) & (patchy > -0.9) & east, "hedge")
    land.paint((brook < 4) & east, "river")

    for _ in range(max(1, round(height * breadth / 3e6))):
        centre = rng.uniform(0, 1, 2) * (height, breadth)
        radius, stretch, angle = rng.uniform(22, 75), rng.uniform(1.0, 2.2), rng.uniform(0, np.pi)
        window = land.window(centre, 3 * radius)
        if (np.abs(river[window]) <= half.max() + 30).any():
            continue
        dy, dx = wy[window] - wy[0, 0] - centre[0], wx[window] - wx[0, 0] - centre[1]
        du, dv = np.cos(angle) * dx + np.sin(angle) * dy, np.cos(angle) * dy - np.sin(angle) * dx
        distance = np.hypot(du / stretch, dv) + 0.14 * radius * patchy[window]
        land.paint(distance < radius + 11, "margin", window=window)
        land.paint(distance < radius, rng.choice(["clear pond", "turbid pond"]), window=window)
