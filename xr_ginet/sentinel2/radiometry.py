"""What a digital number means: ``reflectance = (digital_number + offset) * scale``, and why.

Since processing baseline 04.00 ESA adds 1000 to digital numbers. Some catalogues take it away again, some state it,
some say nothing, and one states an offset that its pixels no longer have. So the decision looks at what an item says
of itself, never at its date, and carries its reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

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


def radiometry(
    item: Mapping[str, Any], asset: Mapping[str, Any], offset: float | Literal["auto"] = "auto"
) -> Radiometry:
    """Return the radiometry of an asset of a STAC item.

    Parameters
    ----------
    item, asset : mapping
        STAC JSON of the item and of the asset that holds the band.
    offset : "auto" or number
        Digital numbers to add, where the caller knows better than the catalogue.

    Raises
    ------
    ValueError
        If the item neither states an offset nor tells its processing baseline.
    """
    scale, stated = _stated(asset)
    if offset != "auto":
        return Radiometry(scale, float(offset), f"offset {offset:g} given by the caller")
    flag = next((v for k, v in item["properties"].items() if k.endswith("boa_offset_applied")), None)
    if flag and "jp2" not in (asset.get("type") or ""):
        return Radiometry(scale, 0.0, "offset 0: the catalogue took it from the pixels (boa_offset_applied)")
    if stated is not None:
        return Radiometry(scale, round(stated / scale), f"offset {stated:g} reflectance as the asset states")
    baseline = processing_baseline(item)
    if baseline is None:
        raise ValueError(
            f"item {item['id']} states neither an offset nor its processing baseline, so its digital numbers may or "
            "may not carry 1000 on top. Type offset=0 or offset=-1000"
        )
    shifted = baseline >= OFFSET_BASELINE
    return Radiometry(
        scale,
        -1000.0 if shifted else 0.0,
        f"offset {-1000 if shifted else 0}: nothing stated, processing baseline {baseline:05.2f}",
    )


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


def _stated(asset: Mapping[str, Any]) -> tuple[float, float | None]:
    """Return the scale of an asset, 0.0001 where it states none, and the offset in reflectance if it states one."""
    for source in (asset, *asset.get("raster:bands", [])[:1], *asset.get("bands", [])[:1]):
        for prefix in ("", "raster:"):
            if isinstance(source, Mapping) and source.get(f"{prefix}scale") is not None:
                offset = source.get(f"{prefix}offset")
                return float(source[f"{prefix}scale"]), None if offset is None else float(offset)
    return 1e-4, None
