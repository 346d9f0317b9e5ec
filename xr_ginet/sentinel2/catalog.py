"""STAC items to a lazy two-grid cube of reflectance.

pystac-client searches and stackstac reads. Between the two stands what a general reader cannot know of Sentinel-2:
which asset holds which band at its native resolution, what its digital numbers mean, and that the 10 m and the 20 m
grid must nest. Nothing is read here but metadata.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xarray as xr

from .addresses import failure, public_url
from .areas import Box, centre_longitude, check_bbox, geometry_bounds, search_area
from .bands import BANDS_10M, BANDS_20M, LAYERS, SCL, resolution_of
from .grids import Grid, read_crs, transform_bounds
from .items import BandAsset, Scene, read_item, solar_day
from .layouts import describe
from .provenance import ITEMS, MASK, REASONS, STORED, VERSIONS, known, of_dates
from .radiometry import source_attrs
from .reader import look, read_scenes
from .search import DEFAULT_COLLECTION, find_items, is_searched, signer
from .times import times_of

if TYPE_CHECKING:
    from .search import Catalog

GroupBy = Literal["solar_day"] | None
MOST_PIXELS = 10**10
"""Of 10 m in one image of a cube: a million square kilometres. More is taken for a mistake."""

SAME_OVERPASS = timedelta(minutes=15)
"""Tiles of one overpass are seconds to minutes apart, the next overpass of the same ground at least fifty minutes."""


def open_stac(
    catalog: Catalog,
    *,
    collection: str = DEFAULT_COLLECTION,
    bbox: tuple[float, float, float, float] | None = None,
    intersects: dict[str, Any] | None = None,
    datetime: str | None = None,
    query: dict[str, Any] | None = None,
    max_items: int | None = None,
    crs: int | str | None = None,
    chunks: int = 1024,
    groupby: GroupBy = "solar_day",
    sign: Callable[[Any], Any] | None = None,
    offset: float | Literal["auto"] = "auto",
    bands: Sequence[str] = (*BANDS_10M, *BANDS_20M),
    local_files: bool = False,
) -> xr.Dataset:
    """Return a lazy two-grid cube of reflectance from a STAC catalogue.

    Parameters
    ----------
    catalog : str, pystac_client.Client, pystac.ItemCollection or list of items
        URL of a STAC API, an open client, or items already found (pystac Items or their JSON).
    collection : str
        Collection to search.
    bbox : (west, south, east, north), optional
        Degrees; what is searched, and what the cube covers. Without it the cube covers all items found. A box across
        180 degrees has its west edge at the larger longitude.
    intersects : GeoJSON geometry, optional
        In place of ``bbox``; the cube covers its bounds. Its text, a Feature, or a geometry of shapely will do. A
        geometry across 180 degrees is cut in two there. A Point covers no pixel, and is refused.
    datetime, query, max_items : optional
        As for `pystac_client.Client.search`.
    crs : int or str, optional
        CRS of the cube, for items in several: then those of others are resampled, and the network no longer sees
        native pixels.
    chunks : int
        Pixels per chunk and axis at 10 m, even; 20 m bands get half of it. Zarr stores are read in whole chunks of
        their own (1830 pixels in EOPF's): a multiple of these, or a much larger number, spares reading them twice.
    groupby : {"solar_day", None}
        ``"solar_day"`` joins the items of one day to one time step, the first valid pixel on top; None keeps tiles,
        overpasses and satellites apart. Of several processing baselines of one scene the highest alone is used.
        Products of one baseline that share a tile's pixels between them are always joined.
    sign : callable, optional
        Applied to each item, such as ``planetary_computer.sign``; returns the item with addresses by which its files
        can be reached. It is called again whenever a file is opened, so that cubes outlive their tokens. A Client's own
        ``modifier`` is used likewise.
    offset : "auto" or number
        Digital numbers to add; ``"auto"`` decides from what each item says, see `radiometry.radiometry`. The decision
        is in the result's coordinate ``radiometry``.
    bands : sequence of str
        What to load: ESA names of bands, and ``"SCL"`` for the scene classification. With B01 or B09 the cube is
        snapped outwards to whole 60 m pixels.
    local_files : bool
        Whether items that were searched for may name files of this machine. Items that are given may.

    Returns
    -------
    Dataset
        Dims ``time, y, x`` and ``time, y_20m, x_20m`` (B01, B09: ``time, y_60m, x_60m``); float32 reflectance, NaN
        where no item has data or ESA calls a pixel saturated; ``SCL`` uint8, 0 where no item has data; lazy, chunked.
        Coordinates along ``time`` tell what each date was made from, see `provenance`; attributes what was chosen.

    Raises
    ------
    ValueError
        If nothing is found, an item lacks a band at its native resolution, items over the area lie in several CRS and
        none was asked for, the cube would have more than `MOST_PIXELS`, an item's radiometry or grid cannot be told, a
        searched catalogue names files of this machine, or its pages repeat.
    pystac_client.exceptions.APIError
        If the catalogue does not answer, or with an error.
    ValueError
        When computed: if a file is not what its item says: its CRS, grid, type of numbers or nodata.
    RuntimeError
        When computed: if a file cannot be read. What fails over a network is asked for four times, see `patience`.

    Notes
    -----
    Rasters are opened by GDAL, which has addresses and keys of ``s3://`` from the environment; for the Copernicus Data
    Space, ``AWS_S3_ENDPOINT=eodata.dataspace.copernicus.eu``, ``AWS_VIRTUAL_HOSTING=FALSE`` and the two keys of one's
    account. Zarr stores are opened by zarr; of those whose items do not tell grid or type, metadata is read at once.
    """
    if chunks < 2 or chunks % 2:
        raise ValueError(f"chunks={chunks}: must be an even number of 10 m pixels, so that 20 m chunks nest")
    if not bands or any(band not in LAYERS for band in bands):
        raise ValueError(f"bands={tuple(bands)}: must be among {', '.join(LAYERS)}")
    if bbox is not None:
        if intersects is not None:
            raise ValueError("both bbox and intersects were given: one of them says what to search and to cover")
        check_bbox(bbox)
    area = bbox
    if intersects is not None:
        intersects = _geometry(intersects)
        area = _geometry_bounds(intersects)
    items = find_items(
        catalog,
        collection=collection,
        **search_area(bbox, intersects),
        datetime=datetime,
        query=query,
        max_items=max_items,
    )
    if groupby not in ("solar_day", None):
        raise ValueError(f"groupby={groupby!r}: must be 'solar_day' or None")
    remote_only = is_searched(catalog) and not local_files
    scenes = _read_items(items, bands, offset, remote_only=remote_only, sign=signer(catalog, sign))
    scenes = latest_versions(_over_area(scenes, area))
    epsg = _common_epsg(scenes, crs)
    grid = cube_grid(scenes, epsg, area, pixel=max(20, *map(resolution_of, bands)))
    scenes = _over_ground(scenes, grid, epsg)
    longitude = centre_longitude(transform_bounds(grid.bounds, epsg, 4326))
    scenes, steps = _in_steps(scenes, epsg, longitude, by_day=groupby == "solar_day")
    read = [[name for name in bands if resolution_of(name) == r and name != SCL] for r in (10, 20, 60)]
    read += [[SCL]] if SCL in bands else []
    parts = [
        read_scenes(scenes, names, grid.coarsen(factor), epsg, max(1, chunks // factor), steps)
        for names in read
        if names and (factor := resolution_of(names[0]) // 10)
    ]
    cube = xr.merge(parts, compat="override", join="override")[list(bands)]
    chosen = _chosen(offset, sign) | ({} if groupby else {"source_groupby": "none"})
    chosen |= {} if crs is None else {"source_resampling": "nearest"}
    cube = describe(cube, crs=epsg).assign_attrs(_searched(catalog, collection) | chosen)
    return of_dates(cube, [_of_date([scenes[i] for i in step]) | {MASK: "none"} for step in steps])


def complete(
    ds: xr.Dataset,
    catalog: Catalog,
    *,
    collection: str = DEFAULT_COLLECTION,
    sign: Callable[[Any], Any] | None = None,
    offset: float | Literal["auto"] = "auto",
    bands: Sequence[str] = BANDS_20M,
) -> xr.Dataset:
    """Return a 10 m cube with the 20 m bands that it lacks, from the items of the same days and the same ground.

    Parameters
    ----------
    ds : Dataset
        10 m bands with dims ``time, y, x`` (or ``y, x`` and a scalar coordinate ``time``), with a CRS.
    catalog, collection, sign, offset
        As for `open_stac`.
    bands : sequence of str
        20 m bands that the result must hold; those in ``ds`` already are kept.

    Returns
    -------
    Dataset
        Two-grid; the loaded bands are lazy, chunked as the 10 m bands.

    Raises
    ------
    ValueError
        If ``ds`` has no CRS or time, its grid does not start on the items' 20 m lattice, or a day has no item.
    """
    missing = [name for name in bands if name not in ds]
    if not missing:
        return ds
    crs, grid = read_crs(ds), Grid.from_coords(ds)
    epsg = crs.to_epsg() if crs else None
    if crs is None or epsg is None or "time" not in ds.coords:
        raise ValueError(
            f"the cube has no {'time coordinate' if epsg else 'CRS with an EPSG code'}, by which to find its 20 m "
            "bands. Type " + ("ds.expand_dims(time=[…])" if epsg else "ds.rio.write_crs('EPSG:…')")
        )
    if any(n % 2 for n in grid.shape):
        raise ValueError(f"the cube has {grid.shape} pixels; even numbers are needed for 20 m pixels to nest in it")
    bounds = transform_bounds(grid.bounds, epsg, 4326)
    times = times_of(ds)
    longitude = centre_longitude(bounds)
    days = [_day(time, longitude) for time in times]
    first, last = (np.datetime64(day(days), "D") for day in (min, max))
    searched = is_searched(catalog)
    items = find_items(
        catalog,
        collection=collection,
        **search_area(bounds, None),
        datetime=f"{first - 1}T00:00:00Z/{last + 1}T23:59:59Z" if searched else None,
    )
    scenes = latest_versions(_read_items(items, missing, offset, remote_only=searched, sign=signer(catalog, sign)))
    # Items of a neighbouring UTM zone show the same ground, but would have to be resampled.
    scenes = [scene for scene in scenes if scene.solar_day_near(longitude) in days and scene.is_native(epsg)]
    scenes = _over_ground(sorted(scenes, key=lambda s: (s.datetime, s.id)), grid, epsg)
    without = sorted(set(days) - {s.solar_day_near(longitude) for s in scenes})
    if without:
        raise ValueError(
            f"no item of {collection!r} in EPSG:{epsg} on {', '.join(without[:5])} over the cube's ground: its 20 m "
            "bands cannot be loaded. Select the other times, or name another collection="
        )
    lattice = cube_grid(scenes, epsg, None)
    if any(abs((a - b) / 20 - round((a - b) / 20)) > 1e-6 for a, b in ((grid.x0, lattice.x0), (grid.y0, lattice.y0))):
        raise ValueError(
            f"the cube starts at x={grid.x0:.10g}, y={grid.y0:.10g}, within a 20 m pixel of the items (which start at "
            f"{lattice.x0:.10g}, {lattice.y0:.10g}). Drop its first 10 m row or column: ds.isel(x=slice(1, None))"
        )
    chunk = max(max(ds.chunksizes.get(dim, (1024,))) for dim in ("y", "x")) // 2
    by_day: dict[str, list[int]] = {}
    for index, scene in enumerate(scenes):
        by_day.setdefault(scene.solar_day_near(longitude), []).append(index)
    steps = [_nearest(scenes, by_day[day], time) for time, day in zip(times, days, strict=True)]
    loaded = read_scenes(scenes, missing, grid.coarsen(2), epsg, max(chunk, 1), steps)
    if "time" in ds.dims:
        loaded = loaded.assign_coords(time=ds["time"])
    else:
        loaded = loaded.isel(time=0, drop=True)
    chosen = _searched(catalog, collection) | _chosen(offset, sign)
    cube = describe(ds.merge(loaded, compat="override", join="override"), crs=crs).assign_attrs(ds.attrs | chosen)
    return of_dates(
        cube, [_of_date([scenes[i] for i in step], had) for step, had in zip(steps, known(ds), strict=True)]
    )


def _read_items(
    items: Sequence[Mapping[str, Any]],
    bands: Sequence[str],
    offset: float | Literal["auto"],
    *,
    remote_only: bool,
    sign: Callable[[dict[str, Any]], dict[str, Any]] | None,
) -> list[Scene]:
    """Return what each item says, at once for several: some stores have to be asked over the network."""
    read = partial(read_item, bands=bands, offset=offset, look=look, remote_only=remote_only, sign=sign)
    with ThreadPoolExecutor() as pool:
        return list(pool.map(read, items))


def cube_grid(
    scenes: Sequence[Scene], epsg: int, bbox: tuple[float, float, float, float] | None, *, pixel: int = 20
) -> Grid:
    """Return the 10 m grid of a cube: ``bbox`` in degrees, or else all scenes, snapped outwards to whole pixels.

    ``pixel`` is the size of the coarsest band's, in metres.

    Raises
    ------
    ValueError
        If the scenes' own pixels of that size do not lie on one lattice, or the grid has more than `MOST_PIXELS`.
    """
    assets = [asset for scene in scenes for asset in scene.bands.values()]
    native = [asset for asset in assets if asset.epsg == epsg]
    phases = {(a.grid.x0 % pixel, a.grid.y0 % pixel) for a in native} or {(0.0, 0.0)}
    if len(phases) > 1:
        raise ValueError(
            f"the items' rasters start at different places of the {pixel} m lattice (x, y modulo {pixel}: "
            f"{sorted(phases)})"
        )
    x_phase, y_phase = phases.pop()
    if bbox is not None:
        bounds = [transform_bounds(bbox, 4326, epsg)]
    else:
        bounds = [a.grid.bounds if a.epsg == epsg else transform_bounds(a.grid.bounds, a.epsg, epsg) for a in assets]
    west, south = (min(b[i] for b in bounds) for i in (0, 1))
    east, north = (max(b[i] for b in bounds) for i in (2, 3))
    if not np.isfinite([west, south, east, north]).all() or (east - west) * (north - south) > 100 * MOST_PIXELS:
        raise ValueError(
            f"the cube would reach from ({west:.6g}, {south:.6g}) to ({east:.6g}, {north:.6g}) in EPSG:{epsg}: more "
            f"than {MOST_PIXELS:.0e} pixels of 10 m. Type a smaller bbox=, or open several cubes; a geometry across "
            "180 degrees must be cut in two there, and such a bbox has west > east"
        )
    slack = 1e-6  # of a pixel: what reprojecting bounds to their own CRS may add
    left = np.floor((west - x_phase) / pixel + slack) * pixel + x_phase
    top = np.ceil((north - y_phase) / pixel - slack) * pixel + y_phase
    width = int(np.ceil((east - left) / pixel - slack))
    height = int(np.ceil((top - south) / pixel - slack))
    return Grid(float(left), float(top), 10.0, -10.0, (pixel // 10 * height, pixel // 10 * width))


def _over_area(scenes: Sequence[Scene], area: Box | None) -> list[Scene]:
    """Return the scenes with pixels in an area in degrees; catalogues find others too, near 180 degrees anywhere.

    Raises
    ------
    ValueError
        If there were scenes and none is left.
    """
    if area is None:
        return list(scenes)
    boxes: dict[int, Box] = {}
    left = []
    for scene in scenes:
        asset = next(iter(scene.bands.values()))
        if asset.epsg not in boxes:
            boxes[asset.epsg] = transform_bounds(area, 4326, asset.epsg)
        if _overlap(asset.grid.bounds, boxes[asset.epsg]):
            left.append(scene)
    if scenes and not left:
        raise ValueError(
            f"none of the {len(scenes)} items has pixels within {tuple(area)}: west, south, east, north in degrees"
        )
    return left


def _overlap(a: Box, b: Box) -> bool:
    """Return whether two boxes share ground; one that could not be transformed shares none."""
    return a[0] < b[2] and a[2] > b[0] and a[1] < b[3] and a[3] > b[1] and bool(np.isfinite([*a, *b]).all())


def _over_ground(scenes: Sequence[Scene], grid: Grid, epsg: int) -> list[Scene]:
    """Return the scenes with pixels on a grid; stackstac drops the others without a word.

    Raises
    ------
    ValueError
        If there were scenes and none is left.
    """

    def touches(asset: BandAsset) -> bool:
        bounds = asset.grid.bounds
        return _overlap(bounds if asset.epsg == epsg else transform_bounds(bounds, asset.epsg, epsg), grid.bounds)

    left = [scene for scene in scenes if all(touches(asset) for asset in scene.bands.values())]
    if scenes and not left:
        raise ValueError(
            f"none of the {len(scenes)} items has pixels within {grid.bounds} (EPSG:{epsg}). bbox is (west, "
            "south, east, north) in degrees"
        )
    return left


def _common_epsg(scenes: Sequence[Scene], crs: int | str | None) -> int:
    found = sorted({asset.epsg for scene in scenes for asset in scene.bands.values()})
    if crs is None:
        if len(found) > 1:
            raise ValueError(
                f"the items lie in several CRS: {', '.join(f'EPSG:{code}' for code in found)}. Search each UTM zone "
                f"by itself, or type crs={found[0]}: then pixels of the others are resampled first"
            )
        return found[0]
    from pyproj import CRS

    target = CRS.from_user_input(crs)
    epsg = target.to_epsg()
    if epsg is None or target.axis_info[0].unit_name != "metre":
        raise ValueError(
            f"crs={crs!r} must have an EPSG code, by which to read the items, and metres for pixels of 10 m"
        )
    if found != [epsg]:
        warnings.warn(
            f"items in {', '.join(f'EPSG:{code}' for code in found)} are resampled to EPSG:{epsg} (nearest pixel); the "
            "network was trained on native pixels",
            stacklevel=3,
        )
    return epsg


def _day(time: np.datetime64, longitude: float) -> str:
    """Return the solar day of a time of a cube; midnight is what a date without a time of day looks like."""
    date = time.astype("datetime64[D]")
    return str(date) if time == date else solar_day(time.astype("datetime64[us]").item(), longitude)


def _nearest(scenes: Sequence[Scene], members: list[int], time: np.datetime64) -> list[int]:
    """Return which scenes of a day are of a cube's overpass, the nearest first; all where it tells a date only."""
    if time == time.astype("datetime64[D]"):
        return members
    apart = {i: abs(scenes[i].datetime - time.astype("datetime64[us]").item()) for i in members}
    nearest = min(apart.values())
    return sorted((i for i in members if apart[i] <= nearest + SAME_OVERPASS), key=apart.__getitem__)


def latest_versions(scenes: Sequence[Scene]) -> list[Scene]:
    """Return the scenes without repetition: of one tile, satellite and overpass those of the highest baseline.

    These are several where a tile was cut into products at the end of a downlink: each has pixels of its own.
    """
    latest: dict[Any, list[Scene]] = {}
    for scene in sorted(scenes, key=lambda s: (s.baseline or 0.0, s.id), reverse=True):
        kept = latest.setdefault(scene.place, [])
        same = (other for other in kept if other.shows_the_same(scene))
        if all(other.baseline == scene.baseline and other.id != scene.id for other in same):
            kept.append(scene)
    return [scene for kept in latest.values() for scene in kept]


def _in_steps(
    scenes: Sequence[Scene], epsg: int, longitude: float, *, by_day: bool
) -> tuple[list[Scene], list[list[int]]]:
    """Return the scenes in order, and those of each time step by index, whose first valid pixel is on top.

    Within a step native pixels come first, then earlier ones, then later products of the same tile and overpass.
    """
    places: dict[Any, list[Scene]] = {}
    for scene in sorted(scenes, key=lambda s: (s.datetime, s.id)):
        places.setdefault(scene.place, []).append(scene)
    alike = {id(s): next(other for other in places[s.place] if other.shows_the_same(s)) for s in scenes}
    ordered = sorted(scenes, key=lambda s: s.id, reverse=True)
    ordered.sort(
        key=lambda s: (
            s.solar_day_near(longitude) if by_day else "",
            by_day and not s.is_native(epsg),
            alike[id(s)].datetime,
            alike[id(s)].id,
        )
    )
    steps: dict[Any, list[int]] = {}
    for index, scene in enumerate(ordered):
        key = scene.solar_day_near(longitude) if by_day else id(alike[id(scene)])
        steps.setdefault(key, []).append(index)
    return ordered, list(steps.values())


def _of_date(scenes: Sequence[Scene], had: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return what is said of a date that was made from some scenes, and from what it had already."""
    said = ({asset.radiometry.reason for asset in scene.bands.values()} - {""} for scene in scenes)
    reasons = Counter(reason for of_scene in said for reason in of_scene)
    decided = (
        sorted(reasons)
        if len(reasons) == 1
        else [f"{r} ({n} of {len(scenes)} items)" for r, n in sorted(reasons.items())]
    )
    stored = source_attrs(a.radiometry.encoding for s in scenes for name, a in s.bands.items() if name != SCL)
    before = {key: value for key, value in (had or {}).items() if key not in STORED}
    if before.get(ITEMS) and {key: (had or {}).get(key) for key in stored} != stored:
        stored = {}  # other digital numbers than what was there
    versions = dict(zip(before.get(ITEMS, []), before.get(VERSIONS, []), strict=False))
    versions |= {scene.id: scene.version for scene in scenes}
    items = dict.fromkeys([*before.get(ITEMS, []), *(scene.id for scene in scenes)])
    told = {ITEMS: list(items), VERSIONS: [versions.get(item, "") for item in items], REASONS: "; ".join(decided)}
    return before | stored | told


def _searched(catalog: Any, collection: str) -> dict[str, Any]:
    """Return the attributes that tell where items were searched; a URL without what may be secret in it."""
    url = catalog.get_self_href() if hasattr(catalog, "search") else catalog
    return {"source_catalog": public_url(url), "source_collection": collection} if isinstance(url, str) else {}


def _chosen(offset: float | Literal["auto"], sign: Callable[[Any], Any] | None) -> dict[str, Any]:
    """Return the attributes that tell what was chosen and is not the default; of a function its name alone."""
    chosen: dict[str, Any] = {} if offset == "auto" else {"source_offset": float(offset)}
    if sign is not None:
        named = getattr(sign, "func", sign)  # of functools.partial, whose arguments may be secret
        kind = named if hasattr(named, "__qualname__") else type(named)
        chosen["source_sign"] = f"{kind.__module__}.{kind.__qualname__}"
    return chosen


def _geometry(intersects: Any) -> dict[str, Any]:
    """Return the GeoJSON geometry that is meant: itself, its text, a Feature, or an object of shapely or geopandas."""
    geometry = getattr(intersects, "__geo_interface__", intersects)
    try:
        geometry = json.loads(geometry) if isinstance(geometry, str) else geometry
    except ValueError:
        pass
    if isinstance(geometry, Mapping) and geometry.get("type") == "Feature":
        geometry = geometry.get("geometry")
    if not isinstance(geometry, Mapping) or "type" not in geometry:
        raise ValueError(
            f"intersects={str(intersects)[:60]!r} is no GeoJSON geometry, such as {{'type': 'Polygon', 'coordinates': "
            "[[[0.05, 43.65], …]]}. For a box type bbox=(west, south, east, north)"
        )
    return json.loads(json.dumps(geometry))


def _geometry_bounds(geometry: Mapping[str, Any]) -> Box:
    """Return west, south, east and north of a geometry, which must cover some ground."""
    kind = geometry["type"]
    try:
        west, south, east, north = geometry_bounds(geometry)
    except (TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
        if str(error).startswith("intersects"):
            raise
        raise ValueError(
            f"intersects is a {kind} whose coordinates cannot be read ({failure(error)}). They must be as GeoJSON has "
            "them: numbers, longitude before latitude, in degrees"
        ) from None
    if not (-180 <= west <= 180 and -180 <= east <= 180 and -90 <= south <= north <= 90):
        raise ValueError(
            f"intersects spans {west:g} to {east:g} and {south:g} to {north:g}: its coordinates must be degrees, "
            "longitude before latitude"
        )
    if west == east or south == north:
        box = ", ".join(f"{v:.4f}" for v in (west - 0.01, south - 0.01, east + 0.01, north + 0.01))
        raise ValueError(
            f"intersects is a {kind} without an extent, and the cube covers what is asked for: no pixel. Give a box "
            f"around it, such as bbox=({box}), or a Polygon"
        )
    return west, south, east, north
