"""What a digital number means: ``reflectance = (digital_number + offset) * scale``, and why.

Since processing baseline 04.00 ESA adds 1000 to digital numbers. Some catalogues take it away again, some state it,
some say nothing, and one states an offset that its pixels no longer have. So the decision looks at what an item says
of itself and at what is known of those who say it, never at its date, and carries its reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

OFFSET_BASELINE = 4.0
"""First processing baseline whose digital numbers carry ESA's offset."""


@dataclass(frozen=True)
class Radiometry:
    """How to read one asset's pixels."""

    scale: float
    """Reflectance per digital number."""
    offset: float
    """Added to the digital number before scaling: 0 or -1000."""
    reason: str
    """In words, for the result's attributes."""
    nodata: float = 0
    """A pixel is missing where its stored number is not above this one."""
    dtype: str = "uint16"
    """Of the stored numbers; floating point where a store holds reflectance."""

    def reflectance(self, numbers: NDArray) -> NDArray:
        """Return stored numbers as reflectance, float32, NaN where they are missing or saturated."""
        result = (numbers.astype("float32") + np.float32(self.offset)) * np.float32(self.scale)
        result[~((numbers > self.nodata) & (numbers != SATURATED))] = np.nan
        return result


SATURATED = 65535
"""ESA's digital number of a saturated pixel; no other product's numbers reach it."""

CLASS_NUMBERS = Radiometry(1.0, 0.0, "", dtype="uint8")
"""Of the scene classification, whose class 0 is no data."""

NBART = Radiometry(1e-4, 0.0, "offset 0: Geoscience Australia's NBART carries none", nodata=-999, dtype="int16")
"""Not ESA's product: its items name the baseline of the scene that it was made from, and state no scale or nodata."""

REFLECTANCE = Radiometry(
    1.0, 0.0, "offset 0: the store holds reflectance, scale and offset applied", nodata=-0.09995, dtype="float32"
)
"""Of decoded pixels. ESA's digital number 0 is missing, and -0.1 where whoever decoded it overlooked that."""


def radiometry(
    item: Mapping[str, Any], asset: Mapping[str, Any], offset: float | Literal["auto"] = "auto"
) -> Radiometry:
    """Return the radiometry of an asset of a STAC item.

    The first that applies decides:

    ======================================  ======================================================================
    The item or the asset                   Digital numbers to add
    ======================================  ======================================================================
    ``boa_offset_applied`` is true          0 for COGs, whatever offset is stated beside it: Earth Search has
                                            subtracted it from them (but not from ESA's JPEG2000 files)
    ``boa_offset_applied`` is false, yet    an error: of such items of Earth Search some have 1000 on top of their
    an offset is stated or, where nothing   pixels and others have not, and nothing in the item tells which
    is, the baseline is 04.00 or later
    an offset is stated                     that; an error where the baseline is before 04.00, as ESA added none
    the processing baseline is known        -1000 from 04.00 on, else 0
    otherwise                               an error
    ======================================  ======================================================================

    Geoscience Australia's NBART, and stores of floating point reflectance, carry no offset.

    Parameters
    ----------
    item, asset : mapping
        STAC JSON of the item and of the asset that holds the band.
    offset : "auto" or number
        Digital numbers to add, where the caller knows better than the catalogue.

    Raises
    ------
    ValueError
        If what the item says leaves two answers, or an offset is given for pixels that are reflectance.
    """
    scale, stated = _stated(asset)
    _check_scale(f"item {item['id']}", scale, stated)
    if scale is None and _data_type(asset).startswith("float"):
        if offset not in ("auto", 0):
            raise ValueError(
                f"item {item['id']} has reflectance in its store, not digital numbers: offset={offset:g} cannot be "
                "added. Leave it out"
            )
        return replace(REFLECTANCE, dtype=_data_type(asset))
    is_nbart = any(str(band.get("name")).startswith("nbart_") for band in described_bands(asset))
    pixels = NBART
    if not is_nbart:
        dtype = _data_type(asset)
        pixels = Radiometry(1e-4 if scale is None else scale, 0.0, "", _lowest(stated_nodata(asset), dtype), dtype)
    if offset != "auto":
        return replace(pixels, offset=float(offset), reason=f"offset {offset:g} given by the caller")
    if is_nbart:
        return pixels
    number, reason = _decide(item, asset, None if stated is None else round(stated / pixels.scale))
    return replace(pixels, offset=number, reason=reason)


def _decide(item: Mapping[str, Any], asset: Mapping[str, Any], stated: float | None) -> tuple[float, str]:
    """Return the offset of ESA's digital numbers, and why, from what is stated, the flag and the baseline."""
    flag = next((v for k, v in item["properties"].items() if k.endswith("boa_offset_applied")), None)
    baseline = processing_baseline(item)
    shifted = baseline is not None and baseline >= OFFSET_BASELINE
    if flag is not None and "jp2" not in (asset.get("type") or ""):
        if flag:
            return 0.0, "offset 0: the catalogue took it from the pixels (boa_offset_applied)"
        if stated or (stated is None and shifted):
            raise ValueError(
                f"item {item['id']} says boa_offset_applied=false, yet "
                + (f"states an offset of {stated:g}" if stated else f"its processing baseline is {baseline:05.2f}")
                + ". Of such items some still have 1000 on top of their pixels and some have not: dark water is near "
                "1000, or near 0. Load the collection 'sentinel-2-c1-l2a', whose items can be trusted, or look at the "
                "pixels and type offset=-1000 or offset=0 for these items"
            )
    if stated is None and baseline is None:
        raise ValueError(
            f"item {item['id']} states neither an offset nor its processing baseline, so its digital numbers may or "
            "may not carry 1000 on top. Type offset=0 or offset=-1000"
        )
    if stated is None:
        return (-1000.0 if shifted else 0.0), (
            f"offset {-1000 if shifted else 0}: nothing stated, processing baseline {baseline:05.2f}"
        )
    if stated and baseline is not None and not shifted:
        raise ValueError(
            f"item {item['id']} states an offset of {stated:g}, but its processing baseline is {baseline:05.2f}, and "
            "ESA added none before 04.00. Type offset=0 if the pixels are ESA's own, offset=-1000 if 1000 was added"
        )
    return float(stated), f"offset {stated:g}, as its asset or store states"


class Stored(NamedTuple):
    """How digital numbers are stored, in the words of CF."""

    dtype: str
    scale_factor: float
    add_offset: float
    """In reflectance."""
    nodata: float | None

    @classmethod
    def of(cls, meaning: Radiometry) -> Stored:
        """Return what a radiometry says."""
        return cls(meaning.dtype, meaning.scale, meaning.offset * meaning.scale, meaning.nodata)


def source_attrs(stored: Iterable[Stored | None]) -> dict[str, Any]:
    """Return how the numbers were stored that a cube is made of, as its attributes; none where bands differ."""
    found = set(stored)
    [one] = found if len(found) == 1 else [None]
    if one is None:
        return {}
    return {f"source_{key}": 0 if value is None else value for key, value in one._asdict().items()}


def processing_baseline(item: Mapping[str, Any]) -> float | None:
    """Return an item's processing baseline, from its properties or from its product's name, or None.

    Examples
    --------
    >>> processing_baseline({"id": "S2B_MSIL2A_20200705T101559_N0500_R065_T32TMT", "properties": {}})
    5.0
    """
    properties = item["properties"]
    for key in (
        "s2:processing_baseline",
        "sentinel:processing_baseline",
        "sentinel2:processing_baseline",
        "processing:version",
    ):
        if re.fullmatch(r"\d{2}\.\d{2}", str(properties.get(key, ""))):
            return float(properties[key])
    for text in (item["id"], *(v for v in properties.values() if isinstance(v, str))):
        if match := re.search(r"_N(\d{2})[.]?(\d{2})(?:_|$)", text):
            return float(f"{match.group(1)}.{match.group(2)}")
    return None


def described_bands(asset: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return what an asset says of each of its bands, by STAC 1.1 or by the extension before it."""
    return asset.get("bands") or asset.get("eo:bands") or []


def statements(asset: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the places where an asset may state its radiometry, in the words of three versions of STAC."""
    places = (asset, *asset.get("raster:bands", [])[:1], *asset.get("bands", [])[:1])
    return [place for place in places if isinstance(place, Mapping)]


def _stated(asset: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Return the scale of an asset, and the offset in reflectance, where it states them."""
    for source in statements(asset):
        for prefix in ("", "raster:"):
            if source.get(f"{prefix}scale") is not None:
                offset = source.get(f"{prefix}offset")
                return float(source[f"{prefix}scale"]), None if offset is None else float(offset)
    return None, None


def stated_nodata(asset: Mapping[str, Any]) -> float | None:
    """Return what an asset says that missing pixels hold, or None."""
    found = next((place["nodata"] for place in statements(asset) if place.get("nodata") is not None), None)
    return None if found is None else float(found)


def _lowest(nodata: float | None, dtype: str) -> float:
    """Return the number that pixels must be above: a stated one below 0, or else 0, which ESA's missing pixels hold."""
    return nodata if nodata is not None and -np.inf < nodata < 0 and not dtype.startswith("u") else 0


def _check_scale(about: str, scale: float | None, offset: float | None) -> None:
    """Raise where a stated scale or offset cannot be one of reflectance; NaN neither."""
    if scale is not None and not 1e-6 <= scale <= 1:
        raise ValueError(
            f"{about} states a scale of {scale:g} reflectance per digital number; from 1e-6 to 1 make sense. Correct "
            "the item's raster:scale (1e-4 is ESA's)"
        )
    if offset is not None and not abs(offset) <= 10:
        raise ValueError(
            f"{about} states an offset of {offset:g} in reflectance; from -10 to 10 make sense. Correct the item's "
            "raster:offset, or type offset=0 or offset=-1000"
        )


def _data_type(asset: Mapping[str, Any]) -> str:
    """Return the type of an asset's stored numbers: ESA's own where it states none."""
    return next((str(source["data_type"]) for source in statements(asset) if source.get("data_type")), "uint16")
