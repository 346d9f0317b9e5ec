"""Every catalogue's real items: what is read of them, and that the pixels each serves come out as one reflectance.

The items are real. Their pixels are made here, small, as each catalogue is known to hold them: shifted by 1000 or not,
in COGs, JPEG2000 files or the Zarr stores of EOPF.
"""

from __future__ import annotations

import copy
import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pystac
import pytest
import rasterio
import xarray as xr
import zarr
from conftest import SHARED, needs_shared, no_compute
from local_stac import serve
from numpy.testing import assert_array_equal
from rasterio import Affine

import xr_ginet
from xr_ginet.sentinel2 import reader
from xr_ginet.sentinel2.bands import BANDS, BANDS_10M, BANDS_20M
from xr_ginet.sentinel2.grids import Grid, transform_bounds
from xr_ginet.sentinel2.items import read_item
from xr_ginet.sentinel2.provenance import of_all
from xr_ginet.sentinel2.radiometry import REFLECTANCE, radiometry
from xr_ginet.sentinel2.search import find_items
from xr_ginet.simulation import simulate
from xr_ginet.simulation.cogs import digital_numbers

ALL_BANDS = (*BANDS_10M, *BANDS_20M)

# How the file's name begins, EPSG, origin, time, offset in digital numbers, a word of its reason: from the collection's
# own index, and from each tile.
REAL_ITEMS = [
    ("cdse_S2A_MSIL2A_20241107", 32632, (199_980, 7_100_040), "2024-11-07T11:33:11.024", -1000, "states"),
    ("cdse_S2B_MSIL2A_20200322", 32636, (699_960, 300_000), "2020-03-22T07:46:09.024", -1000, "states"),
    ("cdse_S2B_MSIL2A_20200705", 32632, (399_960, 5_300_040), "2020-07-05T10:15:59.024", -1000, "states"),
    ("cdse_S2C_MSIL2A_20260527", 32655, (600_000, 7_600_020), "2026-05-27T01:46:51.025", -1000, "states"),
    ("dea-ard3", 32749, (600_000, 7_200_040), "2016-12-14T02:43:17.461", 0, "NBART"),
    ("deafrica-c1_S2B_T37MGP_20240710", 32737, (699_960, 9_400_000), "2024-07-10T07:41:33.657", -1000, "states"),
    ("earthsearch-v0-static_S2A_17SPR_20221106_0", 32617, (600_000, 3_600_000), "2022-11-06T16:04:25", 0, "took it"),
    ("earthsearch-v0-static_S2A_28QCH_20200714_0", 32628, (300_000, 2_300_040), "2020-07-14T11:55:52", 0, "02.14"),
    ("earthsearch-v0-static_S2B_35QKG_20230603_0", 32635, (199_980, 2_700_000), "2023-06-03T09:03:52", 0, "took it"),
    ("earthsearch-v0-static_S2B_42TUM_20220107_0", 32642, (300_000, 4_700_040), "2022-01-07T06:37:31", 0, "03.01"),
    ("earthsearch-v0_S2A_13SCV_20200413_0", 32613, (300_000, 4_000_020), "2020-04-13T17:54:13", 0, "02.14"),
    ("earthsearch-v0_S2B_20EPT_20250731_0", 32720, (600_000, 3_300_040), "2025-07-31T13:19:22", 0, "took it"),
    ("earthsearch-v1-c1_S2B_T01WCR_20250427", 32601, (300_000, 7_600_020), "2025-04-27T00:07:21.580", -1000, "states"),
    ("earthsearch-v1-c1_S2B_T20EPT_20250731", 32720, (600_000, 3_300_040), "2025-07-31T13:19:22.930", -1000, "states"),
    ("earthsearch-v1_S2A_13SCV_20200413_0", 32613, (300_000, 4_000_020), "2020-04-13T17:54:13.625", 0, "states"),
    ("earthsearch-v1_S2A_13TDE_20231008_0", 32613, (399_960, 4_500_000), "2023-10-08T18:02:55.276", 0, "took it"),
    ("earthsearch-v1_S2A_32TMT_20200305_0", 32632, (399_960, 5_300_040), "2020-03-05T10:37:41.586", 0, "states"),
    ("earthsearch-v1_S2A_32TMT_20200305_1", 32632, (399_960, 5_300_040), "2020-03-05T10:37:41.587", 0, "took it"),
    ("earthsearch-v1_S2B_20EPT_20250731_0", 32720, (600_000, 3_300_040), "2025-07-31T13:19:22.930", 0, "took it"),
    ("eopf-explorer_S2A_MSIL2A_20250831", 32631, (600_000, 5_100_000), "2025-08-31T10:37:01.024", -1000, "states"),
    ("eopf-samples-zarr3_S2C_MSIL2A_20260927", 32628, (399_960, 8_000_040), "2026-09-27T13:39:31.025", -1000, "05.13"),
    ("eopf-samples_S2A_MSIL2A_20250513", 32632, (300_000, 5_300_040), "2025-05-13T10:40:41.024", -1000, "states"),
    ("eopf-samples_S2A_MSIL2A_20251113", 32632, (499_980, 5_000_040), "2025-11-13T10:23:11.024", -1000, "states"),
    ("eopf-samples_S2C_MSIL2A_20260321", 32632, (600_000, 6_000_000), "2026-03-21T10:17:21.025", -1000, "states"),
    ("planetarycomputer_S2B_MSIL2A_20190629", 32606, (399_960, 6_800_040), "2019-06-29T21:25:29.024", 0, "02.12"),
    ("planetarycomputer_S2B_MSIL2A_20200705", 32632, (399_960, 5_300_040), "2020-07-05T10:15:59.024", 0, "02.12"),
    ("planetarycomputer_S2B_MSIL2A_20220612", 32624, (499_980, 9_100_020), "2022-06-12T18:29:19.024", -1000, "04.00"),
    ("planetarycomputer_S2B_MSIL2A_20240419", 32647, (399_960, 9_100_020), "2024-04-19T09:55:49.024", -1000, "05.10"),
    ("sinergise-aws-jp2_S2A", 32601, (300_000, 7_600_020), "2023-06-02T00:07:24.355", -1000, "states"),
    (
        "stactools-sentinel2_S2B_T33XWJ_20220413",
        32633,
        (499_980, 8_900_040),
        "2022-04-13T15:07:59.024",
        -1000,
        "states",
    ),
]

NAMES = [row[0] for row in REAL_ITEMS]
SILENT = ("eopf-explorer_S2A_MSIL2A_20250831", "eopf-samples_S2A_MSIL2A_20251113")
"""What these items do not tell, their stores do."""

FILES = {
    "earthsearch": "*/{B}.tif",
    "deafrica": "*/{B}.tif",
    "planetarycomputer": "*_{B}_{res}m.tif",
    "stactools": "/stac/GRANULE/*/R{res}m/*_{B}_{res}m.tif",
    "cdse": "s3://eodata/*/R{res}m/*_{B}_{res}m.jp2",
    "sinergise": "s3://sentinel-s2-l2a/*/R{res}m/{B}.jp2",
    "dea-ard3": "*_nbart_*_final_band{nn}.tif",
    "eopf": "https://*.zarr/measurements/reflectance/r{res}m/{b}",
}
"""Where each catalogue keeps a band, by the beginning of the item's file name."""


def load_item(name: str) -> dict[str, Any]:
    [path] = (SHARED / "stac-items").glob(f"{name}*.json")
    item = json.loads(path.read_text())
    if name.startswith("stactools"):  # generated, and never put at an address
        item["links"].append({"rel": "self", "href": "/stac/item.json"})
    return item


def place_of(name: str, band: str) -> str:
    """Return the pattern that the address of a band must match."""
    pattern = next(pattern for start, pattern in FILES.items() if name.startswith(start))
    nn = "08a" if band == "B8A" else band[1:]
    return pattern.format(B=band, b=band.lower(), nn=nn, res=BANDS[band].resolution)


def full_tile(href: str, origin: tuple[float, float]) -> dict[str, Any]:
    """Return what the store of a full tile says of a band."""
    size, n = (10, 10_980) if "/r10m/" in href else (20, 5490)
    return {
        "proj:transform": [size, 0, origin[0], 0, -size, origin[1]],
        "proj:shape": [n, n],
        "data_type": "uint16",
        "raster:scale": 1e-4,
        "raster:offset": -0.1,
    }


# -- metadata
# ---------------------------------------------------------------------------------------------------------


@needs_shared
def test_the_table_names_all_the_items_there_are() -> None:
    there = {path.stem for path in (SHARED / "stac-items").glob("*.json")}
    assert len(NAMES) == len(there) == 30
    for name in NAMES:
        assert len([file for file in there if file.startswith(name)]) == 1


@needs_shared
@pytest.mark.parametrize(("name", "epsg", "origin", "moment", "offset", "reason"), REAL_ITEMS, ids=NAMES)
@pytest.mark.parametrize("as_pystac", [False, True])
@pytest.mark.filterwarnings("ignore:Could not parse bucket")  # pystac migrating the storage extension
def test_a_real_item_yields_ten_native_assets(
    name: str, epsg: int, origin: tuple, moment: str, offset: int, reason: str, as_pystac: bool
) -> None:
    item = load_item(name)
    [found] = find_items([pystac.Item.from_dict(item) if as_pystac else item])
    looked: list[str] = []
    scene = read_item(found, ALL_BANDS, look=lambda href: looked.append(href) or full_tile(href, origin))
    assert tuple(scene.bands) == ALL_BANDS
    for band, asset in scene.bands.items():
        size = BANDS[band].resolution
        assert fnmatch(asset.href, place_of(name, band))
        assert asset.epsg == epsg
        assert asset.grid == Grid(*origin, size, -size, (109_800 // size, 109_800 // size))
        assert (asset.radiometry.scale, asset.radiometry.offset) == (1e-4, offset)
        assert reason in asset.radiometry.reason
        assert asset.is_zarr == name.startswith("eopf")
    assert np.datetime64(scene.datetime) == np.datetime64(moment)
    assert len(looked) == (10 if name in SILENT else 0)


@needs_shared
@pytest.mark.parametrize("name", NAMES)
def test_a_real_item_opens_as_a_lazy_full_tile(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xr_ginet.sentinel2.catalog.look", lambda href: full_tile(href, (600_000, 5_100_000)))
    with no_compute():
        cube = xr_ginet.open_stac([load_item(name)], bands=("B02", "B05"))
    assert dict(cube.sizes) == {"time": 1, "y": 10_980, "x": 10_980, "y_20m": 5490, "x_20m": 5490}
    assert cube["B02"].chunksizes["y"][0] == 1024
    assert cube["B05"].chunksizes["x_20m"][0] == 512
    assert of_all(cube)["source_items"] == [load_item(name)["id"]]
    assert cube.rio.crs is not None
    [needed] = dask.optimize(cube["B05"].data)
    assert len(dict(needed.dask)) < 3 * needed.npartitions


@needs_shared
@pytest.mark.parametrize("name", SILENT)
def test_where_only_the_store_tells_it_must_be_reached(name: str) -> None:
    item = load_item(name)
    with pytest.raises(
        ValueError, match=r"asset '.*': its grid or its type .* is told by its Zarr store alone.*Type look="
    ):
        read_item(item, ALL_BANDS)
    for asset in item["assets"].values():
        asset["href"] = asset["href"].replace("https://", "/nowhere/")
    with pytest.raises(ValueError, match=r"could not be read \(FileNotFoundError.*pip install aiohttp"):
        xr_ginet.open_stac([item])


@needs_shared
def test_a_relative_reference_needs_an_address_of_the_item() -> None:
    item = load_item("stactools-sentinel2_S2B_T33XWJ_20220413")
    item["links"][-1]["href"] = "s3://bucket/folder/item.json"
    href = read_item(item, ["B02"]).bands["B02"].href
    assert fnmatch(href, "s3://bucket/folder/GRANULE/*/R10m/*_B02_10m.tif")
    item["links"].clear()
    with pytest.raises(ValueError, match=r"\./GRANULE/.* is relative to the item.*pystac\.Item\.from_file"):
        read_item(item, ["B02"])


@needs_shared
def test_a_box_around_both_sides_of_the_antimeridian_is_no_longitude_of_greenwich() -> None:
    scene = read_item(load_item("sinergise-aws-jp2_S2A"), ["B02"])
    assert 179 < abs(scene.longitude) < 180


# -- pixels
# -----------------------------------------------------------------------------------------------------------

SHAPES = {10: (60, 80), 20: (30, 40)}


@pytest.fixture(scope="module")
def ground() -> dict[str, np.ndarray]:
    """Return what is on the ground as digital numbers without ESA's offset, 0 where missing: dark pixels too."""
    scene = simulate((80, 80), seed=5)
    images = zip(ALL_BANDS, [*scene.fine, *scene.coarse], strict=True)
    truth = {band: digital_numbers(image)[: SHAPES[BANDS[band].resolution][0]].copy() for band, image in images}
    for image in truth.values():
        image[:2, :3] = 0
        image[5, 5:9] = (1, 2, 999, 1000)
    return truth


def served(truth: np.ndarray, offset: int, *, nodata: int = 0, dtype: str = "uint16") -> np.ndarray:
    """Return the numbers of a catalogue whose reader must add ``offset``."""
    return np.where(truth == 0, nodata, truth.astype(int) - offset).astype(dtype)


def reflectance(truth: np.ndarray) -> np.ndarray:
    return np.where(truth == 0, np.nan, truth.astype("float32") * np.float32(1e-4))


def write_raster(path: Path, numbers: np.ndarray, grid: Grid, epsg: int) -> None:
    profile = {"driver": "GTiff", "nodata": -999 if numbers.dtype == "int16" else 0}
    if path.suffix == ".jp2":  # as ESA writes them: lossless, without nodata
        profile = {"driver": "JP2OpenJPEG", "quality": 100, "reversible": True, "yccc": False}
    height, width = numbers.shape
    shape = {"height": height, "width": width, "count": 1, "dtype": numbers.dtype, "crs": f"EPSG:{epsg}"}
    with rasterio.open(path, "w", **profile, **shape, transform=Affine(*grid.transform)) as file:
        file.write(numbers, 1)


def write_store(
    product: Path, images: dict[str, np.ndarray], origin: tuple[float, float], version: int, attrs: dict
) -> None:
    """Write the reflectance of an EOPF product: version 2 as of 2025, 3 as of 2026."""
    for size in (10, 20):
        group = product / "measurements" / "reflectance" / f"r{size}m"
        shape = SHAPES[size]
        y = (origin[1] - size * (np.arange(shape[0]) + 0.5)).astype("int64" if version == 2 else "float32")
        x = (origin[0] + size * (np.arange(shape[1]) + 0.5)).astype("int64" if version == 2 else "float32")
        arrays = {band.lower(): image for band, image in images.items() if BANDS[band].resolution == size}
        for name, values in (arrays | {"y": y, "x": x}).items():
            dims = [name] if name in "yx" else ["y", "x"]
            own = {} if name in "yx" else attrs
            zarr.create_array(
                str(group / name),
                data=values,
                chunks=tuple(min(n, 17) for n in values.shape),
                zarr_format=version,
                dimension_names=dims if version == 3 else None,
                attributes=own | ({"_ARRAY_DIMENSIONS": dims} if version == 2 else {}),
            )


CF = {"scale_factor": 1e-4, "add_offset": -0.1, "fill_value": 0}


def localize(name: str, folder: Path, ground: dict[str, np.ndarray], *, decoded: bool = False) -> dict[str, Any]:
    """Return a real item whose ten bands are small files here, with the numbers that its catalogue serves."""
    _, epsg, origin, _, offset, _ = REAL_ITEMS[NAMES.index(name)]
    item = load_item(name)
    kind = {"nodata": -999, "dtype": "int16"} if name.startswith("dea-ard3") else {}
    images = {band: served(truth, offset, **kind) for band, truth in ground.items()}
    if decoded:
        images = {band: reflectance(truth) for band, truth in ground.items()}
    folder.mkdir(parents=True)
    if name.startswith("eopf"):
        write_store(folder / "p.zarr", images, origin, 2 if "_2025" in name else 3, {} if decoded else CF)
        for asset in item["assets"].values():
            asset["href"] = f"{folder}/p.zarr{asset['href'].rpartition('.zarr')[2]}"
            if "proj:shape" in asset:
                asset["proj:shape"] = SHAPES.get(asset.get("gsd"), [15, 20])
        if max(item["properties"]["proj:bbox"]) > 360:
            item["properties"]["proj:bbox"] = [origin[0], origin[1] - 600, origin[0] + 800, origin[1]]
        return item
    for band, numbers in images.items():
        size = BANDS[band].resolution
        grid = Grid(*origin, size, -size, SHAPES[size])
        pattern = place_of(name, band).replace("/stac/", "./")
        [asset] = [asset for asset in item["assets"].values() if fnmatch(asset["href"], pattern)]
        path = folder / f"{band}.{asset['href'].rpartition('.')[2]}"
        write_raster(path, numbers, grid, epsg)
        asset |= {"href": str(path), "proj:shape": list(grid.shape)}
    return item


def assert_shows(cube: xr.Dataset, ground: dict[str, np.ndarray]) -> None:
    for band, truth in ground.items():
        assert cube[band].dtype == "float32"
        assert_array_equal(cube[band].values[0], reflectance(truth), err_msg=band)


CONVENTIONS = [
    "cdse_S2C_MSIL2A_20260527",
    "dea-ard3",
    "deafrica-c1_S2B_T37MGP_20240710",
    "earthsearch-v0-static_S2A_17SPR_20221106_0",
    "earthsearch-v0-static_S2A_28QCH_20200714_0",
    "eopf-explorer_S2A_MSIL2A_20250831",
    "eopf-samples-zarr3_S2C_MSIL2A_20260927",
    "eopf-samples_S2A_MSIL2A_20250513",
    "eopf-samples_S2A_MSIL2A_20251113",
    "eopf-samples_S2C_MSIL2A_20260321",
    "planetarycomputer_S2B_MSIL2A_20240419",
    "stactools-sentinel2_S2B_T33XWJ_20220413",
]
"""One item for each way of serving pixels that no pair below covers."""


@needs_shared
@pytest.mark.parametrize("name", CONVENTIONS)
def test_pixels_come_out_as_reflectance_however_they_are_served(name: str, tmp_path: Path, ground: dict) -> None:
    item = localize(name, tmp_path / "data", ground)
    with no_compute():
        cube = xr_ginet.open_stac([item], chunks=32)
    assert_shows(cube, ground)
    assert cube["x"].values[0] - 5 == REAL_ITEMS[NAMES.index(name)][2][0]
    assert REAL_ITEMS[NAMES.index(name)][5] in of_all(cube)["radiometry"]


PAIRS = [
    (
        "earthsearch-v0_S2B_20EPT_20250731_0",
        "earthsearch-v1_S2B_20EPT_20250731_0",
        "earthsearch-v1-c1_S2B_T20EPT_20250731",
    ),
    (
        "planetarycomputer_S2B_MSIL2A_20200705",
        "cdse_S2B_MSIL2A_20200705",
    ),
    ("earthsearch-v1_S2A_32TMT_20200305_0", "earthsearch-v1_S2A_32TMT_20200305_1"),
    ("earthsearch-v0_S2A_13SCV_20200413_0", "earthsearch-v1_S2A_13SCV_20200413_0"),
    (
        "earthsearch-v1-c1_S2B_T01WCR_20250427",
        "sinergise-aws-jp2_S2A",
    ),
]
"""Items of one scene, or of one tile, in several catalogues."""


@needs_shared
@pytest.mark.parametrize("names", PAIRS, ids=lambda names: names[0])
def test_one_scene_is_the_same_in_every_catalogue(names: tuple[str, ...], tmp_path: Path, ground: dict) -> None:
    cubes = []
    for index, name in enumerate(names):
        cube = xr_ginet.open_stac([localize(name, tmp_path / str(index), ground)], chunks=32)
        assert_shows(cube, ground)
        cubes.append(cube.isel(time=0, drop=True).compute())
    for cube in cubes[1:]:
        xr.testing.assert_equal(cubes[0], cube)


@needs_shared
def test_a_wrong_offset_would_be_seen(tmp_path: Path, ground: dict) -> None:
    name = "earthsearch-v1_S2A_13TDE_20231008_0"
    item = localize(name, tmp_path / "data", ground)
    cube = xr_ginet.open_stac([item], offset=-1000)
    assert of_all(cube)["radiometry"] == "offset -1000 given by the caller"
    expected = reflectance(ground["B05"]) - np.float32(0.1)
    np.testing.assert_allclose(cube["B05"].values[0], expected, atol=1e-7)
    assert_shows(xr_ginet.open_stac([item], offset=0), ground)


@needs_shared
def test_mixed_baselines_make_one_series(tmp_path: Path, ground: dict) -> None:
    name = "planetarycomputer_S2B_MSIL2A_20240419"
    new = localize(name, tmp_path / "new", ground)
    old = copy.deepcopy(new)
    old["id"] = "old"
    old["properties"] |= {"datetime": "2021-04-19T09:55:49Z", "s2:processing_baseline": "02.14"}
    for band, truth in ground.items():
        path = tmp_path / f"{band}.tif"
        size = BANDS[band].resolution
        write_raster(path, truth, Grid(399_960, 9_100_020, size, -size, SHAPES[size]), 32647)
        old["assets"][band]["href"] = str(path)
    cube = xr_ginet.open_stac([new, old], chunks=32)
    assert cube.sizes["time"] == 2
    for band in ALL_BANDS:
        assert_array_equal(cube[band].values[0], cube[band].values[1])
    assert cube["radiometry"].values.tolist() == [
        "offset 0: nothing stated, processing baseline 02.14",
        "offset -1000: nothing stated, processing baseline 05.10",
    ]


# -- zarr
# -------------------------------------------------------------------------------------------------------------

EOPF = "eopf-samples_S2A_MSIL2A_20251113"
EXPLORER = "eopf-explorer_S2A_MSIL2A_20250831"


@needs_shared
def test_a_store_that_holds_reflectance_is_not_scaled_again(tmp_path: Path, ground: dict) -> None:
    item = localize(EXPLORER, tmp_path / "data", ground, decoded=True)
    cube = xr_ginet.open_stac([item], chunks=32)
    assert_shows(cube, ground)
    assert "scale and offset applied" in of_all(cube)["radiometry"]
    with pytest.raises(ValueError, match=r"has reflectance in its store.*offset=-1000 cannot be added"):
        xr_ginet.open_stac([item], offset=-1000)


def test_what_was_missing_before_decoding_is_missing_still() -> None:
    asset = {"data_type": "float64"}
    assert radiometry({"id": "x", "properties": {}}, asset).dtype == "float64"
    decoded = np.array([0, 1], "uint16") * 1e-4 - 0.1
    assert (decoded.astype("float32") > np.float32(REFLECTANCE.nodata)).tolist() == [False, True]


@needs_shared
def test_a_store_is_read_over_http(tmp_path: Path, ground: dict) -> None:
    pytest.importorskip("aiohttp")
    item = localize(EOPF, tmp_path / "data", ground)
    with serve([item], tmp_path) as url:
        with no_compute():
            cube = xr_ginet.open_stac(url, chunks=32)
        assert_shows(cube, ground)


@needs_shared
def test_stores_and_rasters_give_the_same_mosaic(tmp_path: Path, ground: dict) -> None:
    raster = "earthsearch-v1-c1_S2B_T20EPT_20250731"
    items: dict[str, list[dict]] = {"zarr": [], "tif": []}
    for index, shift in enumerate((0, 200)):
        truth = {band: np.where(image == 0, 0, image + index) for band, image in ground.items()}
        images = {band: served(image, -1000) for band, image in truth.items()}
        origin = (600_000 + shift, 3_300_040 - shift // 2)
        item = load_item(raster)
        item["id"], product = f"{index}", tmp_path / f"{index}.zarr"
        write_store(product, images, origin, 3, CF)
        stored = copy.deepcopy(item)
        for band, numbers in images.items():
            size = BANDS[band].resolution
            grid = Grid(*origin, size, -size, SHAPES[size])
            write_raster(tmp_path / f"{index}{band}.tif", numbers, grid, 32720)
            field = {"proj:shape": list(grid.shape), "proj:transform": list(grid.transform)}
            [key] = [key for key, asset in item["assets"].items() if asset["href"].endswith(f"/{band}.tif")]
            item["assets"][key] |= field | {"href": str(tmp_path / f"{index}{band}.tif")}
            href = f"{product}/measurements/reflectance/r{size}m/{band.lower()}"
            stored["assets"][key] |= field | {"href": href, "type": "application/vnd+zarr", "data_type": "uint16"}
        items["tif"].append(item)
        items["zarr"].append(stored)
    pair: dict[str, Any] = {"bands": ("B02", "B05")}
    expected = xr_ginet.open_stac(items["tif"], chunks=32, **pair).compute().drop_attrs()
    assert dict(expected.sizes) == {"time": 1, "y": 70, "x": 100, "y_20m": 35, "x_20m": 50}
    west, south, east, north = transform_bounds((600_090, 3_299_510, 600_770, 3_299_930), 32720, 4326)
    bbox = (west, south, east, north)
    cut = xr_ginet.open_stac(items["tif"], bbox=bbox, **pair).compute().drop_attrs()
    assert cut.sizes["x"] < 80
    for found in (items["zarr"], [items["zarr"][0], items["tif"][1]], [items["zarr"][1], items["tif"][0]]):
        for chunks in (16, 128):
            xr.testing.assert_identical(
                xr_ginet.open_stac(found, chunks=chunks, **pair).compute().drop_attrs(), expected
            )
        xr.testing.assert_identical(xr_ginet.open_stac(found, bbox=bbox, **pair).compute().drop_attrs(), cut)


@needs_shared
def test_a_store_that_is_not_what_its_item_says_is_refused(tmp_path: Path, ground: dict) -> None:
    item = localize("eopf-samples_S2A_MSIL2A_20250513", tmp_path / "d", ground)
    item["assets"]["B05_20m"]["proj:shape"] = [28, 38]
    cube = xr_ginet.open_stac([item])
    assert_array_equal(cube["B06"].values[0], reflectance(ground["B06"]))
    with pytest.raises(ValueError, match=r"r20m/b05 holds \(30, 40\) pixels of uint16; its item says \(28, 38\)"):
        cube["B05"].compute()


@needs_shared
def test_stores_are_not_resampled(tmp_path: Path, ground: dict) -> None:
    item = localize(EOPF, tmp_path / "data", ground)
    with (
        pytest.warns(UserWarning, match="are resampled to EPSG:32633"),
        pytest.raises(ValueError, match=r"stored as Zarr in EPSG:32632.*each UTM zone by themselves"),
    ):
        xr_ginet.open_stac([item], crs=32633)


def test_what_a_store_says_of_itself(tmp_path: Path) -> None:
    images = {band: np.ones(SHAPES[BANDS[band].resolution], "uint16") for band in ALL_BANDS}
    write_store(tmp_path / "a", images, (600_000, 5_100_000), 3, CF)
    write_store(tmp_path / "b", images, (600_000, 5_100_000), 2, {"_eopf_attrs": CF})
    expected = {
        "proj:transform": [20, 0, 600_000, 0, -20, 5_100_000],
        "proj:shape": [30, 40],
        "data_type": "uint16",
        "raster:scale": 1e-4,
        "raster:offset": -0.1,
    }
    for product in "ab":
        assert reader.look(f"{tmp_path}/{product}/measurements/reflectance/r20m/b8a") == expected
    write_store(tmp_path / "c", images, (600_000, 5_100_000), 3, {})
    assert "raster:scale" not in reader.look(f"{tmp_path}/c/measurements/reflectance/r20m/b8a")


# -- contradictions
# ---------------------------------------------------------------------------------------------------


@needs_shared
@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("earthsearch-v1_S2A_13TDE_20231008_0", "earthsearch:boa_offset_applied"),
        ("earthsearch-v0-static_S2B_35QKG_20230603_0", "sentinel:boa_offset_applied"),
    ],
)
def test_a_flag_that_is_false_for_a_new_baseline_is_not_believed(name: str, field: str) -> None:
    item = load_item(name)
    item["properties"][field] = False
    with pytest.raises(
        ValueError, match=r"boa_offset_applied=false, yet .*'sentinel-2-c1-l2a'.*offset=-1000 or offset=0"
    ):
        read_item(item, ALL_BANDS)
    for offset in (0, -1000):
        assert read_item(item, ["B05"], offset=offset).bands["B05"].radiometry.offset == offset
