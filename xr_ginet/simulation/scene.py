"""A simulated scene: the land, drawn at 5 m and given ten-band spectra, seen through a Gaussian instrument, with noise.

Moisture, irrigation and chlorophyll vary on their own, so that the 20 m bands hold detail of which the 10 m bands know
nothing: a super-resolver that copies the 10 m bands is found out. Nothing here is written to files.

References
----------
Blur: `xr_ginet.training.degradation`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..sentinel2.bands import BANDS_10M, BANDS_20M
from ..training.degradation import degrade, mtf_mean
from .canvas import Float, random_stream, smooth
from .land import Land
from .landscape import draw_land
from .spectra import GROUPS, Spectra, draw_spectra

MARGIN = 12  # cells drawn beyond each side, so that the instrument's 12 taps see land and not a mirror
OWN_GAIN = 0.25  # modulation of the 10 m instrument at its own Nyquist frequency, for all bands of the reference
SNR = 150.0  # signal to noise at REFLECTANCE_OF_SNR; the noise grows with the root of the signal
REFLECTANCE_OF_SNR = 0.3
NOISE_FLOOR = 0.01  # reflectance below which the noise no longer falls

# How a band answers to what varies within a parcel, per standard deviation, as a logarithm.
ANSWER_TO_MOISTURE = (-0.02, -0.02, -0.03, -0.01, -0.02, -0.01, -0.01, -0.02, -0.11, -0.18)
ANSWER_TO_CHLOROPHYLL = (-0.01, -0.03, -0.02, 0.00, -0.11, -0.07, -0.01, 0.00, 0.00, 0.00)
ANSWER_TO_DENSITY = (-0.05, -0.03, -0.09, 0.07, -0.05, 0.04, 0.06, 0.07, -0.04, -0.08)
GROUP_SPREAD = (0.03, 0.02, 0.02, 0.03, 0.045)  # of the grain that the bands of one of GROUPS share


@dataclass(frozen=True)
class Scene:
    """A scene at its native resolutions and the 10 m truth behind it."""

    reference: Float
    """``(10, y, x)`` float32 reflectance at 10 m, bands BANDS_10M + BANDS_20M, free of noise, all with one blur."""
    fine: Float
    """``(4, y, x)`` float32 reflectance: the bands BANDS_10M with noise."""
    coarse: Float
    """``(6, y / 2, x / 2)`` float32 reflectance: the bands BANDS_20M, blurred by the instrument, with noise."""
    transform: tuple[float, float, float, float, float, float]
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
    land = draw_land((2 * shape[0] + 2 * MARGIN, 2 * shape[1] + 2 * MARGIN), seed)
    reference = _observe(land, draw_spectra(land.n_parcels, seed=seed, season=season))
    rng = random_stream(seed, "noise", int(season * 2**32))
    fine = _with_noise(reference[: len(BANDS_10M)], rng)
    coarse = _with_noise(degrade(reference[len(BANDS_10M) :], BANDS_20M, degradation="mtf"), rng)
    transform = (10.0, 0.0, float(origin[0]), 0.0, -10.0, float(origin[1]))
    return Scene(reference=reference, fine=fine, coarse=coarse, transform=transform, crs=crs)


def _observe(land: Land, spectra: Spectra) -> Float:
    """Return the noise-free 10 m image ``(10, y, x)``: spectra, varied within materials, through the instrument."""
    shape = land.shape
    rng = random_stream(land.seed, "grain")
    greenness = spectra.greenness[land.material]
    moisture = land.moisture * spectra.thirst[land.material]
    chlorophyll, density = land.chlorophyll * greenness, land.density * greenness
    shade = land.canopy * spectra.roughness[land.material]
    grain_here = spectra.grain[land.material]
    inner = slice(MARGIN // 2, -(MARGIN // 2))
    out = np.empty((10, shape[0] // 2 - MARGIN, shape[1] // 2 - MARGIN), np.float32)
    for group, spread in zip(GROUPS, GROUP_SPREAD, strict=True):
        grain = np.float32(0.7) * smooth(shape, 60, rng) + np.float32(0.7) * smooth(shape, 14, rng)
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
