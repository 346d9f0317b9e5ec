"""What a STAC item says of a Sentinel-2 scene: where each band lies, on which grid, with what radiometry.

Plain JSON in, plain values out; nothing is opened but the metadata of a Zarr store whose item does not tell its grid or
its type. Catalogues disagree about keys, names and extensions, so a band is looked for in everything an asset gives.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, timedelta
from datetime import datetime as Datetime
from typing import Any, Literal
from urllib.parse import urljoin, urlsplit

import numpy as np

from .addresses import REMOTE, Address, failure, public_url
from .areas import near
from .bands import SCL, layer_name, resolution_of
from .grids import Grid
from .provenance import version_of
from .radiometry import (
    CLASS_NUMBERS,
    Radiometry,
    described_bands,
    processing_baseline,
    radiometry,
    stated_nodata,
    statements,
)

RASTERS = ("image/tiff", "image/jp2", "image/vnd.stac.geotiff")
ZARR = ("application/vnd+zarr", "application/vnd.zarr")
"""Media types, as they begin."""
DRIVERS = {"image/jp2": ("JP2OpenJPEG", "JP2KAK", "JP2ECW", "JP2MrSID")}
"""Of GDAL, by which rasters of a media type are opened; all others are GeoTIFFs."""

LARGEST_SIDE = 2**17
"""Pixels of an image's side; a tile of Sentinel-2 has 10,980."""
DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64")
"""Of stored numbers."""


_SIGNING = threading.Lock()


@dataclass(frozen=True)
class BandAsset:
    """Where a band lies, and what its digital numbers mean."""

    href: Address
    """Of a raster that GDAL can open, or of a Zarr array."""
    epsg: int
    """Code of the raster's CRS."""
    grid: Grid
    """The raster's grid."""
    radiometry: Radiometry
    """How to read its pixels."""
    is_zarr: bool = False
    """Whether it is read by zarr instead of GDAL."""
    about: str = ""
    """The item and its asset, for errors."""
    drivers: tuple[str, ...] = ("GTiff",)
    """Of GDAL that may open it."""
    typed: bool = True
    """Whether the item tells the type of its numbers."""
    nodata: float | None = None
    """What the item says that missing pixels hold."""


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
    version: str = ""
    """What tells it from a later version of the same id, see `provenance.version_of`."""
    satellite: str | None = None
    """Its letter, where the item tells it."""

    @property
    def place(self) -> tuple[int, Grid]:
        """Return the CRS and the grid of its first band, the same for all items of a tile."""
        asset = next(iter(self.bands.values()))
        return asset.epsg, asset.grid

    @property
    def solar_day(self) -> str:
        """Return the date by local solar time, which does not change within one overpass."""
        return solar_day(self.datetime, self.longitude)

    def solar_day_near(self, longitude: float) -> str:
        """Return the solar day counted as at a longitude, so that it is the same on both sides of 180 degrees."""
        return solar_day(self.datetime, near(self.longitude, longitude))

    def shows_the_same(self, other: Scene) -> bool:
        """Return whether another item is of the same tile, satellite and overpass, in whatever processing version."""
        at_once = abs(self.datetime - other.datetime) < timedelta(minutes=1)
        by_one = None in (self.satellite, other.satellite) or self.satellite == other.satellite
        return at_once and by_one and self.place == other.place

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


def read_item(
    item: Mapping[str, Any],
    bands: Iterable[str],
    *,
    offset: float | Literal["auto"] = "auto",
    look: Callable[[str], Mapping[str, Any]] | None = None,
    remote_only: bool = False,
    sign: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> Scene:
    """Return what reading a STAC item takes: the asset of each band at its native resolution, grid and radiometry.

    Parameters
    ----------
    item : mapping
        STAC JSON.
    bands : iterable of str
        ESA names, and ``SCL``.
    offset : "auto" or number
        As for `radiometry`.
    look : callable, optional
        Returns in the words of STAC what the Zarr array at a URL says of itself, such as `reader.look`. Called only
        where the item does not tell a Zarr asset's grid or its type.
    remote_only : bool
        Refuse assets that are no remote address: GDAL would open any file of this machine, and ``/vsi…`` whatever GDAL
        can be made to do.
    sign : callable, optional
        Returns the JSON of an item with addresses by which its files can be reached now. It is called here, and again
        whenever a file is opened.

    Raises
    ------
    ValueError
        If a band has no asset at its native resolution, or an asset does not tell its CRS, grid and radiometry, or
        is refused.
    """
    try:
        return _read(item, bands, offset, look, remote_only, sign)
    except ValueError as error:
        if str(error).startswith("item "):
            raise
        named, problem = item.get("id"), failure(error)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError) as error:
        named = item.get("id") if isinstance(item, Mapping) else item
        problem = failure(error)
    raise ValueError(f"item {str(named)[:100]!r} is not as STAC has it: {problem}")


def _read(
    item: Mapping[str, Any],
    bands: Iterable[str],
    offset: float | Literal["auto"],
    look: Callable[[str], Mapping[str, Any]] | None,
    remote_only: bool,
    sign: Callable[[dict[str, Any]], dict[str, Any]] | None,
) -> Scene:
    found = {}
    if not isinstance(item["id"], str) or not item["id"]:
        raise ValueError(f"an item's id is {str(item['id'])[:80]!r}, which must be text")
    raw, item = item, item if sign is None else _signed(item, sign)
    for name in bands:
        key, asset = _find_asset(item, name)
        about, href = f"item {item['id']}, asset {key!r}", _href(item, key, asset)
        if remote_only and urlsplit(href).scheme not in REMOTE:
            raise ValueError(
                f"{about}: {public_url(href)} is no remote address ({', '.join(REMOTE)}), and a catalogue must not "
                "choose which files of this machine are read. If it is yours, type local_files=True"
            )
        if _is_zarr(asset) and _is_vague(item, key, asset):
            asset = {**asset, **_look(about, href, look)}
        meaning = CLASS_NUMBERS if name == SCL else radiometry(item, asset, offset)
        if meaning.dtype not in DTYPES:
            raise ValueError(f"{about}: its data_type is {meaning.dtype[:40]!r}; it must be one of {', '.join(DTYPES)}")
        found[name] = BandAsset(
            href=Address(href, None if sign is None else _Signed(_only(raw, key), name, sign)),
            epsg=_epsg(item, key, asset),
            grid=_asset_grid(item, key, asset),
            radiometry=meaning,
            is_zarr=_is_zarr(asset),
            about=about,
            drivers=DRIVERS.get(str(asset.get("type")).partition(";")[0].strip(), ("GTiff",)),
            typed=name == SCL or any(place.get("data_type") for place in statements(asset)),
            nodata=None if name == SCL else stated_nodata(asset),
        )
    baseline = processing_baseline(item)
    return Scene(item["id"], _moment(item), _longitude(item), found, baseline, version_of(item), _satellite(item))


@dataclass(frozen=True)
class _Signed:
    """Signs an item again, and finds a band's address in it."""

    item: Mapping[str, Any]
    name: str
    sign: Callable[[dict[str, Any]], dict[str, Any]]

    def __call__(self) -> str:
        item = _signed(self.item, self.sign)
        return _href(item, *_find_asset(item, self.name))


def _signed(item: Mapping[str, Any], sign: Callable[[dict[str, Any]], dict[str, Any]]) -> Mapping[str, Any]:
    """Return an item, signed; one at a time, as nobody promises that ``sign`` can do more."""
    with _SIGNING:
        return sign(dict(item))


def _only(item: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return an item without all but one of its assets, and what leads elsewhere."""
    own = [link for link in item.get("links", ()) if link.get("rel") == "self"]
    kept = {name: asset for name, asset in item["assets"].items() if name == key or key.startswith(f"{name}/")}
    return {**item, "assets": kept, "links": own}


def _satellite(item: Mapping[str, Any]) -> str | None:
    """Return the letter of Sentinel-2's satellite that an item names, in its properties or at the start of its id."""
    for text in (item["properties"].get("platform"), item["id"]):
        if match := re.match(r"(?:sentinel-?2|s2)([a-z])(?![a-z])", str(text), re.IGNORECASE):
            return match[1].lower()
    return None


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
    crosses = west > east or east - west > 180  # by the standard, or as a box around both of its parts
    return ((west + east + (360 if crosses else 0)) / 2 + 180) % 360 - 180


def _find_asset(item: Mapping[str, Any], name: str) -> tuple[str, Mapping[str, Any]]:
    """Return the asset that holds a band at its native resolution: COG before JPEG2000, an array before its group."""
    candidates = [(key, asset) for key, asset in _band_assets(item) if _asset_band(key, asset) == name]
    native = [(k, a) for k, a in candidates if _resolution(item, a) in (None, resolution_of(name))]
    if not native:
        found = ", ".join(f"{key} ({_resolution(item, asset):g} m)" for key, asset in candidates)
        raise ValueError(
            f"item {item['id']} of {item.get('collection')!r} has no asset with {name} at its native "
            f"{resolution_of(name)} m"
            + (f"; it has {found}" if found else f"; its assets are {', '.join(item['assets'])}")
        )
    return min(native, key=lambda pair: ("jp2" in (pair[1].get("type") or ""), "/" in pair[0]))


def _band_assets(item: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield an item's rasters of one band each; a Zarr group of several is taken apart, under ``key/band``."""
    for key, asset in item["assets"].items():
        if set(asset.get("roles") or ()) & {"thumbnail", "overview", "visual"}:
            continue
        bands = described_bands(asset)
        href = re.split(r"[?#]", asset["href"])[0].rstrip("/")
        if len(bands) == 1 and _is_zarr(asset) and re.search(r"/r\d0m$", href):  # the group of one array
            yield key, {**asset, "href": _within(asset["href"], bands[0]["name"].lower())}
        elif len(bands) <= 1 and (asset.get("type") or "").startswith((*RASTERS, *ZARR)):
            yield key, asset
        elif len(bands) > 1 and _is_zarr(asset):
            for band in bands:
                array = {
                    **asset,
                    **band,
                    "bands": [band],
                    "href": _within(asset["href"], band["name"].lower()),
                }
                if "profile=multiscales" in asset["type"]:  # a group of groups, each of one resolution
                    array["href"] = _within(asset["href"], f"r{array['gsd']}m/{band['name'].lower()}")
                    array["proj:transform"] = None
                yield f"{key}/{band['name']}", array


def _within(href: str, name: str) -> str:
    """Return the address of a member of a group; what is signed stays signed."""
    path, mark, query = href.partition("?")
    return f"{path.rstrip('/')}/{name}{mark}{query}"


def _asset_band(key: str, asset: Mapping[str, Any]) -> str | None:
    """Return the ESA name of the one band that an asset holds, by its band's name, its key or its common name."""
    [band] = described_bands(asset) or [{}]
    names = (band.get("name"), key, band.get("eo:common_name"), band.get("common_name"))
    return next((esa for name in names if name and (esa := layer_name(name))), None)


def _is_zarr(asset: Mapping[str, Any]) -> bool:
    return (asset.get("type") or "").startswith(ZARR)


def _href(item: Mapping[str, Any], key: str, asset: Mapping[str, Any]) -> str:
    """Return where an asset lies; a relative reference is relative to its item."""
    href = str(asset["href"])
    if urlsplit(href).scheme or href.startswith("/"):
        return href
    base = next((str(link["href"]) for link in item.get("links", ()) if link.get("rel") == "self"), None)
    if base is None:
        raise ValueError(
            f"item {item['id']}, asset {key!r}: {public_url(href)} is relative to the item, and no link of the item "
            "tells where that lies. Open the item from its file, pystac.Item.from_file(…)"
        )
    scheme, colon, rest = base.partition(":")
    return scheme + colon + urljoin(rest, href) if colon else urljoin(base, href)  # urljoin does not know s3:


def _is_vague(item: Mapping[str, Any], key: str, asset: Mapping[str, Any]) -> bool:
    """Return whether an item leaves open where a Zarr array's pixels lie, or of what type they are."""
    typed = any(asset.get(field) is not None for field in ("data_type", "raster:scale"))
    return not typed or _stated_grid(item, key, asset) is None


def _look(about: str, href: str, look: Callable[[str], Mapping[str, Any]] | None) -> Mapping[str, Any]:
    shown = public_url(href)
    about = f"{about}: its grid or its type of numbers is told by its Zarr store alone"
    if look is None:
        raise ValueError(f"{about}, {shown}. Type look=xr_ginet.sentinel2.reader.look to open it")
    try:
        return look(href)
    except Exception as error:  # whatever a store raises: missing packages, network, permission, codecs
        problem = failure(error, href)
    raise ValueError(
        f"{about}, and {shown} could not be read ({problem}). Is it reached from here, and are the packages for it "
        "there? https: pip install aiohttp; s3: pip install s3fs"
    )


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
    grid = _stated_grid(item, key, asset)
    if grid is None:
        raise ValueError(f"item {item['id']}, asset {key!r}: no proj:transform and proj:shape to place its pixels")
    return grid


def _stated_grid(item: Mapping[str, Any], key: str, asset: Mapping[str, Any]) -> Grid | None:
    """Return the grid that an item tells: by transform and shape, or by a box in the CRS's units and a resolution."""
    transform, shape, box = (
        asset.get(f"proj:{field}", item["properties"].get(f"proj:{field}")) for field in ("transform", "shape", "bbox")
    )
    about = f"item {item['id']}, asset {key!r}"
    if transform and shape:
        dx, skew_x, x0, skew_y, dy, y0 = (float(value) for value in transform[:6])
        if skew_x or skew_y or dy >= 0 or dx <= 0:
            raise ValueError(f"{about}: its proj:transform {transform} is not north-up")
        return _checked(Grid(x0, y0, dx, dy, (_side(about, shape[0]), _side(about, shape[1]))), about)
    resolution = _resolution(item, asset)
    # EOPF's items of 2025 have degrees here, against the standard; no place of UTM lies within 360 m of its origin.
    if not box or not resolution or max(abs(value) for value in box) <= 360:
        return None
    west, south, east, north = (float(value) for value in box)
    height, width = ((north - south) / resolution, (east - west) / resolution)
    return _checked(Grid(west, north, resolution, -resolution, (_side(about, height), _side(about, width))), about)


def _side(about: str, pixels: float) -> int:
    """Return how many pixels an image has along a side, from what its metadata says."""
    number = float(pixels)
    if not 0.5 < number < LARGEST_SIDE + 0.5:  # NaN neither
        raise ValueError(f"{about}: an image of {number:g} pixels a side; from 1 to {LARGEST_SIDE} are read")
    return round(number)


def _checked(grid: Grid, about: str) -> Grid:
    if not np.isfinite(grid.transform).all() or max(map(abs, grid.transform)) > 1e8:
        raise ValueError(f"{about}: its proj:transform {grid.transform} places it nowhere")
    return grid
