"""STAC items to a two-grid cube: the right asset, the right grid, the right radiometry, or an error that says why."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pystac
import pystac_client
import pytest
import xarray as xr
from conftest import SHARED, needs_shared, no_compute
from local_stac import serve
from numpy.testing import assert_allclose, assert_array_equal
from pyproj import Transformer

import xr_ginet
from xr_ginet.network import Checkpoint
from xr_ginet.sentinel2.bands import BANDS_10M, BANDS_20M
from xr_ginet.sentinel2.catalog import complete, cube_grid
from xr_ginet.sentinel2.grids import Grid
from xr_ginet.sentinel2.items import read_item
from xr_ginet.sentinel2.provenance import of_all
from xr_ginet.sentinel2.radiometry import processing_baseline, radiometry
from xr_ginet.simulation import write_cogs

ALL_BANDS = (*BANDS_10M, *BANDS_20M)

# -- real items
# ---------------------------------------------------------------------------------------------------------------


def load_item(name: str) -> dict:
    return json.loads((SHARED / "stac-items" / f"{name}.json").read_text())


@needs_shared
def test_a_scene_across_the_antimeridian_has_its_own_solar_day() -> None:
    scene = read_item(load_item("earthsearch-v1-c1_S2B_T01WCR_20250427T000611_L2A"), ["B02"])
    assert 179 < abs(scene.longitude) < 180
    assert scene.solar_day in ("2025-04-26", "2025-04-27")


@needs_shared
def test_bands_are_found_by_any_one_of_the_names_an_asset_gives() -> None:
    item = load_item("earthsearch-v1_S2B_20EPT_20250731_0_L2A")
    expected = {b: a.href for b, a in read_item(item, ALL_BANDS).bands.items()}
    anonymous = copy.deepcopy(item)
    anonymous["assets"] = {f"asset{i}": asset for i, asset in enumerate(item["assets"].values())}
    assert {b: a.href for b, a in read_item(anonymous, ALL_BANDS).bands.items()} == expected
    undescribed = copy.deepcopy(item)
    for asset in undescribed["assets"].values():
        asset.pop("eo:bands", None)
    assert {b: a.href for b, a in read_item(undescribed, ALL_BANDS).bands.items()} == expected


@needs_shared
def test_an_asset_at_another_resolution_does_not_serve() -> None:
    item = load_item("earthsearch-v1_S2A_13TDE_20231008_0_L2A")
    for key in ("rededge1", "rededge1-jp2"):
        item["assets"][key]["proj:transform"] = [10, 0, 399_960, 0, -10, 4_500_000]
    with pytest.raises(ValueError, match=r"no asset with B05 at its native 20 m; it has rededge1 \(10 m\)"):
        xr_ginet.open_stac([item])
    del item["assets"]["red"], item["assets"]["red-jp2"]
    with pytest.raises(ValueError, match=r"no asset with B04 at its native 10 m; its assets are aot, blue"):
        xr_ginet.open_stac([item])


# -- radiometry
# ----------------------------------------------------------------------------------------------------------


def minimal(properties: dict | None = None, asset: dict | None = None, item_id: str = "x") -> tuple[dict, dict]:
    return {"id": item_id, "properties": properties or {}}, {"type": "image/tiff"} | (asset or {})


STATED = {"raster:bands": [{"scale": 1e-4, "offset": -0.1}]}
UNSHIFTED = {"raster:bands": [{"scale": 1e-4, "offset": 0}]}


@pytest.mark.parametrize(
    ("item", "asset", "offset"),
    [
        (*minimal({"earthsearch:boa_offset_applied": True}, STATED), 0),
        (*minimal({"earthsearch:boa_offset_applied": True}, STATED | {"type": "image/jp2"}), -1000),
        (*minimal({"earthsearch:boa_offset_applied": False}, UNSHIFTED), 0),
        (*minimal({"earthsearch:boa_offset_applied": False}, STATED | {"type": "image/jp2"}), -1000),
        (*minimal({"sentinel:boa_offset_applied": False, "sentinel:processing_baseline": "03.01"}), 0),
        (*minimal({"s2:processing_baseline": "05.00"}, UNSHIFTED), 0),
        (*minimal({}, STATED), -1000),
        (*minimal({"s2:processing_baseline": "05.10"}, {"raster:bands": [{"scale": 1e-4}]}), -1000),
        (*minimal({"s2:processing_baseline": "05.10"}, {"raster:bands": [{"scale": None, "offset": -0.1}]}), -1000),
        (*minimal({}, {"raster:scale": 1e-4, "raster:offset": -0.1}), -1000),
        (*minimal({}, {"bands": [{"raster:scale": 1e-4, "raster:offset": 0}]}), 0),
        (*minimal({"s2:processing_baseline": "05.10"}), -1000),
        (*minimal({"s2:processing_baseline": "03.01"}), 0),
        (*minimal({}, item_id="S2A_MSIL2A_20220125T000000_N0400_R1"), -1000),
        (*minimal({"sentinel:product_id": "S2A_MSIL2A_20220125T000000_N0301_R1"}), 0),
    ],
)
def test_offset_follows_what_the_item_says(item: dict, asset: dict, offset: float) -> None:
    assert radiometry(item, asset).offset == offset
    assert radiometry(item, asset, offset=-42).offset == -42
    assert "given by the caller" in radiometry(item, asset, offset=0).reason


def test_an_item_that_says_nothing_is_refused() -> None:
    assert processing_baseline({"id": "x", "properties": {"processing:version": "v2"}}) is None
    with pytest.raises(
        ValueError, match=r"neither an offset nor its processing baseline.*Type offset=0 or offset=-1000"
    ):
        radiometry(*minimal())


@pytest.mark.parametrize(
    ("item", "asset", "match"),
    [
        (
            *minimal({"earthsearch:boa_offset_applied": False, "s2:processing_baseline": "05.10"}, STATED),
            r"item x says boa_offset_applied=false, yet states an offset of -1000\..*type offset=-1000 or offset=0",
        ),
        (
            *minimal({"sentinel:boa_offset_applied": False, "sentinel:processing_baseline": "04.00"}),
            r"item x says boa_offset_applied=false, yet its processing baseline is 04\.00\.",
        ),
        (
            *minimal({"processing:version": "02.14"}, STATED),
            r"item x states an offset of -1000, but its processing baseline is 02\.14.*Type offset=0",
        ),
    ],
)
def test_an_item_that_contradicts_itself_is_refused(item: dict, asset: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        radiometry(item, asset)
    assert radiometry(item, asset, offset=0).offset == 0


# -- pixels
# ----------------------------------------------------------------------------------------------------------------

ORIGIN = (600_000.0, 4_900_020.0)


def digital_numbers(shape: tuple[int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return random pixels of both grids; ``shape`` is at 20 m."""
    rng = np.random.default_rng(seed)
    fine = rng.integers(1, 9000, (4, 2 * shape[0], 2 * shape[1]), dtype="uint16")
    return fine, rng.integers(1, 9000, (6, *shape), dtype="uint16")


def write_item(
    folder: Path,
    item_id: str,
    seed: int,
    *,
    moment: str = "2024-05-01T10:50:31Z",
    shape: tuple[int, int] = (30, 40),
    shift: tuple[int, int] = (0, 0),
    crs: str = "EPSG:32630",
    origin: tuple[float, float] = ORIGIN,
    change: dict | None = None,
) -> tuple[dict, np.ndarray, np.ndarray]:
    fine, coarse = digital_numbers(shape, seed)
    fine[0, :3, :5] = 0
    item = write_cogs(
        fine,
        coarse,
        folder,
        transform=(10, 0, origin[0] + 20 * shift[1], 0, -10, origin[1] - 20 * shift[0]),
        crs=crs,
        datetime=moment,
        item_id=item_id,
    )
    item["properties"] |= change or {}
    return item, fine, coarse


def test_pixels_arrive_as_reflectance_on_nesting_grids(tmp_path) -> None:
    item, fine, coarse = write_item(tmp_path, "a", 1)
    with no_compute():
        cube = xr_ginet.open_stac([item], chunks=16)
    assert dict(cube.sizes) == {"time": 1, "y": 60, "x": 80, "y_20m": 30, "x_20m": 40}
    assert cube["B02"].chunksizes["y"] == (16, 16, 16, 12)
    assert cube["B05"].chunksizes["y_20m"] == (8, 8, 8, 6)
    for stack, bands in ((fine, BANDS_10M), (coarse, BANDS_20M)):
        for image, band in zip(stack, bands, strict=True):
            expected = np.where(image == 0, np.nan, image / 10_000)
            assert_allclose(cube[band].values[0], expected, rtol=1e-6)
    assert_array_equal(cube["x_20m"], ORIGIN[0] + 10 + 20 * np.arange(40))
    assert_array_equal(cube["y"], ORIGIN[1] - 5 - 10 * np.arange(60))
    assert cube["time"].values[0] == np.datetime64("2024-05-01T10:50:31")
    assert cube.rio.crs.to_epsg() == 32630


def test_a_bbox_is_snapped_to_whole_20_m_pixels(tmp_path) -> None:
    item, _fine, _ = write_item(tmp_path, "a", 1)
    whole = xr_ginet.open_stac([item])
    west, south, east, north = item["bbox"]
    bbox = (west + (east - west) * 0.31, south + (north - south) * 0.4, east - (east - west) * 0.2, north)
    cube = xr_ginet.open_stac([item], bbox=bbox, bands=("B02", "B05"))
    assert cube.sizes["x"] == 2 * cube.sizes["x_20m"] < 80
    assert cube.sizes["y"] == 2 * cube.sizes["y_20m"]
    assert (cube["x"].values[0] - 5 - ORIGIN[0]) % 20 == 0
    xr.testing.assert_equal(
        cube["B02"].dropna("y", how="all").compute(),
        whole["B02"].sel(x=cube["x"]).sel(y=slice(4_900_020, cube["y"].values[-1])).compute(),
    )
    polygon = {
        "type": "Polygon",
        "coordinates": [[(bbox[0], bbox[1]), (bbox[2], bbox[1]), (bbox[2], bbox[3]), (bbox[0], bbox[1])]],
    }
    by_polygon = xr_ginet.open_stac([item], intersects=polygon, bands=("B02", "B05"))
    xr.testing.assert_equal(by_polygon["x"], cube["x"])


def test_items_of_a_day_are_joined_after_each_was_scaled_by_its_own_offset(tmp_path) -> None:
    old, _fine, coarse = write_item(tmp_path, "old", 1, moment="2024-05-01T10:50:31Z")
    # The neighbour to the east, 10 coarse pixels overlapping, of a baseline with an offset that the asset states.
    new, _fine_new, coarse_new = write_item(tmp_path, "new", 2, moment="2024-05-01T10:50:45Z", shift=(0, 30))
    del new["properties"]["earthsearch:boa_offset_applied"]
    new["properties"]["s2:processing_baseline"] = "05.10"
    for asset in new["assets"].values():
        asset["raster:bands"][0]["offset"] = -0.1
    cube = xr_ginet.open_stac([new, old], chunks=32)
    assert dict(cube.sizes) == {"time": 1, "y": 60, "x": 140, "y_20m": 30, "x_20m": 70}
    b05 = cube["B05"].values[0]
    assert_allclose(b05[:, :40], coarse[0] / 1e4, rtol=1e-5)
    assert_allclose(b05[:, 40:], (coarse_new[0, :, 10:] - 1000.0) / 1e4, rtol=1e-5, atol=1e-8)
    assert cube["time"].values[0] == np.datetime64("2024-05-01T10:50:31")
    assert of_all(cube)["source_items"] == ["old", "new"]
    apart = xr_ginet.open_stac([new, old], chunks=32, groupby=None)
    assert apart.sizes["time"] == 2


def test_times_are_sorted_and_days_are_apart(tmp_path) -> None:
    later = write_item(tmp_path, "later", 1, moment="2024-05-06T10:50:31Z")[0]
    earlier = write_item(tmp_path, "earlier", 2, moment="2024-05-01T10:50:31Z")[0]
    cube = xr_ginet.open_stac([later, earlier])
    assert cube["time"].dt.day.values.tolist() == [1, 6]
    assert of_all(cube)["source_items"] == ["earlier", "later"]


def test_items_are_signed_before_use(tmp_path) -> None:
    item, fine, _ = write_item(tmp_path, "a", 1)
    for asset in item["assets"].values():
        asset["href"] = asset["href"].replace(str(tmp_path), "/locked")

    def sign(item: pystac.Item) -> pystac.Item:
        for asset in item.assets.values():
            asset.href = asset.href.replace("/locked", str(tmp_path))
        return item

    cube = xr_ginet.open_stac([item], sign=sign)
    assert_allclose(cube["B03"].values[0], fine[1] / 1e4, rtol=1e-6)


def test_items_in_two_zones_need_a_crs_and_are_warned_of(tmp_path) -> None:
    a = write_item(tmp_path, "a", 1)[0]
    x, y = Transformer.from_crs(32630, 32631).transform(*ORIGIN)
    origin = (x // 20 * 20, y // 20 * 20)
    b = write_item(tmp_path, "b", 2, crs="EPSG:32631", origin=origin, moment="2024-05-02T10:50:31Z")[0]
    with pytest.raises(ValueError, match=r"several CRS: EPSG:32630, EPSG:32631.*type crs=32630"):
        xr_ginet.open_stac([a, b])
    with pytest.warns(UserWarning, match="resampled to EPSG:32630"):
        cube = xr_ginet.open_stac([a, b], crs=32630, bbox=a["bbox"])
    assert cube.sizes["x"] == 2 * cube.sizes["x_20m"]
    assert cube.sizes["time"] == 2
    assert cube["B05"].notnull().mean(["y_20m", "x_20m"]).values.min() > 0.5


def test_open_stac_refuses(tmp_path) -> None:
    item = write_item(tmp_path, "a", 1)[0]
    with pytest.raises(ValueError, match="chunks=7: must be an even number"):
        xr_ginet.open_stac([item], chunks=7)
    with pytest.raises(ValueError, match=r"bands=\('B02', 'B10'\): must be among B02"):
        xr_ginet.open_stac([item], bands=("B02", "B10"))
    with pytest.raises(ValueError, match="the list of items is empty"):
        xr_ginet.open_stac([])
    with pytest.raises(ValueError, match="datetime and query belong to a search"):
        xr_ginet.open_stac([item], datetime="2024")
    with pytest.raises(TypeError, match="catalog holds int; it must be the URL"):
        xr_ginet.open_stac([7])
    with pytest.raises(ValueError, match="both bbox and intersects"):
        xr_ginet.open_stac([item], bbox=(0, 0, 1, 1), intersects={"type": "Point", "coordinates": [0, 0]})
    for bbox in ((1, 0, 0, 1), (0, 1, 1, 0), (0, 0, 1), (0, 0, 1, 91)):
        with pytest.raises(ValueError, match=r"must be \(west, south, east, north\) in degrees"):
            xr_ginet.open_stac([item], bbox=bbox)
    for key, match in (("bbox", "has no bbox"), ("datetime", "neither datetime nor start_datetime")):
        broken = copy.deepcopy(item)
        (broken if key == "bbox" else broken["properties"])[key] = None
        with pytest.raises(ValueError, match=f"item a {match}|item a has {match}"):
            xr_ginet.open_stac([broken])
    with pytest.raises(ValueError, match="item 'a' is not as STAC has it: AttributeError"):
        xr_ginet.open_stac([item | {"assets": item["assets"] | {"blue": 7}}])
    with pytest.raises(ValueError, match="none of the 1 items has pixels within"):
        xr_ginet.open_stac([item], bbox=(10, 10, 11, 11))
    with pytest.raises(ValueError, match="groupby='day': must be"):
        xr_ginet.open_stac([item], groupby="day")
    for crs in ("+proj=laea +lat_0=1.2345", 4326):
        with pytest.raises(ValueError, match="must have an EPSG code, by which to read the items, and metres"):
            xr_ginet.open_stac([item], crs=crs)
    shifted = write_item(tmp_path, "b", 2, moment="2024-05-02T10:50:31Z")[0]
    for asset in shifted["assets"].values():
        asset["proj:transform"][2] += 10
    with pytest.raises(ValueError, match="start at different places of the 20 m lattice"):
        xr_ginet.open_stac([item, shifted])
    for key, match in (("proj:shape", "no proj:transform and proj:shape"), ("proj:transform", "no proj:transform")):
        broken = copy.deepcopy(item)
        del broken["assets"]["blue"][key]
        with pytest.raises(ValueError, match=f"item a, asset 'blue': {match}"):
            xr_ginet.open_stac([broken])
    rotated = copy.deepcopy(item)
    rotated["assets"]["blue"]["proj:transform"][1] = 0.5
    with pytest.raises(ValueError, match="is not north-up"):
        xr_ginet.open_stac([rotated])
    nowhere = copy.deepcopy(item)
    del nowhere["properties"]["proj:epsg"]
    with pytest.raises(ValueError, match="neither proj:epsg nor proj:code"):
        xr_ginet.open_stac([nowhere])


def test_cube_grid_of_a_lattice_with_a_phase(tmp_path) -> None:
    item = write_item(tmp_path, "a", 1)[0]
    for asset in item["assets"].values():
        asset["proj:transform"][2] += 10
        asset["proj:transform"][5] -= 4
    scene = read_item(item, ALL_BANDS)
    grid = cube_grid([scene], 32630, None)
    assert grid == Grid(600_010, 4_900_016, 10, -10, (60, 80))


# -- a 10 m cube that pulls its 20 m bands
# ---------------------------------------------------------------------------------


def test_missing_20_m_bands_are_pulled_for_the_same_days_and_ground(tmp_path, checkpoint: Checkpoint) -> None:
    items = [
        write_item(tmp_path, f"item{day}", day, moment=f"2024-05-{day:02d}T10:50:31Z")[0] for day in (1, 6, 11, 16)
    ]
    whole = xr_ginet.open_stac(items, chunks=16)
    window = {"x": slice(4, 44), "y": slice(10, 50)}
    fine = whole[list(BANDS_10M)].isel(time=[3, 1], **window).drop_attrs(deep=False)
    expected = whole.isel(time=[3, 1], **window, x_20m=slice(2, 22), y_20m=slice(5, 25)).ginet.superresolve(
        weights=checkpoint.path
    )
    with serve(items, tmp_path) as url:
        with no_compute():
            result = fine.ginet.superresolve(weights=checkpoint.path, catalog=url)
        xr.testing.assert_allclose(result.compute(), expected.compute())
        assert of_all(result)["source_items"] == ["item16", "item6"]
        single = fine.isel(time=1).ginet.superresolve(weights=checkpoint.path, catalog=url)
        xr.testing.assert_allclose(single.compute(), expected.isel(time=1).compute())
        complete_cube = fine.isel(time=[0]).ginet.superresolve(weights=checkpoint.path, catalog=url)
        assert list(complete_cube["time"].values) == [fine["time"].values[0]]


def test_items_found_already_serve_to_complete_a_cube_too(tmp_path, checkpoint: Checkpoint) -> None:
    first, second = (
        write_item(tmp_path, f"item{day}", day, moment=f"2024-05-{day:02d}T10:50:31Z")[0] for day in (1, 6)
    )
    whole = xr_ginet.open_stac([first, second], chunks=16)
    fine = whole[list(BANDS_10M)].assign(SCL=whole["B02"] * 0)
    expected = whole.ginet.superresolve(weights=checkpoint.path)
    result = fine.ginet.superresolve(weights=checkpoint.path, catalog=[second, first])
    assert "SCL" in result
    xr.testing.assert_allclose(result.drop_vars("SCL").compute(), expected.compute())
    # Some 20 m bands are there: only the others are loaded.
    some = whole.drop_vars(["B11", "B12"]).assign(B05=whole["B05"] + 1)
    completed = complete(some, [first, second])
    xr.testing.assert_equal(completed["B05"], some["B05"])
    assert_allclose(completed["B12"].values, whole["B12"].values)
    # Dates without a time of day are days as they stand, and two steps of one day get the same pixels.
    days = fine.assign_coords(time=fine["time"].dt.floor("D"))
    assert_allclose(complete(days, [first, second])["B11"].values, whole["B11"].values)
    twice = complete(fine.isel(time=[1, 1, 0]), [first, second])
    assert_allclose(twice["B11"].values, whole["B11"].values[[1, 1, 0]])


def test_items_of_another_zone_are_not_resampled_into_a_cube_that_is_completed(tmp_path) -> None:
    native = write_item(tmp_path, "native", 1)[0]
    x, y = Transformer.from_crs(32630, 32631).transform(*ORIGIN)
    other = write_item(tmp_path, "0other", 2, crs="EPSG:32631", origin=(x // 20 * 20, y // 20 * 20))[0]
    whole = xr_ginet.open_stac([native])
    completed = complete(whole[list(BANDS_10M)], [other, native])
    assert_array_equal(completed["B05"].values, whole["B05"].values)
    assert of_all(completed)["source_items"] == ["native"]
    with pytest.warns(UserWarning, match="are resampled to EPSG:32630"):
        mosaic = xr_ginet.open_stac([other, native], crs=32630, bbox=native["bbox"])
    inside = {"y_20m": whole["y_20m"], "x_20m": whole["x_20m"]}
    assert_array_equal(mosaic["B05"].sel(inside).values, whole["B05"].values)  # native pixels are on top


@pytest.mark.parametrize(
    ("moment", "utc"),
    [
        ("2024-05-01T10:50:31+02:00", "2024-05-01T08:50:31"),
        ("2024-05-01t10:50:31z", "2024-05-01T10:50:31"),
        ("2024-05-01T10:50:31", "2024-05-01T10:50:31"),
    ],
)
def test_times_are_in_utc(tmp_path, moment: str, utc: str) -> None:
    item = write_item(tmp_path, "a", 1)[0]
    item["properties"]["datetime"] = moment
    assert xr_ginet.open_stac([item])["time"].values[0] == np.datetime64(utc)
    item["properties"] |= {"datetime": None, "start_datetime": moment}
    assert xr_ginet.open_stac([item])["time"].values[0] == np.datetime64(utc)


def test_one_item_or_a_feature_collection_will_do(tmp_path) -> None:
    item = write_item(tmp_path, "a", 1)[0]
    expected = xr_ginet.open_stac([item])
    for catalog in (item, {"type": "FeatureCollection", "features": [item]}, pystac.Item.from_dict(item)):
        xr.testing.assert_identical(xr_ginet.open_stac(catalog), expected)


def test_a_url_in_provenance_holds_no_secret(tmp_path) -> None:
    item = write_item(tmp_path, "a", 1)[0]
    with serve([item], tmp_path) as url:
        cube = xr_ginet.open_stac(url.replace("://", "://user:secret@") + "?token=secret")
    assert cube.attrs["source_catalog"].rstrip("/") == url.rstrip("/")
    assert cube.attrs["source_collection"] == "sentinel-2-l2a"
    assert "secret" not in str(cube.attrs)


@pytest.mark.parametrize(
    "href", ["/etc/passwd", "file:///etc/passwd", "/vsicurl/http://x.example/B05.tif", "vrt:///etc/passwd"]
)
def test_a_catalogue_does_not_choose_which_files_of_this_machine_are_read(tmp_path, href: str) -> None:
    item = write_item(tmp_path / "data", "a", 1)[0]
    local = item["assets"]["rededge1"]["href"]
    item["assets"]["rededge1"]["href"] = href
    item["links"] = [{"rel": "self", "href": "/items/a.json"}]
    with serve([item], tmp_path / "data") as url:
        with pytest.raises(ValueError, match=r"asset 'rededge1': .* is no remote address \(http, .*local_files=True"):
            xr_ginet.open_stac(url)
        fine = xr_ginet.open_stac(url, bands=BANDS_10M)  # what is not read does not matter
        with pytest.raises(ValueError, match="is no remote address"):
            complete(fine, url)
    item["assets"]["rededge1"]["href"] = local
    (tmp_path / "elsewhere").mkdir()
    with serve([item], tmp_path / "elsewhere") as url:  # so that the item goes on naming a file
        with pytest.raises(ValueError, match="is no remote address"):
            xr_ginet.open_stac(url)
        trusted = xr_ginet.open_stac(url, local_files=True)
    xr.testing.assert_equal(trusted, xr_ginet.open_stac([item]))


def test_completing_refuses(tmp_path, checkpoint: Checkpoint) -> None:
    items = [write_item(tmp_path, "item", 1)[0]]
    fine = xr_ginet.open_stac(items)[list(BANDS_10M)]
    with serve(items, tmp_path) as url:
        for cube, match in (
            (
                fine.assign_coords(time=fine["time"] + np.timedelta64(1, "D")),
                "'sentinel-2-l2a' in EPSG:32630 on 2024-05-02",
            ),
            (fine.assign_coords(time=fine["time"] + np.timedelta64(100, "D")), "no item of 'sentinel-2-l2a' for bbox="),
            (fine.isel(x=slice(1, 41)), "Drop its first 10 m row or column"),
            (fine.isel(x=slice(0, 41)), "even numbers are needed"),
            (fine.drop_vars("spatial_ref"), "has no CRS with an EPSG code, by which"),
            (fine.isel(time=0, drop=True), "has no time coordinate"),
        ):
            with pytest.raises(ValueError, match=match):
                cube.ginet.superresolve(weights=checkpoint.path, catalog=url)


def test_of_two_processing_versions_the_latest_is_used(tmp_path) -> None:
    old, *_ = write_item(tmp_path, "x_0", 1, moment="2024-05-01T10:50:31Z", change={"s2:processing_baseline": "02.14"})
    new, _, coarse = write_item(
        tmp_path, "x_1", 2, moment="2024-05-01T10:50:31.001Z", change={"s2:processing_baseline": "05.00"}
    )
    for groupby in ("solar_day", None):
        cube = xr_ginet.open_stac([new, old, new], groupby=groupby)
        assert of_all(cube)["source_items"] == ["x_1"]
        assert_allclose(cube["B05"].values[0], coarse[0] / 1e4, rtol=1e-6)


@needs_shared
def test_the_reprocessed_one_of_two_real_versions_is_used() -> None:
    versions = [load_item(f"earthsearch-v1_S2A_32TMT_20200305_{i}_L2A") for i in (0, 1)]
    assert of_all(xr_ginet.open_stac(versions))["source_items"] == ["S2A_32TMT_20200305_1_L2A"]


def test_of_two_overpasses_on_a_day_a_cube_gets_its_own(tmp_path) -> None:
    early, *_, coarse_early = write_item(tmp_path, "early", 1, moment="2024-05-01T09:10:00Z")
    late, *_, coarse_late = write_item(tmp_path, "late", 2, moment="2024-05-01T10:50:00Z")
    fine = xr_ginet.open_stac([early, late], groupby=None)[list(BANDS_10M)]
    completed = complete(fine, [early, late])
    assert_allclose(completed["B05"].values, np.stack([coarse_early[0], coarse_late[0]]) / 1e4, rtol=1e-6)


def test_a_search_narrows_by_date_query_and_number(tmp_path) -> None:
    items = [
        write_item(
            tmp_path, f"item{day}", day, moment=f"2024-05-{day:02d}T10:50:31Z", change={"eo:cloud_cover": 5 * day}
        )[0]
        for day in (1, 6, 11)
    ]
    with serve(items, tmp_path) as url:
        client = pystac_client.Client.open(url)

        def found(**arguments: object) -> list[str]:
            return sorted(of_all(xr_ginet.open_stac(client, **arguments))["source_items"])

        assert found() == ["item1", "item11", "item6"]
        assert found(datetime="2024-05-02/2024-05-31") == ["item11", "item6"]
        assert found(query={"eo:cloud_cover": {"lt": 20}}) == ["item1"]
        assert len(found(max_items=2)) == 2
        assert len(found(intersects=items[0]["geometry"])) == 3
        with pytest.raises(ValueError, match="no item of 'other' for bbox=None"):
            found(collection="other")
        xr.testing.assert_equal(
            xr_ginet.open_stac(client.search(collections=["sentinel-2-l2a"]).item_collection()),
            xr_ginet.open_stac(url),
        )
