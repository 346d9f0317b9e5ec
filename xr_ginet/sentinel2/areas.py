"""Areas in degrees, and the meridian at 180 degrees, where longitudes jump.

A box that crosses it has its west edge at a larger longitude than its east edge, as in STAC and GeoJSON; a geometry
that crosses it is cut in two there (RFC 7946, section 3.1.9).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

Box = tuple[float, float, float, float]
"""West, south, east, north."""

_SLACK = 1e-6
"""Degrees, a decimetre, by which a geometry may miss the meridian that it was cut at."""


def check_bbox(bbox: Sequence[float]) -> None:
    """Raise unless ``bbox`` is (west, south, east, north) in degrees, where west > east crosses 180 degrees."""
    valid = len(bbox) == 4 and all(-180 <= x <= 180 for x in bbox[::2]) and -90 <= bbox[1] < bbox[3] <= 90
    if not valid or bbox[0] == bbox[2] or (bbox[0] > bbox[2] and width(bbox) > 180):
        raise ValueError(
            f"bbox={tuple(bbox)}: must be (west, south, east, north) in degrees, west before east, south before north. "
            "Only a box across 180 degrees has its west at a larger longitude, as (179.9, -17.1, -179.9, -16.9)"
        )


def width(bbox: Sequence[float]) -> float:
    """Return the width of a box in degrees of longitude."""
    return (bbox[2] - bbox[0]) % 360 or 360.0 * (bbox[2] != bbox[0])


def centre_longitude(bbox: Sequence[float]) -> float:
    """Return the longitude in the middle of a box.

    Examples
    --------
    >>> centre_longitude((179.0, -17.0, -177.0, -16.0))
    -179.0
    """
    return (bbox[0] + width(bbox) / 2 + 180) % 360 - 180


def near(longitude: float, other: float) -> float:
    """Return a longitude less than half a turn away from another one, be it beyond 180 degrees.

    Examples
    --------
    >>> near(-179.5, 179.0)
    180.5
    """
    return longitude + 360 * round((other - longitude) / 360)


def search_area(bbox: Box | None, intersects: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the arguments that search an area: of a box across 180 degrees two polygons, which all catalogues know."""
    if bbox is None or bbox[0] <= bbox[2]:
        return {"bbox": bbox, "intersects": intersects}
    west, south, east, north = bbox
    halves = [
        [[(w, south), (e, south), (e, north), (w, north), (w, south)]] for w, e in ((west, 180.0), (-180.0, east))
    ]
    return {"bbox": None, "intersects": {"type": "MultiPolygon", "coordinates": halves}}


def geometry_bounds(geometry: Mapping[str, Any]) -> Box:
    """Return the box around a GeoJSON geometry; one that is cut at 180 degrees gives a box that crosses it.

    Raises
    ------
    ValueError
        If it has no position, or longitudes beyond 180 degrees.
    """
    parts = [[(float(p[0]), float(p[1])) for p in part] for part in _parts(geometry)]
    spans = sorted((min(x for x, _ in part), max(x for x, _ in part)) for part in parts if part)
    if not spans:
        raise ValueError(f"intersects={geometry!r} holds no coordinates; a GeoJSON geometry is needed")
    south, north = (pick(y for part in parts for _, y in part) for pick in (min, max))
    west, east = spans[0][0], max(span[1] for span in spans)
    if west < -180 or east > 180:
        raise ValueError(
            f"intersects reaches from {west:g} to {east:g} degrees east. Longitudes lie between -180 and 180: cut the "
            "geometry at 180 degrees, or type bbox=(west, south, east, north) with west > east"
        )
    if west <= -180 + _SLACK and east >= 180 - _SLACK and len(spans) > 1:
        reach = [max(span[1] for span in spans[: i + 1]) for i in range(len(spans))]
        gap, i = max((b[0] - reach[i], i) for i, (_, b) in enumerate(pairwise(spans)))
        if gap > 0:
            west, east = spans[i + 1][0], reach[i]
    return west, south, east, north


def _parts(geometry: Mapping[str, Any]) -> Iterator[list[Any]]:
    """Yield the positions of each polygon, line or point of a GeoJSON object."""
    for key in ("geometries", "features"):
        for member in geometry.get(key) or ():
            yield from _parts(member)
    if geometry.get("geometry"):
        yield from _parts(geometry["geometry"])
    coordinates = geometry.get("coordinates")
    if coordinates is not None:
        several = str(geometry.get("type")).startswith("Multi")
        for part in coordinates if several else [coordinates]:
            yield list(_positions(part))


def _positions(nested: Any) -> Iterator[Any]:
    if nested and isinstance(nested[0], int | float):
        yield nested
    else:
        for inner in nested:
            yield from _positions(inner)
