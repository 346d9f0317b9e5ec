"""What each material reflects in the ten bands: soils, crops through the year, water, woods, ground and roofs.

A table with one row per material; where the materials lie is not known here. Parcels follow the season, all else
stays the same through the year.

References
----------
Spectra: rounded by hand from what Sentinel-2 L2A typically shows for each land cover; no library was copied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..sentinel2.bands import BANDS, BANDS_10M, BANDS_20M
from .canvas import Double, Float, random_stream

# B02 B03 B04 B08, B05 B06 B07 B8A B11 B12, reflectance × 1000
SOILS = {
    "loam": (85, 120, 165, 245, 195, 215, 230, 255, 345, 300),
    "chalk": (130, 180, 230, 310, 260, 278, 292, 318, 400, 345),
    "clay": (55, 78, 110, 172, 130, 144, 158, 180, 240, 195),
}
CANOPIES = {
    "cereal": (24, 56, 28, 430, 88, 300, 405, 450, 195, 88),
    "rapeseed": (48, 148, 118, 450, 172, 345, 420, 470, 215, 105),
    "maize": (24, 54, 30, 445, 84, 300, 420, 470, 188, 80),
    "sunflower": (26, 66, 40, 455, 104, 310, 425, 478, 215, 98),
    "beet": (22, 62, 26, 520, 92, 365, 490, 545, 200, 82),
    "grass": (38, 78, 54, 350, 118, 268, 328, 372, 250, 140),
    "alfalfa": (28, 70, 34, 495, 104, 362, 462, 515, 220, 100),
    "vines": (46, 78, 74, 300, 112, 225, 275, 318, 260, 175),
}
STRAW = (80, 122, 172, 302, 212, 258, 280, 318, 405, 282)
WATER = {
    "river": (50, 66, 50, 20, 44, 26, 25, 18, 10, 7),
    "clear pond": (34, 40, 26, 12, 22, 14, 13, 11, 6, 4),
    "turbid pond": (72, 100, 84, 34, 74, 42, 40, 28, 13, 9),
}
WOODS = {
    "deciduous": (20, 44, 22, 385, 72, 275, 360, 400, 172, 72),
    "coniferous": (17, 29, 19, 200, 47, 140, 180, 210, 92, 42),
    "hedge": (24, 48, 30, 330, 76, 240, 310, 348, 178, 82),
}
GROUND = {
    "asphalt": (92, 102, 112, 132, 117, 121, 125, 136, 152, 142),
    "gravel": (150, 188, 228, 285, 246, 258, 270, 292, 355, 325),
    "sand": (160, 208, 252, 318, 276, 290, 302, 325, 395, 370),
    "margin": (48, 86, 72, 320, 130, 250, 298, 340, 275, 170),
    "garden": (42, 72, 60, 305, 106, 228, 275, 318, 220, 142),
    "shadow": (22, 26, 26, 62, 32, 50, 58, 64, 52, 38),
}
ROOFS = {
    "tiles": (72, 98, 178, 258, 205, 225, 242, 268, 335, 318),
    "slate": (70, 74, 80, 96, 84, 88, 92, 99, 122, 124),
    "metal": (420, 445, 455, 450, 455, 450, 450, 448, 420, 385),
    "old tiles": (92, 112, 142, 198, 160, 175, 188, 206, 262, 255),
    "membrane": (250, 255, 262, 270, 265, 266, 268, 268, 180, 120),
}

FIXED: dict[str, tuple[int, ...]] = {**WATER, **WOODS, **GROUND, **ROOFS}
VARIANTS = 16  # individual spectra of each fixed material
GROUPS = ((0, 1, 2), (3,), (6, 7), (4, 5), (8, 9))  # bands that share what varies from place to place


class Crop(NamedTuple):
    """How a crop's cover runs through the year; times as fractions of it."""

    canopy: str
    share: float
    green: float  # time of the densest canopy
    width: float  # of the green season, as a Gaussian's σ
    cover: float  # at the peak
    straw: float  # time by which half of it has turned to straw; beyond 1: never
    harvest: float  # time by which half of the straw has gone


CROPS = (
    Crop("cereal", 0.30, 0.36, 0.13, 0.95, 0.50, 0.62),
    Crop("rapeseed", 0.09, 0.32, 0.12, 0.92, 0.49, 0.55),
    Crop("maize", 0.17, 0.62, 0.10, 0.93, 0.76, 0.80),
    Crop("sunflower", 0.10, 0.58, 0.09, 0.85, 0.70, 0.75),
    Crop("beet", 0.06, 0.60, 0.14, 0.95, 1.50, 2.00),
    Crop("grass", 0.15, 0.50, 0.50, 0.88, 1.50, 2.00),
    Crop("alfalfa", 0.05, 0.50, 0.35, 0.93, 1.50, 2.00),
    Crop("vines", 0.05, 0.55, 0.16, 0.55, 1.50, 2.00),
    Crop("grass", 0.03, 0.50, 0.10, 0.12, 1.50, 2.00),  # fallow
)


@dataclass(frozen=True)
class Spectra:
    """A table with a row per material: first all parcels, then each material of FIXED in VARIANTS rows."""

    reflectance: Float
    """``(row, 10)``."""
    greenness: Float
    """``(row,)``, 0 to 1: how much chlorophyll and density matter."""
    thirst: Float
    """``(row,)``: how much moisture matters."""
    roughness: Float
    """``(row,)``: standard deviation of light and shade, as a logarithm."""
    grain: Float
    """``(row,)``: how much of the fine-grained variation shows."""


def draw_spectra(n_parcels: int, *, seed: int, season: float) -> Spectra:
    """Return the spectra of all materials, each drawn individually, at a time of the year (0 to 1)."""
    parcels, cover = _draw_crops(n_parcels, season, random_stream(seed, "crops"))
    spread = [0.04 if name in WATER else 0.22 if name in ROOFS else 0.10 for name in FIXED]
    fixed = np.repeat(np.array(list(FIXED.values())) / 1000, VARIANTS, axis=0)
    fixed = _individual(fixed, np.repeat(spread, VARIANTS), random_stream(seed, "materials"))

    def column(parcel: Double | float, of: Callable[[str], float]) -> Float:
        rest = np.repeat([of(name) for name in FIXED], VARIANTS)
        return np.concatenate([np.broadcast_to(parcel, n_parcels), rest]).astype(np.float32)

    soft = {"margin": 0.8, "garden": 0.6} | dict.fromkeys(WOODS, 0.6)
    rough = dict.fromkeys(WOODS, 0.2) | {"garden": 0.2, "margin": 0.08, "sand": 0.05, "gravel": 0.04}
    return Spectra(
        reflectance=np.concatenate([parcels, fixed]).astype(np.float32),
        greenness=column(0.3 + 0.7 * cover, lambda name: soft.get(name, 0.0)),
        thirst=column(1.0 - 0.3 * cover, lambda name: soft.get(name, 0.0) * 0.7),
        roughness=column(0.02, lambda name: rough.get(name, 0.015)),
        grain=column(1.0, lambda name: 0.3 if name in WATER else 0.7),
    )


def _draw_crops(n: int, season: float, rng: np.random.Generator) -> tuple[Double, Double]:
    """Return each parcel's spectrum ``(n, 10)`` and green cover ``(n,)`` at a time of the year."""
    share = np.array([crop.share for crop in CROPS])
    crop = rng.choice(len(CROPS), n, p=share / share.sum())
    soil = _individual(np.array(list(SOILS.values()))[rng.choice(len(SOILS), n, p=[0.5, 0.15, 0.35])] / 1000, 0.10, rng)
    canopy = np.array([CANOPIES[c.canopy] for c in CROPS])[crop] / 1000
    canopy = _individual(canopy, 0.09, rng)
    straw = _individual(np.broadcast_to(np.array(STRAW) / 1000, canopy.shape), 0.10, rng)

    peak, width, most, turn, harvest = (
        np.array([getattr(c, field) for c in CROPS])[crop] for field in ("green", "width", "cover", "straw", "harvest")
    )
    late = 0.035 * rng.standard_normal(n)  # sown or ripe early or late
    most = most * rng.uniform(0.75, 1.03, n)
    vegetation = most * np.exp(-0.5 * ((season - peak - late) / width) ** 2)
    ripe = 1 / (1 + np.exp(-(season - turn - late) / 0.018))
    gone = 1 / (1 + np.exp(-(season - harvest - 1.5 * late) / 0.012))
    green = (vegetation * (1 - ripe)).clip(0, 0.98)
    stubble = most * ripe * (1 - 0.45 * gone) * np.exp(-((season - harvest).clip(0, None) / 0.18))
    stubble = np.minimum(stubble, 1 - green)
    # A thin canopy hides more of the soil than its share of the season's peak: weigh by the square root.
    hidden = np.sqrt(green)[:, None] * (1 - stubble)[:, None]
    mixed = hidden * canopy + stubble[:, None] * straw + (1 - hidden - stubble[:, None]).clip(0, 1) * soil
    return mixed, green


def _individual(spectra: Double, spread: Double | float, rng: np.random.Generator) -> Double:
    """Vary spectra ``(n, 10)``: brightness, slope over wavelength, each group of bands and each band on its own."""
    n = len(spectra)
    wavelength = np.array([BANDS[name].wavelength for name in BANDS_10M + BANDS_20M])
    log = rng.standard_normal((n, 1)) + 0.4 * rng.standard_normal((n, 1)) * (wavelength - 900) / 1000
    for group in GROUPS:
        log[:, group] += 0.45 * rng.standard_normal((n, 1))
    log += 0.2 * rng.standard_normal(spectra.shape)
    varied: Double = spectra * np.exp(np.reshape(spread, (-1, 1)) * log)
    return varied
