"""What a STAC item says of a Sentinel-2 scene: where each band lies, on which grid, with what radiometry.

Plain JSON in, plain values out; nothing is opened. Catalogues disagree about keys, names and extensions, so a band is
looked for in everything an asset gives.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, timedelta
from datetime import datetime as Datetime
from typing import Any, Literal

from .bands import BANDS, band_name
from .grids import Grid
from .radiometry import Radiometry, processing_baseline, radiometry


@dataclass(frozen=True)
class BandAsset:
    """Where a band lies, and what its digital numbers mean."""

    href: str
    """Of a raster that GDAL can open."""
    epsg: int
    """Code of the raster's CRS."""
    grid: Grid
    """The raster's grid."""
    radiometry: Radiometry
    """How to read its pixels."""


@dataclass(frozen=True)
class Scene:
    """One STAC item, reduced to what reading it takes."""

    id: str
    datetime: Datetime
    longitude: float
    """Of the centre, degrees east; for the local solar day."""
    bands: Mapping[str, BandAsset]
    baseline: float | None = None
    """Processing baseline, where the item tells it."""

    @property
    def solar_day(self) -> str:
        """Return the date by local solar time, which does not change within one overpass."""
        return solar_day(self.datetime, self.longitude)

    def shows_the_same(self, other: Scene) -> bool:
        """Return whether another item is of the same tile and overpass, in whatever processing version."""
        mine, others = (next(iter(scene.bands.values())) for scene in (self, other))
        at_once = abs(self.datetime - other.datetime) < timedelta(minutes=1)
        return at_once and (mine.epsg, mine.grid) == (others.epsg, others.grid)

    def is_native(self, epsg: int) -> bool:
        """Return whether all bands lie in a CRS, so that none needs resampling."""
        return all(asset.epsg == epsg for asset in self.bands.values())


def solar_day(moment: Datetime, longitude: float) -> str:
    """Return the date of a moment in UTC by the local solar time at a longitude in degrees east.

    Examples
    --------
    >>> solar_day(Datetime(2025, 4, 27, 0, 7), -179.0)
    '2025-04-26'
    """
    return (moment + timedelta(hours=longitude / 15)).date().isoformat()


def read_item(item: Mapping[str, Any], bands: Iterable[str], *, offset: float | Literal["auto"] = "auto") -> Scene:
    """Return what reading a STAC item takes: the asset of each band at its native resolution, grid and radiometry.

    Raises
    ------
    ValueError
        If a band has no asset at its native resolution, or an asset does not tell its CRS and grid.
    """
    found = {}
    for name in bands:
        key, asset = _find_asset(item, name)
        found[name] = BandAsset(
            href=asset["href"],
            epsg=_epsg(item, key, asset),
            grid=_asset_grid(item, key, asset),
            radiometry=radiometry(item, asset, offset),
        )
    return Scene(item["id"], _moment(item), _longitude(item), found, processing_baseline(item))


def _moment(item: Mapping[str, Any]) -> Datetime:
    """Return an item's time in UTC, without a zone as numpy has it."""
    text = item["properties"].get("datetime") or item["properties"].get("start_datetime")
    if not text:
        raise ValueError(f"item {item['id']} has neither datetime nor start_datetime")
    moment = Datetime.fromisoformat(text.upper().replace("Z", "+00:00"))
    return moment.astimezone(UTC).replace(tzinfo=None) if moment.tzinfo else moment


def _longitude(item: Mapping[str, Any]) -> float:
    """Return the longitude of the centre of an item's bbox, which may cross the antimeridian."""
    bbox = item.get("bbox")
    if not bbox or len(bbox) not in (4, 6):
        raise ValueError(f"item {item['id']} has no bbox, by which to tell its solar day; it says {bbox}")
    west, east = bbox[0], bbox[len(bbox) // 2]
    return ((west + east + (360 if west > east else 0)) / 2 + 180) % 360 - 180


def _find_asset(item: Mapping[str, Any], name: str) -> tuple[str, Mapping[str, Any]]:
    """Return the asset that holds a band at its native resolution, COG before JPEG2000."""
    candidates = [
        (key, asset) for key, asset in item["assets"].items() if _is_raster(asset) and _asset_band(key, asset) == name
    ]
    native = [(k, a) for k, a in candidates if _resolution(item, a) in (None, BANDS[name].resolution)]
    if not native:
        found = ", ".join(f"{key} ({_resolution(item, asset):g} m)" for key, asset in candidates)
        raise ValueError(
            f"item {item['id']} of {item.get('collection')!r} has no asset with {name} at its native "
            f"{BANDS[name].resolution} m"
            + (f"; it has {found}" if found else f"; its assets are {', '.join(item['assets'])}")
        )
    return min(native, key=lambda pair: "jp2" in (pair[1].get("type") or ""))


def _asset_band(key: str, asset: Mapping[str, Any]) -> str | None:
    """Return the ESA name of the one band that an asset holds, by its band's name, its key or its common name."""
    described = asset.get("bands") or asset.get("eo:bands") or [{}]
    if len(described) > 1:
        return None
    band = described[0]
    names = (band.get("name"), key, band.get("eo:common_name"), band.get("common_name"))
    return next((esa for name in names if name and (esa := band_name(name))), None)


def _is_raster(asset: Mapping[str, Any]) -> bool:
    """Return whether an asset is data that GDAL reads as one raster, and no picture of it."""
    media_type, roles = asset.get("type") or "", set(asset.get("roles") or ())
    return media_type.startswith(("image/tiff", "image/jp2", "image/vnd.stac.geotiff")) and not roles & {
        "thumbnail",
        "overview",
        "visual",
    }


def _resolution(item: Mapping[str, Any], asset: Mapping[str, Any]) -> float | None:
    transform = asset.get("proj:transform", item["properties"].get("proj:transform"))
    if transform:
        return abs(float(transform[0]))
    return float(asset["gsd"]) if "gsd" in asset else None


def _epsg(item: Mapping[str, Any], key: str, asset: Mapping[str, Any]) -> int:
    for source in (asset, item["properties"]):
        if source.get("proj:epsg"):
            return int(source["proj:epsg"])
        if str(source.get("proj:code", "")).upper().startswith("EPSG:"):
            return int(source["proj:code"][5:])
    raise ValueError(f"item {item['id']}, asset {key!r}: neither proj:epsg nor proj:code tells its CRS")


def _asset_grid(item: Mapping[str, Any], key: str, asset: Mapping[str, Any]) -> Grid:
    transform, shape = (asset.get(f"proj:{k}", item["properties"].get(f"proj:{k}")) for k in ("transform", "shape"))
    if not transform or not shape:
        raise ValueError(f"item {item['id']}, asset {key!r}: no proj:transform and proj:shape to place its pixels")
    dx, skew_x, x0, skew_y, dy, y0 = (float(value) for value in transform[:6])
    if skew_x or skew_y or dy >= 0:
        raise ValueError(f"item {item['id']}, asset {key!r}: its proj:transform {transform} is not north-up")
    return Grid(x0, y0, dx, dy, (int(shape[0]), int(shape[1])))
