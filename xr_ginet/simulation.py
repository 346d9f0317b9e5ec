"""A simulated Sentinel-2 scene of farmland with its true 10 m reference, and its files as a catalogue would hold them.

Real Sentinel-2 has no truth at 10 m for the 20 m bands; a simulation does, at the price of being a simulation. The land
is drawn at 5 m (blocks of parcels between roads, a river with ponds, woods, villages), given ten-band spectra, and seen
through a Gaussian instrument. Moisture, irrigation and chlorophyll vary on their own, so that the 20 m bands hold
detail of which the 10 m bands know nothing: a super-resolver that copies the 10 m bands is found out.

What this deliberately is not: a radiative transfer model. There is no atmosphere, no topography, no view angle, no
cloud, no misregistration, no detector striping. Figures measured here rank methods; they do not predict errors on real
scenes.

References
----------
Spectra: rounded by hand from what Sentinel-2 L2A typically shows for each land cover; no library was copied.
Blur: `xr_ginet.training.degradation`. Item layout: Earth Search v1, collection ``sentinel-2-l2a``.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree

from .sentinel2.bands import BANDS, BANDS_10M, BANDS_20M
from .training.degradation import degrade, mtf_mean

Float = NDArray[np.float32]
Index = NDArray[np.int32]
_Grid = tuple[float, float, float, float, float, float]  # affine coefficients a b c d e f

CELL = 5.0  # metres: the land is drawn twice as fine as the finest pixel, so that edges become mixed pixels
MARGIN = 12  # cells drawn beyond each side, so that the instrument's 12 taps see land and not a mirror
OWN_GAIN = 0.25  # modulation of the 10 m instrument at its own Nyquist frequency, for all bands of the reference
SNR = 150.0  # signal to noise at REFLECTANCE_OF_SNR; the noise grows with the root of the signal
REFLECTANCE_OF_SNR = 0.3
NOISE_FLOOR = 0.01  # reflectance below which the noise no longer falls

# --- spectra: B02 B03 B04 B08, B05 B06 B07 B8A B11 B12, reflectance × 1000 -----------------------------------------
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

# --- how a band answers to what varies within a parcel, per standard deviation, as a logarithm ----------------------
ANSWER_TO_MOISTURE = (-0.02, -0.02, -0.03, -0.01, -0.02, -0.01, -0.01, -0.02, -0.11, -0.18)
ANSWER_TO_CHLOROPHYLL = (-0.01, -0.03, -0.02, 0.00, -0.11, -0.07, -0.01, 0.00, 0.00, 0.00)
ANSWER_TO_DENSITY = (-0.05, -0.03, -0.09, 0.07, -0.05, 0.04, 0.06, 0.07, -0.04, -0.08)
GROUPS = ((0, 1, 2), (3,), (6, 7), (4, 5), (8, 9))  # bands that share what varies from place to place
GROUP_SPREAD = (0.03, 0.02, 0.02, 0.03, 0.045)

# --- crops: soil cover through the year (0 to 1) --------------------------------------------------------------------


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
class Scene:
    """A scene at its native resolutions and the 10 m truth behind it."""

    reference: Float
    """``(10, y, x)`` float32 reflectance at 10 m, bands BANDS_10M + BANDS_20M, free of noise, all with one blur."""
    fine: Float
    """``(4, y, x)`` float32 reflectance: the bands BANDS_10M with noise."""
    coarse: Float
    """``(6, y / 2, x / 2)`` float32 reflectance: the bands BANDS_20M, blurred by the instrument, with noise."""
    transform: _Grid
    """Affine coefficients of the 10 m grid, ``a b c d e f`` as rasterio's ``Affine`` orders them."""
    crs: str
    """Such as ``"EPSG:32630"``."""


def simulate(
    shape: tuple[int, int] = (512, 512),
    *,
    seed: int = 0,
    season: float = 0.5,
    origin: tuple[float, float] = (600000.0, 4900020.0),
    crs: str = "EPSG:32630",
) -> Scene:
    """Return a deterministic scene of farmland with river, woods and villages, and its true 10 m reference.

    Parameters
    ----------
    shape : (y, x)
        Pixels at 10 m, each a positive multiple of 2. About 1 kB of memory per pixel is used while drawing.
    seed : int
        Decides the land. The same seed, shape and season give the same scene, bit for bit.
    season : float
        Fraction of the year, 0 to 1. The land stays, the crops' spectra change smoothly, the noise is drawn anew.
    origin : (x, y)
        Upper left corner, in metres.
    crs : str
        A projected reference system in metres.

    Returns
    -------
    Scene
        In memory.

    Raises
    ------
    ValueError
        If ``shape`` is odd or not positive, or ``season`` lies outside of 0 to 1.

    Examples
    --------
    >>> scene = simulate((64, 96), seed=3)
    >>> scene.reference.shape, scene.fine.shape, scene.coarse.shape
    ((10, 64, 96), (4, 64, 96), (6, 32, 48))
    """
    if min(shape) < 2 or shape[0] % 2 or shape[1] % 2:
        raise ValueError(f"shape={shape}: both must be positive multiples of 2, whole at 20 m, such as (512, 512)")
    if not 0 <= season <= 1:
        raise ValueError(f"season={season}: must be a fraction of the year between 0 and 1; mid-summer is 0.5")
    land = _draw_land((2 * shape[0] + 2 * MARGIN, 2 * shape[1] + 2 * MARGIN), seed)
    reference = _observe(land, _spectra(land, season))
    rng = _rng(seed, "noise", int(season * 2**32))
    fine = _with_noise(reference[: len(BANDS_10M)], rng)
    coarse = _with_noise(degrade(reference[len(BANDS_10M) :], BANDS_20M, degradation="mtf"), rng)
    transform = (10.0, 0.0, float(origin[0]), 0.0, -10.0, float(origin[1]))
    return Scene(reference=reference, fine=fine, coarse=coarse, transform=transform, crs=crs)


def noise_sigma(reflectance: Float) -> Float:
    """Return the standard deviation of the simulated instrument's noise, in reflectance, for a noise-free signal.

    ``σ = sqrt(0.3 · max(reflectance, 0.01)) / 150``: signal to noise is 150 at reflectance 0.3 and falls with the root.
    """
    scale = np.float32(np.sqrt(REFLECTANCE_OF_SNR) / SNR)
    sigma: Float = scale * np.sqrt(np.maximum(reflectance, np.float32(NOISE_FLOOR)))
    return sigma


def _with_noise(signal: Float, rng: np.random.Generator) -> Float:
    noisy = signal + noise_sigma(signal) * rng.standard_normal(signal.shape, dtype=np.float32)
    return np.maximum(noisy, np.float32(1e-4))  # what digital number 1 stands for: 0 would mean missing


# --- land: what lies where ------------------------------------------------------------------------------------------


@dataclass
class _Land:
    """The drawn land at 5 m. ``material`` indexes the rows of the spectra: first all parcels, then `_FIXED`."""

    seed: int
    material: Index  # (y, x)
    n_parcels: int
    moisture: Float  # (y, x), standard deviations; irrigation included
    chlorophyll: Float  # (y, x), standard deviations
    density: Float  # (y, x), standard deviations; gradients and rows included
    canopy: Float  # (y, x), standard deviations of the crowns' light and shade


_VARIANTS = 16  # individual spectra of each fixed material
_FIXED: dict[str, tuple[int, ...]] = {**WATER, **WOODS, **GROUND, **ROOFS}
_FIXED_ROW = {name: i * _VARIANTS for i, name in enumerate(_FIXED)}
_STRIPS, _PLOTS = 32, 16  # at most so many strips in a block, plots in a strip


def _rng(seed: int, *words: str | int) -> np.random.Generator:
    """Return a stream of its own for each purpose, so that adding one does not change the others."""
    entropy = [seed]
    for word in words:
        entropy.append(word if isinstance(word, int) else int.from_bytes(word.encode(), "little"))
    return np.random.default_rng(entropy)


def _smooth(shape: tuple[int, int], scale: float, rng: np.random.Generator) -> Float:
    """Return a Gaussian field of mean 0, standard deviation about 1 and features of ``scale`` metres.

    Cubic B-splines over random knots: one pass per axis with four taps, whatever the scale.
    """
    knots = rng.standard_normal([int(n * CELL / scale) + 5 for n in shape], dtype=np.float32)
    for axis in (0, 1):
        position = np.arange(shape[axis], dtype=np.float32) * np.float32(CELL / scale)
        start = position.astype(np.intp)
        t = position - start
        taps = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
        along = (-1, 1) if axis == 0 else (1, -1)
        out = np.zeros(1, np.float32)
        for i, tap in enumerate(taps):
            out = out + np.take(knots, start + i, axis=axis) * (tap / 6).reshape(along)
        knots = out
    return knots * np.float32(315 / 151)  # a cubic B-spline keeps 151/315 of white noise's variance per axis


def _draw_land(shape: tuple[int, int], seed: int) -> _Land:
    y, x = np.meshgrid(*(np.arange(n, dtype=np.float32) * np.float32(CELL) for n in shape), indexing="ij", sparse=True)
    warp = _rng(seed, "warp")
    wy = y + 30 * _smooth(shape, 420, warp) + 4 * _smooth(shape, 90, warp)
    wx = x + 30 * _smooth(shape, 420, warp) + 4 * _smooth(shape, 90, warp)

    blocks = _draw_blocks(shape, wy, wx, seed)
    texture = _rng(seed, "texture")
    land = _Land(
        seed=seed,
        material=blocks.parcel,
        n_parcels=blocks.n_parcels,
        moisture=0.75 * _smooth(shape, 150, texture) + 0.6 * _smooth(shape, 45, texture) + blocks.irrigation,
        chlorophyll=0.75 * _smooth(shape, 110, texture) + 0.6 * _smooth(shape, 35, texture),
        density=0.6 * _smooth(shape, 200, texture) + 0.4 * _smooth(shape, 40, texture) + blocks.rows,
        canopy=_crowns(shape, texture),
    )
    _draw_woods(land, blocks)
    _draw_water(land, wy, wx)
    _draw_villages(land, blocks)
    _draw_roads(land, blocks, wy, wx)
    return land


@dataclass
class _Blocks:
    """Parcels in strips in blocks, and how far each cell lies from their edges."""

    parcel: Index  # (y, x)
    n_parcels: int
    block: Index  # (y, x)
    neighbour: Index  # (y, x), the second nearest block
    to_block_edge: Float  # metres
    to_parcel_edge: Float  # metres
    parcel_kind: Float  # (y, x), uniform 0 to 1, one per parcel
    rows: Float  # (y, x), gradient and crop rows as standard deviations of density
    irrigation: Float  # (y, x), added to moisture


def _draw_blocks(shape: tuple[int, int], wy: Float, wx: Float, seed: int, spacing: float = 620.0) -> _Blocks:
    """Draw blocks, the Voronoi cells of jittered points in warped space, and in each parallel strips cut into plots."""
    rng = _rng(seed, "blocks")
    rows, columns = (int(n * CELL / spacing) + 4 for n in shape)
    grid = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1).reshape(-1, 2)
    sites = (grid - 1.5 + rng.uniform(-0.42, 0.42, grid.shape)) * spacing
    n = len(sites)
    distance, nearest = cKDTree(sites).query(np.stack([wy.ravel(), wx.ravel()], -1), k=2)
    block, neighbour = nearest[:, 0].astype(np.int32).reshape(shape), nearest[:, 1].astype(np.int32).reshape(shape)
    apart = np.linalg.norm(sites[nearest[:, 0]] - sites[nearest[:, 1]], axis=1)
    to_edge = ((distance[:, 1] ** 2 - distance[:, 0] ** 2) / (2 * apart)).astype(np.float32).reshape(shape)

    angle = rng.uniform(0, np.pi) + 0.35 * rng.standard_normal(n) + np.pi / 2 * rng.integers(0, 2, n)
    cosine, sine = np.cos(angle).astype(np.float32)[block], np.sin(angle).astype(np.float32)[block]
    dy, dx = wy - sites[:, 0].astype(np.float32)[block], wx - sites[:, 1].astype(np.float32)[block]
    u, v = cosine * dx + sine * dy, cosine * dy - sine * dx
    width = rng.lognormal(np.log(95), 0.45, n).clip(45, 240).astype(np.float32)
    length = (width * rng.uniform(1.6, 4.0, n)).clip(140, 520).astype(np.float32)

    strip, s, strip_edge = _cut(u, width[block], block, rng.uniform(-0.38, 0.38, (n, _STRIPS + 1)))
    row = block * _STRIPS + strip
    shift = rng.uniform(-0.5, 0.5, (n * _STRIPS)).astype(np.float32)[row] * length[block]
    plot, p, plot_edge = _cut(v + shift, length[block], row, rng.uniform(-0.3, 0.3, (n * _STRIPS, _PLOTS + 1)))
    parcel = row * _PLOTS + plot
    n_parcels = n * _STRIPS * _PLOTS

    def each(values: NDArray[Any]) -> Float:
        per_cell: Float = values.astype(np.float32)[parcel]
        return per_cell

    # Rows of 10 to 40 m along the strip. They are below what 20 m pixels resolve and above what 5 m cells do.
    period = rng.choice([12.0, 18.0, 24.0, 36.0], n_parcels)
    strength = np.where(rng.random(n_parcels) < 0.35, rng.uniform(0.4, 1.3, n_parcels), 0.0)
    crop_rows = each(strength) * np.sin(u * each(2 * np.pi / period) + each(rng.uniform(0, 6.28, n_parcels)))
    gradient = each(0.5 * rng.standard_normal(n_parcels)) * (s - 0.5) * 2
    gradient += each(0.5 * rng.standard_normal(n_parcels)) * (p - 0.5) * 2
    # A straight edge that only the short-wave infrared sees: one part of some parcels has been watered.
    watered = np.where(rng.random(n_parcels) < 0.22, rng.uniform(0.2, 0.8, n_parcels), 2.0)
    irrigation = np.where(p > each(watered), np.float32(1.7), np.float32(0))
    kind = each(rng.random(n_parcels))
    edge = np.minimum(strip_edge, plot_edge)
    return _Blocks(parcel, n_parcels, block, neighbour, to_edge, edge, kind, crop_rows + gradient, irrigation)


def _cut(position: Float, width: Float, row: Index, jitter: NDArray[np.float64]) -> tuple[Index, Float, Float]:
    """Cut lines into pieces: which piece, where in it (0 to 1), metres to its nearer end. ``row`` picks the jitter."""
    count = jitter.shape[1] - 1
    flat = jitter.astype(np.float32).ravel()
    t = np.clip(position / width + np.float32(count / 2), 1, count - 1.001)
    whole = t.astype(np.int32)
    first = row * (count + 1)
    left = whole + flat[first + whole]
    right = whole + 1 + flat[first + whole + 1]
    piece = whole - (t < left) + (t >= right)
    left = piece + flat[first + piece]
    right = piece + 1 + flat[first + piece + 1]
    return piece, (t - left) / (right - left), np.minimum(t - left, right - t) * width


def _crowns(shape: tuple[int, int], rng: np.random.Generator) -> Float:
    """Return crowns of 8 to 12 m lit from the south-east: their slope, and darker gaps between them."""
    height = gaussian_filter(rng.standard_normal(shape, dtype=np.float32), 0.9, mode="wrap")
    height += np.float32(0.6) * gaussian_filter(rng.standard_normal(shape, dtype=np.float32), 1.8, mode="wrap")
    slope = np.roll(height, (1, 1), (0, 1)) - np.roll(height, (-1, -1), (0, 1))
    light = height / height.std() + np.float32(1.2) * slope / slope.std()
    crowns: Float = (light / light.std()).clip(-2.2, 2.2)
    return crowns


def _draw_woods(land: _Land, blocks: _Blocks) -> None:
    """Draw woods with frayed edges, woods that fill whole parcels, hedges and grass margins between parcels."""
    shape = land.material.shape
    rng = _rng(land.seed, "woods")
    species = _smooth(shape, 350, rng) + 0.5 * _smooth(shape, 60, rng)
    blob = _smooth(shape, 520, rng) + 0.35 * _smooth(shape, 110, rng)
    wood = (blob > 1.15) | ((blob > 0.55) & (blocks.parcel_kind > 0.8))

    width = 2.5 + 2.0 * (blocks.parcel_kind > 0.5)
    margin = (blocks.to_parcel_edge < width) & (blocks.parcel_kind < 0.75)
    patchy = _smooth(shape, 55, rng)
    hedge = (blocks.to_parcel_edge < 6.5) & (blocks.parcel_kind > 0.86) & (patchy > -0.6)
    _paint(land, margin, "margin", blocks.block)
    _paint(land, hedge, "hedge", blocks.block)
    stand = blocks.block * 3 + (species * 2).astype(np.int32)
    _paint(land, wood & (species <= 0.35), "deciduous", stand)
    _paint(land, wood & (species > 0.35), "coniferous", stand)


def _draw_water(land: _Land, wy: Float, wx: Float) -> None:
    """Draw a meandering river with sand banks and riparian trees, a brook in a band of trees, and ponds."""
    rng = _rng(land.seed, "water")
    shape = land.material.shape
    height, breadth = (n * CELL for n in shape)
    patchy = _smooth(shape, 90, rng)
    bank = _smooth(shape, 160, rng)
    bend = 55 * _smooth(shape, 260, rng)

    river = _curve(wy, wx + bend, rng, start=breadth * rng.uniform(0.2, 0.45), reach=180, period=1900)
    half = 21 + 5 * bank
    _paint(land, (np.abs(river) < half + 22) & (patchy > -0.3), "deciduous")
    _paint(land, (river > 0) & (river < half + 11) & (bank < -0.6), "sand")
    _paint(land, np.abs(river) < half, "river")

    brook = _curve(wx, wy - bend, rng, start=height * rng.uniform(0.2, 0.8), reach=150, period=1300)
    east = river > 0  # it ends in the river
    _paint(land, (np.abs(brook) < 13) & (patchy > -0.9) & east & (np.abs(river) > half), "hedge")
    _paint(land, (np.abs(brook) < 4) & east & (np.abs(river) > half), "river")

    for _ in range(max(1, round(height * breadth / 3e6))):
        centre = rng.uniform(0, 1, 2) * (height, breadth)
        radius, stretch, angle = rng.uniform(22, 75), rng.uniform(1.0, 2.2), rng.uniform(0, np.pi)
        window = _window(shape, centre, 3 * radius)
        if not (np.abs(river[window]) > half.max() + 30).all():
            continue
        dy, dx = wy[window] - wy.ravel()[0] - centre[0], wx[window] - wx.ravel()[0] - centre[1]
        du, dv = np.cos(angle) * dx + np.sin(angle) * dy, np.cos(angle) * dy - np.sin(angle) * dx
        distance = np.hypot(du / stretch, dv) + 0.14 * radius * patchy[window]
        _paint(land, distance < radius + 11, "margin", window=window)
        _paint(land, distance < radius, rng.choice(["clear pond", "turbid pond"]), window=window)


def _curve(
    along: Float, across: Float, rng: np.random.Generator, *, start: float, reach: float, period: float
) -> Float:
    """Return the signed distance in metres from a curve that runs in the direction of ``along``."""
    centre, slope = np.full(1, start, np.float32), np.zeros(1, np.float32)
    for octave in (1.0, 0.47, 0.23):
        wavenumber, phase = 2 * np.pi / (period * octave), rng.uniform(0, 6.28)
        swing = reach * octave**1.2 * rng.uniform(0.7, 1.3)
        centre = centre + np.float32(swing) * np.sin(along * np.float32(wavenumber) + np.float32(phase))
        slope = slope + np.float32(swing * wavenumber) * np.cos(along * np.float32(wavenumber) + np.float32(phase))
    return ((across - centre) / np.sqrt(1 + slope**2)).astype(np.float32)


def _draw_roads(land: _Land, blocks: _Blocks, wy: Float, wx: Float) -> None:
    """Draw lanes and tracks between blocks, cut by water, and two main roads, one with a bridge over the river."""
    rng = _rng(land.seed, "roads")
    height, breadth = (n * CELL for n in land.material.shape)
    n_blocks = int(max(blocks.block.max(), blocks.neighbour.max())) + 1
    fate = rng.random(n_blocks)
    edge = (fate[blocks.block] + fate[blocks.neighbour]) % 1  # the same from both sides
    dry = ~_is_water(land, (slice(None), slice(None)))
    _paint(land, dry & (blocks.to_block_edge < 2.6) & (edge < 0.35), "gravel", blocks.block)
    _paint(land, dry & (blocks.to_block_edge < 3.4) & (edge > 0.55), "asphalt")
    _paint(land, dry & (blocks.to_block_edge > 5) & (blocks.to_block_edge < 11) & (edge > 0.85), "hedge")

    for start, along, across in ((height * rng.uniform(0.2, 0.8), wx, wy), (breadth * rng.uniform(0.6, 0.85), wy, wx)):
        road = np.abs(_curve(along, across, rng, start=start, reach=70, period=4200))
        _paint(land, road < 11, "margin")
        _paint(land, road < 7, "asphalt")


def _draw_villages(land: _Land, blocks: _Blocks) -> None:
    """Draw villages of gardens, lanes and houses, and single farms with a large hall."""
    rng = _rng(land.seed, "villages")
    shape = land.material.shape
    height, breadth = (n * CELL for n in shape)
    frayed = _smooth(shape, 70, rng)
    for _ in range(max(1, round(height * breadth / 6e6))):
        centre = rng.uniform(0.1, 0.9, 2) * (height, breadth)
        _draw_village(land, centre, rng.uniform(130, 330), frayed, rng)
    for _ in range(max(1, round(height * breadth / 1.2e6))):
        centre = rng.uniform(0, 1, 2) * (height, breadth)
        _draw_village(land, centre, rng.uniform(28, 55), frayed, rng, pitch=rng.uniform(38, 55), fill=0.7)


def _draw_village(
    land: _Land,
    centre: NDArray[np.float64],
    radius: float,
    frayed: Float,
    rng: np.random.Generator,
    *,
    pitch: float = 26.0,
    fill: float = 0.65,
) -> None:
    """Draw plots of ``pitch`` metres in rows, lanes between every two, a house in most and its shadow behind it."""
    window = _window(land.material.shape, centre, 1.5 * radius)
    rows, columns = (np.arange(s.start, s.stop, dtype=np.float32) * np.float32(CELL) for s in window)
    dy, dx = rows[:, None] - np.float32(centre[0]), columns[None, :] - np.float32(centre[1])
    angle = rng.uniform(0, np.pi)
    u, v = np.cos(angle) * dx + np.sin(angle) * dy, np.cos(angle) * dy - np.sin(angle) * dx
    u, v = (q.astype(np.float32) for q in (u + 12 * np.sin(v / 90), v))
    within = np.hypot(dy, dx) + 0.22 * radius * frayed[window] < radius
    within &= ~_is_water(land, window)

    half = int(1.5 * radius / pitch) + 2
    i, j = (np.floor(q / pitch).astype(np.int32) + half for q in (u, v))
    cell = np.clip(i, 0, 2 * half - 1) * (2 * half) + np.clip(j, 0, 2 * half - 1)
    n = (2 * half) ** 2
    lane_u, lane_v = np.abs((u + pitch) % (2 * pitch) - pitch), np.abs((v + 3 * pitch) % (6 * pitch) - 3 * pitch)
    _paint(land, within, "garden", cell, window=window)
    _paint(land, within & (np.minimum(lane_u, lane_v) < 3.0), "asphalt", window=window)

    size = rng.uniform(0.15, 0.34, (2, n)).astype(np.float32) * np.float32(pitch)
    shift = rng.uniform(-0.08, 0.08, (2, n)).astype(np.float32) * np.float32(pitch)
    built = (rng.random(n) < fill)[cell] & (rng.random(n)[cell] < 1.6 - np.hypot(dy, dx) / np.float32(radius))
    sun_u, sun_v = 4 * (np.cos(angle) + np.sin(angle)), 4 * (np.cos(angle) - np.sin(angle))  # in the south-east
    u, v = ((q / pitch - np.floor(q / pitch) - 0.5) * np.float32(pitch) for q in (u, v))
    names = list(ROOFS)
    roof = rng.choice(len(names), n, p=[0.47, 0.22, 0.04, 0.22, 0.05])[cell]
    du, dv = u - shift[0][cell], v - shift[1][cell]
    shadow = (np.abs(du + sun_u) < size[0][cell]) & (np.abs(dv + sun_v) < size[1][cell])
    _paint(land, within & built & shadow, "shadow", window=window)
    house = within & built & (np.abs(du) < size[0][cell]) & (np.abs(dv) < size[1][cell])
    for number, name in enumerate(names):
        _paint(land, house & (roof == number), name, cell, window=window)


def _is_water(land: _Land, window: tuple[slice, slice]) -> NDArray[np.bool_]:
    row = land.material[window] - land.n_parcels
    return (row >= _FIXED_ROW["river"]) & (row < _FIXED_ROW["deciduous"])


def _window(shape: tuple[int, int], centre: Sequence[float] | NDArray[np.float64], reach: float) -> tuple[slice, slice]:
    """Return the cells within ``reach`` metres of ``centre``, cut at the scene's border."""
    low, high = (
        [int(np.clip((c + sign * reach) / CELL, 0, n)) for c, n in zip(centre, shape, strict=True)] for sign in (-1, 1)
    )
    return slice(low[0], high[0]), slice(low[1], high[1])


def _paint(
    land: _Land,
    where: NDArray[np.bool_],
    name: str,
    variant: Index | None = None,
    *,
    window: tuple[slice, slice] = (slice(None), slice(None)),
) -> None:
    """Make a material of the cells ``where``; ``variant`` picks one of its individual spectra."""
    first = land.n_parcels + _FIXED_ROW[name]
    land.material[window][where] = first if variant is None else first + (variant[where] % _VARIANTS)


# --- spectra: what each material reflects ---------------------------------------------------------------------------


@dataclass
class _Spectra:
    """A table with a row per material."""

    reflectance: Float  # (row, 10)
    greenness: Float  # (row,) 0 to 1: how much chlorophyll and density matter
    thirst: Float  # (row,) how much moisture matters
    roughness: Float  # (row,) standard deviation of light and shade, as a logarithm
    grain: Float  # (row,) how much of the fine-grained variation shows


def _individual(
    spectra: NDArray[np.float64], spread: float | NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.float64]:
    """Vary spectra ``(n, 10)``: brightness, slope over wavelength, each group of bands and each band on its own."""
    n = len(spectra)
    wavelength = np.array([BANDS[name].wavelength for name in BANDS_10M + BANDS_20M])
    log = rng.standard_normal((n, 1)) + 0.4 * rng.standard_normal((n, 1)) * (wavelength - 900) / 1000
    for group in GROUPS:
        log[:, group] += 0.45 * rng.standard_normal((n, 1))
    log += 0.2 * rng.standard_normal(spectra.shape)
    varied: NDArray[np.float64] = spectra * np.exp(np.reshape(spread, (-1, 1)) * log)
    return varied


def _spectra(land: _Land, season: float) -> _Spectra:
    parcels, cover = _crop_spectra(land.n_parcels, season, _rng(land.seed, "crops"))
    rng = _rng(land.seed, "materials")
    fixed = np.repeat(np.array(list(_FIXED.values())) / 1000, _VARIANTS, axis=0)
    spread = [0.04 if name in WATER else 0.22 if name in ROOFS else 0.10 for name in _FIXED]
    fixed = _individual(fixed, np.repeat(spread, _VARIANTS), rng)

    def column(parcel: NDArray[Any] | float, of: Callable[[str], float]) -> Float:
        rest = np.repeat([of(name) for name in _FIXED], _VARIANTS)
        return np.concatenate([np.broadcast_to(parcel, land.n_parcels), rest]).astype(np.float32)

    soft = {"margin": 0.8, "garden": 0.6} | dict.fromkeys(WOODS, 0.6)
    rough = dict.fromkeys(WOODS, 0.2) | {"garden": 0.2, "margin": 0.08, "sand": 0.05, "gravel": 0.04}
    return _Spectra(
        reflectance=np.concatenate([parcels, fixed]).astype(np.float32),
        greenness=column(0.3 + 0.7 * cover, lambda name: soft.get(name, 0.0)),
        thirst=column(1.0 - 0.3 * cover, lambda name: soft.get(name, 0.0) * 0.7),
        roughness=column(0.02, lambda name: rough.get(name, 0.015)),
        grain=column(1.0, lambda name: 0.3 if name in WATER else 0.7),
    )


def _crop_spectra(n: int, season: float, rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
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


# --- observation ----------------------------------------------------------------------------------------------------


def _observe(land: _Land, spectra: _Spectra) -> Float:
    """Return the noise-free 10 m image ``(10, y, x)``: spectra, varied within materials, through the instrument."""
    shape = land.material.shape
    rng = _rng(land.seed, "grain")
    greenness = spectra.greenness[land.material]
    moisture = land.moisture * spectra.thirst[land.material]
    chlorophyll, density = land.chlorophyll * greenness, land.density * greenness
    shade = land.canopy * spectra.roughness[land.material]
    grain_here = spectra.grain[land.material]
    inner = slice(MARGIN // 2, -(MARGIN // 2))
    out = np.empty((10, shape[0] // 2 - MARGIN, shape[1] // 2 - MARGIN), np.float32)
    for group, spread in zip(GROUPS, GROUP_SPREAD, strict=True):
        grain = np.float32(0.7) * _smooth(shape, 60, rng) + np.float32(0.7) * _smooth(shape, 14, rng)
        grain *= np.float32(spread) * grain_here
        for band in group:
            log = shade + grain
            log += np.float32(ANSWER_TO_MOISTURE[band]) * moisture
            log += np.float32(ANSWER_TO_CHLOROPHYLL[band]) * chlorophyll
            log += np.float32(ANSWER_TO_DENSITY[band]) * density
            ground = np.exp(log, out=log)
            ground *= spectra.reflectance[:, band][land.material]
            out[band] = mtf_mean(ground[None], 2, [OWN_GAIN])[0, inner, inner]
    return out


# --- files: as a catalogue would hold them --------------------------------------------------------------------------


def write_cogs(
    fine: NDArray[Any],
    coarse: NDArray[Any],
    folder: str | Path,
    *,
    transform: Sequence[float],
    crs: str,
    datetime: dt.datetime | str,
    item_id: str,
    collection: str = "sentinel-2-l2a",
) -> dict[str, Any]:
    """Write ten one-band Cloud Optimized GeoTIFFs and return the STAC item that describes them.

    Parameters
    ----------
    fine : (4, y, x)
        The bands BANDS_10M. Floating point reflectance (stored × 10,000, at least 1; NaN as 0), or uint16 digital
        numbers (stored as they are, 0 for missing).
    coarse : (6, y / 2, x / 2)
        The bands BANDS_20M, likewise.
    folder : path
        Files go to ``folder / item_id / B02.tif`` and so on. Created if missing.
    transform : sequence of float
        ``a b c d e f`` of the 10 m grid; a rasterio ``Affine`` will do.
    crs : str
        Anything that rasterio understands and that has an EPSG code.
    datetime : datetime or str
        Of acquisition. Without a time zone: UTC.
    item_id, collection : str
        For the item.

    Returns
    -------
    dict
        A STAC 1.0 item in the style of Earth Search v1; its hrefs are absolute local paths.

    Raises
    ------
    ValueError
        If the shapes do not fit together or the reference system has no EPSG code.
    TypeError
        If an array is neither floating point nor uint16.
    """
    from rasterio.crs import CRS

    fine, coarse = np.asarray(fine), np.asarray(coarse)
    if fine.ndim != 3 or len(fine) != 4 or coarse.shape != (6, fine.shape[1] / 2, fine.shape[2] / 2):
        raise ValueError(f"fine {fine.shape} and coarse {coarse.shape}: must be (4, y, x) and (6, y / 2, x / 2)")
    epsg = CRS.from_user_input(crs).to_epsg()
    if epsg is None:
        raise ValueError(f"crs={crs!r}: has no EPSG code, which the item needs; give one such as 'EPSG:32630'")
    folder = (Path(folder) / item_id).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    a, b, c, d, e, f = (float(value) for value in tuple(transform)[:6])
    fine_grid, coarse_grid = (a, b, c, d, e, f), (2 * a, 2 * b, c, 2 * d, 2 * e, f)
    assets = {}
    for names, bands, grid in ((BANDS_10M, fine, fine_grid), (BANDS_20M, coarse, coarse_grid)):
        for name, values in zip(names, bands, strict=True):
            path = folder / f"{name}.tif"
            _write_cog(path, digital_numbers(values), grid, f"EPSG:{epsg}")
            assets[BANDS[name].aliases[0]] = _asset(path, name, values.shape, grid)
    ring = _outline(fine_grid, fine.shape[1], fine.shape[2], epsg)
    return _item(item_id, collection, datetime, epsg, ring, assets)


def digital_numbers(values: NDArray[Any]) -> NDArray[np.uint16]:
    """Return uint16 as it is, and floating point reflectance × 10,000, rounded, 1 to 65535, with NaN as 0."""
    if values.dtype == np.uint16:
        return values
    if not np.issubdtype(values.dtype, np.floating):
        raise TypeError(f"dtype {values.dtype}: must be floating point reflectance or uint16 digital numbers")
    scaled = np.rint(values * values.dtype.type(10000)).clip(1, 65535)
    return np.where(np.isnan(scaled), 0, scaled).astype(np.uint16)


def _write_cog(path: Path, values: NDArray[np.uint16], transform: _Grid, crs: str) -> None:
    import rasterio
    from rasterio import Affine

    height, width = values.shape
    profile = {"driver": "COG", "dtype": "uint16", "count": 1, "height": height, "width": width, "nodata": 0}
    options = {"compress": "deflate", "predictor": "yes", "blocksize": 256, "overview_resampling": "average"}
    with rasterio.open(path, "w", **profile, **options, transform=Affine(*transform), crs=crs) as file:
        file.write(values, 1)


def _asset(path: Path, name: str, shape: tuple[int, ...], transform: _Grid) -> dict[str, Any]:
    band = BANDS[name]
    return {
        "href": str(path),
        "type": "image/tiff; application=geotiff; profile=cloud-optimized",
        "title": f"{band.long_name.capitalize()} - {band.resolution}m",
        "eo:bands": [
            {
                "name": name,
                "common_name": band.aliases[0].rstrip("123") if "rededge" in band.aliases[0] else band.aliases[0],
                "center_wavelength": round(band.wavelength / 1000, 4),
                "full_width_half_max": round(band.width / 1000, 4),
            }
        ],
        "gsd": band.resolution,
        "proj:shape": list(shape),
        "proj:transform": list(transform),
        "raster:bands": [
            {
                "nodata": 0,
                "data_type": "uint16",
                "spatial_resolution": band.resolution,
                "scale": 0.0001,
                "offset": 0,
            }
        ],
        "roles": ["data", "reflectance"],
    }


def _outline(transform: _Grid, height: int, width: int, epsg: int) -> NDArray[np.float64]:
    """Return the border ``(65, 2)``, longitude and latitude, closed and counterclockwise, with 16 points a side."""
    from rasterio.warp import transform as reproject

    t = np.arange(16) / 16
    columns = np.concatenate([0 * t, t, 0 * t + 1, 1 - t, [0]]) * width
    rows = np.concatenate([t, 0 * t + 1, 1 - t, 0 * t, [0]]) * height
    a, b, c, d, e, f = transform
    x, y = a * columns + b * rows + c, d * columns + e * rows + f
    return np.stack(reproject(f"EPSG:{epsg}", "EPSG:4326", x.tolist(), y.tolist()), axis=-1)


def _item(
    item_id: str,
    collection: str,
    datetime: dt.datetime | str,
    epsg: int,
    ring: NDArray[np.float64],
    assets: dict[str, Any],
) -> dict[str, Any]:
    when = dt.datetime.fromisoformat(datetime) if isinstance(datetime, str) else datetime
    when = when.replace(tzinfo=when.tzinfo or dt.UTC).astimezone(dt.UTC)
    small = 1e-7  # degrees: what the border may still bulge between two points of the ring
    west, south = (ring.min(axis=0) - small).tolist()
    east, north = (ring.max(axis=0) + small).tolist()
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "stac_extensions": [
            "https://stac-extensions.github.io/projection/v1.1.0/schema.json",
            "https://stac-extensions.github.io/sentinel-2/v1.0.0/schema.json",
            "https://stac-extensions.github.io/raster/v1.1.0/schema.json",
            "https://stac-extensions.github.io/eo/v1.1.0/schema.json",
        ],
        "id": item_id,
        "geometry": {"type": "Polygon", "coordinates": [ring.tolist()]},
        "bbox": [west, south, east, north],
        "properties": {
            "platform": "sentinel-2b",
            "constellation": "sentinel-2",
            "instruments": ["msi"],
            "eo:cloud_cover": 0.0,
            "proj:epsg": epsg,
            "proj:centroid": {"lat": (south + north) / 2, "lon": (west + east) / 2},
            "s2:processing_baseline": "02.14",
            "s2:product_type": "S2MSI2A",
            "datetime": when.isoformat().replace("+00:00", "Z"),
            "earthsearch:boa_offset_applied": False,
        },
        "links": [],
        "assets": assets,
        "collection": collection,
    }
