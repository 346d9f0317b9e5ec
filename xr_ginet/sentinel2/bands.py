"""The bands of Sentinel-2's MultiSpectral Instrument: names, resolutions, wavelengths, blur.

Facts only. Which asset of a catalogue holds a band is decided in `catalog`, what a digital number means in
`radiometry`.

References
----------
ESA, Sentinel-2 MSI instrument: spectral bands (Sentinel-2A). MTF: gains at the Nyquist frequency as used in the
literature on Sentinel-2 fusion (Lanaras et al. 2018 derive theirs from ESA's data quality reports).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Band:
    """One spectral band."""

    name: str
    """ESA name, such as ``B8A``."""
    resolution: int
    """Native pixel size in metres."""
    wavelength: float
    """Central wavelength in nanometres."""
    width: float
    """Full width at half maximum in nanometres."""
    mtf_gain: float
    """Modulation at the Nyquist frequency of the native grid (for the 10 m bands, of a grid twice as coarse)."""
    long_name: str
    """In words."""
    aliases: tuple[str, ...]
    """Other names of the band in catalogues; the first is what Earth Search calls it."""


BANDS: dict[str, Band] = {
    band.name: band
    for band in (
        Band("B01", 60, 442.7, 21, 0.32, "coastal aerosol", ("coastal", "nbart_coastal_aerosol")),
        Band("B02", 10, 492.4, 66, 0.25, "blue", ("blue", "nbart_blue")),
        Band("B03", 10, 559.8, 36, 0.25, "green", ("green", "nbart_green")),
        Band("B04", 10, 664.6, 31, 0.25, "red", ("red", "nbart_red")),
        Band("B05", 20, 704.1, 15, 0.38, "vegetation red edge 1", ("rededge1", "rededge071", "nbart_red_edge_1")),
        Band("B06", 20, 740.5, 15, 0.34, "vegetation red edge 2", ("rededge2", "rededge075", "nbart_red_edge_2")),
        Band("B07", 20, 782.8, 20, 0.34, "vegetation red edge 3", ("rededge3", "rededge078", "nbart_red_edge_3")),
        Band("B08", 10, 832.8, 106, 0.25, "near infrared", ("nir", "nbart_nir_1")),
        Band("B8A", 20, 864.7, 21, 0.33, "narrow near infrared", ("nir08", "nbart_nir_2")),
        Band("B09", 60, 945.1, 20, 0.26, "water vapour", ("nir09",)),
        Band("B11", 20, 1613.7, 91, 0.22, "short-wave infrared 1", ("swir16", "nbart_swir_2")),
        Band("B12", 20, 2202.4, 175, 0.23, "short-wave infrared 2", ("swir22", "nbart_swir_3")),
    )
}


def bands_of(resolution: int) -> tuple[str, ...]:
    """Return the names of the bands of one native resolution in metres.

    Examples
    --------
    >>> bands_of(10)
    ('B02', 'B03', 'B04', 'B08')
    """
    return tuple(name for name, band in BANDS.items() if band.resolution == resolution)


BANDS_10M = bands_of(10)
BANDS_20M = bands_of(20)
BANDS_60M = bands_of(60)

SCL = "SCL"
"""The scene classification of level 2A at 20 m: a layer of classes, no band."""

LAYERS = (*BANDS_10M, *BANDS_20M, *BANDS_60M, SCL)
"""What is read from products and catalogues."""


def resolution_of(layer: str) -> int:
    """Return the native resolution in metres of a band or of the scene classification."""
    return 20 if layer == SCL else BANDS[layer].resolution


def layers_for(bands: str, *, mask_clouds: bool) -> tuple[str, ...]:
    """Return what to load for `superresolve(bands=…)`, ``"20m"`` or ``"all"``, with or without `mask_clouds`."""
    sixty, classes = BANDS_60M if bands == "all" else (), (SCL,) if mask_clouds else ()
    return (*BANDS_10M, *BANDS_20M, *sixty, *classes)


_NAMES = {alias.lower(): band.name for band in BANDS.values() for alias in (band.name, *band.aliases)}


def band_name(name: str) -> str | None:
    """Return the ESA name of a band by any of its unique names, whatever the case, or None.

    Examples
    --------
    >>> band_name("rededge1"), band_name("b8a"), band_name("B05_20m"), band_name("rededge")
    ('B05', 'B8A', 'B05', None)
    """
    return _NAMES.get(_stem(name))


def layer_name(name: str) -> str | None:
    """Return what `band_name` does, or ``SCL`` for the scene classification.

    Examples
    --------
    >>> layer_name("scl"), layer_name("SCL_20m"), layer_name("nir")
    ('SCL', 'SCL', 'B08')
    """
    return SCL if _stem(name) == "scl" else band_name(name)


def _stem(name: str) -> str:
    key = name.lower()
    for ending in ("_10m", "_20m", "_60m", "-jp2"):
        key = key.removesuffix(ending)
    return key
