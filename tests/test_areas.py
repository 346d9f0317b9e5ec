"""Areas at 180 degrees, and which of a day's items make up an image: nothing lost, nothing from elsewhere."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from conftest import no_compute
from hypothesis import given
from hypothesis import strategies as st
from local_stac import serve
from numpy.testing import assert_allclose, assert_array_equal
from pyproj import Transformer

import xr_ginet
from xr_ginet.sentinel2 import catalog
from xr_ginet.sentinel2.areas import centre_longitude, check_bbox, geometry_bounds, near
from xr_ginet.sentinel2.bands import BANDS_10M
from xr_ginet.sentinel2.catalog import complete
from xr_ginet.sentinel2.grids import transform_bounds
from xr_ginet.sentinel2.provenance import of_all
from xr_ginet.simulation import write_cogs

FIJI = Transformer.from_crs(4326, 32701, always_xy=True).transform(180, -17)
CORNER = tuple(20 * round(v / 20) for v in (FIJI[0] - 320, FIJI[1] + 320))


def write_scene(
    folder: Path,
    item_id: str,
    *,
    corner: tuple[float, float] = CORNER,
    crs: str = "EPSG:32701",
    moment: str = "2024-06-21T22:16:38Z",
    seed: int = 0,
    valid: slice = slice(None),
    **properties: Any,
) -> dict[str, Any]:
    """Write a scene of 64 by 64 pixels of which some rows (of 32, at 20 m) are valid; return its item."""
    rng = np.random.default_rng(seed)
    keep = np.zeros((32, 1), "uint16")
    keep[valid] = 1
    fine = rng.integers(1, 9000, (4, 64, 64), dtype="uint16") * keep.repeat(2, 0)
    coarse = rng.integers(1, 9000, (6, 32, 32), dtype="uint16") * keep
    place = (10, 0, corner[0], 0, -10, corner[1])
    item = write_cogs(fine, coarse, folder, transform=place, crs=crs, datetime=moment, item_id=item_id)
    item["properties"] |= properties
    return item


def box(west: float, south: float, east: float, north: float) -> list[list[list[float]]]:
    return [[[west, south], [east, south], [east, north], [west, north], [west, south]]]


# -- 180 degrees -------------------------------------------------------------------------------------------------------


@given(
    west=st.floats(150, 179.9),
    east=st.floats(-179.9, -150),
    order=st.permutations([0, 1, 2]),
)
def test_a_geometry_cut_at_180_degrees_gives_the_box_across(west: float, east: float, order: list[int]) -> None:
    pieces = [box(west, -17, 180, -16.5), box(-180, -17.5, east, -16), box((west + 180) / 2, -17, 179.95, -16.9)]
    area = {"type": "MultiPolygon", "coordinates": [pieces[i] for i in order]}
    assert geometry_bounds(area) == (west, -17.5, east, -16)
    assert abs(near(centre_longitude(geometry_bounds(area)), 180) - (west + east + 360) / 2) < 1e-9
    collection = {"type": "GeometryCollection", "geometries": [{"type": "Polygon", "coordinates": p} for p in pieces]}
    assert geometry_bounds({"type": "Feature", "geometry": collection}) == (west, -17.5, east, -16)


def test_other_geometries_give_the_box_around_them() -> None:
    two = {"type": "MultiPolygon", "coordinates": [box(-120, 1, -110, 2), box(100, 3, 130, 4)]}
    assert geometry_bounds(two) == (-120, 1, 130, 4)
    assert geometry_bounds({"type": "LineString", "coordinates": [[3, 4, 100], [1, 6, 200]]}) == (1, 4, 3, 6)
    assert geometry_bounds({"type": "Polygon", "coordinates": box(-180, 0, 180, 1)}) == (-180, 0, 180, 1)
    with pytest.raises(ValueError, match=r"from 179.9 to 180.1 degrees east.*cut the geometry at 180.*west > east"):
        geometry_bounds({"type": "Polygon", "coordinates": box(179.9, -17, 180.1, -16)})
    with pytest.raises(ValueError, match="holds no coordinates"):
        geometry_bounds({"type": "Polygon", "coordinates": []})


@pytest.mark.parametrize("bbox", [(1, 0, 0, 1), (10, 0, 10, 1), (0, 1, 1, 0), (179, 0, 181, 1), (-100, 0, -140, 1)])
def test_boxes_that_are_none_are_refused(bbox: tuple) -> None:
    with pytest.raises(ValueError, match=r"must be \(west, south, east, north\).*as \(179.9, -17.1, -179.9, -16.9\)"):
        check_bbox(bbox)


@pytest.mark.parametrize("searched", [False, True])
def test_an_area_across_180_degrees_is_a_small_cube(tmp_path: Path, searched: bool) -> None:
    items = [write_scene(tmp_path, "T01KAB")]
    whole = xr_ginet.open_stac(items).compute()
    bbox = (179.9985, -17.0015, -179.9985, -16.9985)
    halves = [box(179.9985, -17.0015, 180, -16.9985), box(-180, -17.0015, -179.9985, -16.9985)]
    items[0]["geometry"] = {"type": "MultiPolygon", "coordinates": halves}
    found = []
    with serve(items, tmp_path) as url:
        for area in ({"bbox": bbox}, {"intersects": {"type": "MultiPolygon", "coordinates": halves}}):
            with no_compute():
                cube = xr_ginet.open_stac(url if searched else items, **area)
            found.append(cube.compute())
    xr.testing.assert_equal(*found)
    assert 30 <= found[0].sizes["x"] <= 34
    assert_array_equal(found[0]["B05"], whole["B05"].sel({d: found[0][d] for d in ("y_20m", "x_20m")}))


def test_a_cube_around_the_earth_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    item = write_scene(tmp_path, "T01KAB")
    belt = {"type": "Polygon", "coordinates": box(-179.998, -17.002, 179.998, -16.998)}
    for area in ({"intersects": belt}, {"bbox": (-180, -17.002, 180, -16.998)}, {"bbox": (170, -60, -170, 10)}):
        with pytest.raises(ValueError, match=r"more than 1e\+10 pixels of 10 m.*must be cut in two there.*west > east"):
            xr_ginet.open_stac([item], **area)
    for asset in item["assets"].values():
        asset["proj:shape"] = [131_072, 131_072]
    with pytest.raises(ValueError, match=r"more than 1e\+10 pixels"):
        xr_ginet.open_stac([item])


@pytest.mark.parametrize("searched", [False, True])
def test_tiles_of_one_overpass_on_both_sides_of_180_degrees_are_one_day(tmp_path: Path, searched: bool) -> None:
    west_corner = (CORNER[0] - 640, CORNER[1])
    items = [
        write_scene(tmp_path, "east", seed=1),
        write_scene(tmp_path, "west", seed=2, corner=west_corner, moment="2024-06-21T22:16:42Z"),
        write_scene(tmp_path, "next", seed=3, corner=west_corner, moment="2024-06-22T22:16:42Z"),
    ]
    for item, (west, east) in zip(items, ((-180, -179.99), (179.99, 180), (179.99, 180)), strict=True):
        item["bbox"] = [west, -17.01, east, -16.99]
        item["geometry"] = {"type": "Polygon", "coordinates": box(*item["bbox"])}
    assert catalog.read_item(items[0], ["B02"]).solar_day != catalog.read_item(items[1], ["B02"]).solar_day
    cube = xr_ginet.open_stac(items)
    assert cube.sizes["time"] == 2
    assert cube["B02"].isel(time=0).notnull().all()
    fine = cube[list(BANDS_10M)]
    with serve(items, tmp_path) as url:
        completed = complete(fine, url if searched else items)[["B05", "B11"]].compute()
    xr.testing.assert_equal(completed, cube[["B05", "B11"]].compute())


def test_items_from_elsewhere_decide_nothing(tmp_path: Path) -> None:
    there = {"corner": (300_000, 5_500_000), "crs": "EPSG:32760"}
    here = write_scene(tmp_path, "here", moment="2020-01-23T22:06:14Z", **there)
    elsewhere = [
        write_scene(tmp_path, "T01GBQ", corner=(199_980, 4_800_000), moment="2020-01-23T22:06:14Z"),
        write_scene(tmp_path, "T30", corner=(300_000, 4_500_000), crs="EPSG:32630", moment="2020-01-23T10:06:14Z"),
    ]
    bbox = transform_bounds((300_100, 5_499_500, 300_500, 5_499_900), 32760, 4326)
    for order in itertools.permutations([here, *elsewhere]):
        cube = xr_ginet.open_stac(list(order), bbox=bbox)
        assert (of_all(cube)["source_items"], cube.rio.crs.to_epsg()) == (["here"], 32760)
    with pytest.raises(ValueError, match="none of the 2 items has pixels within"):
        xr_ginet.open_stac(elsewhere, bbox=bbox)


# -- what makes up an image --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0, 7])
@pytest.mark.parametrize("groupby", ["solar_day", None])
def test_products_that_share_a_tile_are_joined_in_any_order(tmp_path: Path, groupby: Any, seconds: int) -> None:
    later = f"2024-06-21T22:16:{38 + seconds}Z"
    halves = [
        write_scene(tmp_path, "S2A_x_T01KAB_20220818T024455", seed=1, valid=slice(0, 20)),
        write_scene(tmp_path, "S2A_x_T01KAB_20220818T001122", seed=2, valid=slice(14, 32), moment=later),
    ]
    cubes = [xr_ginet.open_stac(list(order), groupby=groupby).compute() for order in itertools.permutations(halves)]
    xr.testing.assert_identical(*cubes)
    assert cubes[0].sizes["time"] == 1
    assert cubes[0]["B02"].notnull().all()
    assert of_all(cubes[0])["source_items"] == [half["id"] for half in halves]
    upper = xr_ginet.open_stac(halves[0])
    assert_array_equal(cubes[0]["B05"][0, :20], upper["B05"][0, :20])  # the later product is on top
    completed = complete(cubes[0][list(BANDS_10M)], halves)
    assert completed["B05"].notnull().all()


def test_of_a_shared_tile_the_highest_baseline_is_used_whole(tmp_path: Path) -> None:
    def item(name: str, baseline: str, **options: Any) -> dict[str, Any]:
        return write_scene(tmp_path, name, **options, **{"s2:processing_baseline": baseline})

    new = [item("new_1", "05.00", valid=slice(0, 16), seed=1), item("new_2", "05.00", valid=slice(16, 32), seed=2)]
    old = item("old", "02.14", seed=3)
    cube = xr_ginet.open_stac([new[0], old, new[1], new[0]])
    assert sorted(of_all(cube)["source_items"]) == ["new_1", "new_2"]
    assert cube["B05"].notnull().all()


@pytest.mark.parametrize("told", ["platform", "id"])
def test_two_satellites_half_a_minute_apart_are_two_scenes(tmp_path: Path, told: str) -> None:
    items = []
    for i, letter in enumerate("AC"):
        named = {"platform": f"sentinel-2{letter.lower()}"} if told == "platform" else {}
        item = write_scene(
            tmp_path, f"S2{letter}_T01KAB", seed=i, moment=f"2024-06-21T22:{16 + i}:0{8 * (1 - i)}Z", **named
        )
        if told == "id":
            item["properties"].pop("platform", None)
        items.append(item)
    apart = xr_ginet.open_stac(items, groupby=None)
    assert apart.sizes["time"] == 2
    for step, item in enumerate(items):
        assert_array_equal(apart["B05"][step], xr_ginet.open_stac(item)["B05"][0])
    assert of_all(xr_ginet.open_stac(items))["source_items"] == [item["id"] for item in items]
    completed = complete(apart[list(BANDS_10M)], items)
    assert_array_equal(completed["B05"], apart["B05"])


@pytest.mark.parametrize(("minutes", "same"), [(10, True), (50, False)])
def test_a_cube_is_completed_from_its_own_overpass(tmp_path: Path, minutes: int, same: bool) -> None:
    """Tiles of one overpass are minutes apart, the next overpass of the same ground at least fifty."""
    own = write_scene(tmp_path, "own", seed=1, valid=slice(0, 20), moment="2024-06-21T22:00:00Z")
    other = write_scene(tmp_path, "other", seed=2, moment=f"2024-06-21T22:{minutes}:00Z")
    fine = xr_ginet.open_stac(own)[list(BANDS_10M)]
    completed = complete(fine, [other, own])
    assert_allclose(completed["B05"][0, :20], xr_ginet.open_stac(own)["B05"][0, :20], rtol=1e-6)
    assert bool(completed["B05"][0, 20:].notnull().all()) == same
