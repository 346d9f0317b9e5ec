from __future__ import annotations

import ast
import datetime as dt
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pystac
import pytest
import rasterio
from rasterio.warp import transform as reproject
from scipy.ndimage import zoom

import xr_ginet.simulation
from xr_ginet.sentinel2.bands import BANDS_10M, BANDS_20M
from xr_ginet.simulation import Scene, digital_numbers, noise_sigma, simulate, write_cogs
from xr_ginet.training.degradation import degrade

BANDS = BANDS_10M + BANDS_20M
EARTH_SEARCH = Path(__file__).parents[2] / "shared/data/stac-items/earthsearch-v1_S2A_32TMT_20200305_0_L2A.json"


@pytest.fixture(scope="module")
def scene() -> Scene:
    return simulate((256, 320), seed=3)


def write(scene: Scene, folder: Path, **changed: Any) -> dict[str, Any]:
    options = {"transform": scene.transform, "crs": scene.crs, "datetime": "2024-06-15T10:56:31Z", "item_id": "S"}
    return write_cogs(scene.fine, scene.coarse, folder, **options | changed)


# --- the scene ------------------------------------------------------------------------------------------------------


def test_a_seed_always_gives_the_same_scene(scene: Scene) -> None:
    again = simulate((256, 320), seed=3)
    for name in ("reference", "fine", "coarse"):
        np.testing.assert_array_equal(getattr(again, name), getattr(scene, name))


def test_another_seed_gives_another_land(scene: Scene) -> None:
    other = simulate((256, 320), seed=4)
    assert abs(np.corrcoef(other.reference[3].ravel(), scene.reference[3].ravel())[0, 1]) < 0.2


def test_arrays_and_grid_are_as_documented() -> None:
    scene = simulate((30, 44), origin=(500020.0, 100040.0), crs="EPSG:32733")
    assert [a.shape for a in (scene.reference, scene.fine, scene.coarse)] == [(10, 30, 44), (4, 30, 44), (6, 15, 22)]
    assert {a.dtype for a in (scene.reference, scene.fine, scene.coarse)} == {np.dtype("float32")}
    assert scene.transform == (10.0, 0.0, 500020.0, 0.0, -10.0, 100040.0)
    assert scene.crs == "EPSG:32733"


@pytest.mark.parametrize("shape", [(2, 2), (2, 600), (600, 2)])
def test_any_even_shape_can_be_drawn(shape: tuple[int, int]) -> None:
    scene = simulate(shape)
    assert scene.coarse.shape == (6, shape[0] // 2, shape[1] // 2)
    assert np.isfinite(scene.reference).all()


@pytest.mark.parametrize("seed", range(3))
def test_reflectance_is_plausible_for_farmland(seed: int) -> None:
    reference = dict(zip(BANDS, simulate((256, 256), seed=seed).reference, strict=True))
    assert all(0.001 < band.min() and band.max() < 1 for band in reference.values())
    mean = {name: float(band.mean()) for name, band in reference.items()}
    assert 0.02 < mean["B02"] < mean["B03"] < 0.15  # means of real summer scenes lie within these bounds
    assert 0.2 < mean["B08"] < mean["B8A"] < 0.45
    assert mean["B04"] < mean["B05"] < mean["B06"] < mean["B07"]
    assert 0.1 < mean["B12"] < mean["B11"] < 0.35
    water = (reference["B08"] < 0.05) & (reference["B11"] < 0.05)
    assert 0.001 < water.mean() < 0.2


def test_season_keeps_the_land_and_changes_the_crops(scene: Scene) -> None:
    spring = simulate((256, 320), seed=3, season=0.3)
    change = np.abs(spring.reference - scene.reference).max(axis=0)
    lasting = change == 0
    assert 0.05 < lasting.mean() < 0.8, "woods, water and villages stay to the last bit"
    assert (change > 0.1).mean() > 0.2, "crops do not"
    edges = [np.hypot(*np.gradient(s.reference[8])) > 0.02 for s in (scene, spring)]
    assert (edges[0] & edges[1]).sum() / edges[0].sum() > 0.5, "parcels keep their edges"


def test_crops_change_smoothly_with_season() -> None:
    a, b, c = (simulate((64, 64), seed=5, season=s).reference for s in (0.450, 0.451, 0.470))
    assert 0 < np.abs(b - a).max() < 0.02
    assert np.abs(c - a).max() > 2 * np.abs(b - a).max()


def test_noise_is_drawn_anew_for_each_season() -> None:
    a, b = (simulate((64, 64), seed=5, season=s) for s in (0.5, 0.5001))
    noise = [(s.fine - s.reference[:4]).ravel() for s in (a, b)]
    assert abs(np.corrcoef(*noise)[0, 1]) < 0.05


def test_fine_is_the_reference_with_noise_of_the_stated_size(scene: Scene) -> None:
    signal = scene.reference[:4]
    score = (scene.fine - signal) / noise_sigma(signal)
    assert abs(score.mean()) < 0.01
    assert abs(score.std() - 1) < 0.01
    assert np.abs(score).max() < 5.5


def test_coarse_is_the_degraded_reference_with_noise_of_the_stated_size(scene: Scene) -> None:
    signal = degrade(scene.reference[4:], BANDS_20M, degradation="mtf")
    score = (scene.coarse - signal) / noise_sigma(signal)
    assert np.abs(score).max() < 5
    assert abs(score.std() - 1) < 0.01
    box = degrade(scene.reference[4:], BANDS_20M, degradation="box")
    assert np.abs((scene.coarse - box) / noise_sigma(box)).max() > 20, "the test could not tell one blur from another"


def test_signal_to_noise_is_150_at_reflectance_0_3() -> None:
    sigma = noise_sigma(np.float32([0.3, 0.075, 0.01, 0.0]))
    np.testing.assert_allclose(sigma, [0.002, 0.001, np.sqrt(0.003) / 150, np.sqrt(0.003) / 150], rtol=1e-6)


@pytest.mark.parametrize("band", range(6))
def test_the_reference_holds_detail_that_the_coarse_bands_lost(scene: Scene, band: int) -> None:
    truth = scene.reference[4 + band]
    bicubic = zoom(scene.coarse[band], 2, order=3, grid_mode=True, mode="reflect")

    def detail(image: np.ndarray) -> float:
        spectrum = np.abs(np.fft.rfft2(image - image.mean())) ** 2
        high = np.hypot(np.fft.fftfreq(image.shape[0])[:, None], np.fft.rfftfreq(image.shape[1])) > 0.25
        return float(spectrum[high].sum() / truth.size)

    assert detail(truth) > 5 * detail(bicubic)
    inner = (slice(8, -8), slice(8, -8))
    error = np.sqrt(np.mean((bicubic - truth)[inner] ** 2)) * 1e4
    assert 50 < error < 400, "bicubic's error on real scenes lies between these"


def test_detail_of_the_short_wave_infrared_is_not_in_the_10_m_bands(scene: Scene) -> None:
    def detail(image: np.ndarray) -> np.ndarray:
        rough = zoom(degrade(image, BANDS_10M[:1] * len(image)), (1, 2, 2), order=1, grid_mode=True, mode="reflect")
        return (image - rough)[:, 8:-8, 8:-8].reshape(len(image), -1).T

    seen = detail(scene.reference[:4])
    explained = []
    for band in (4 + BANDS_20M.index("B8A"), 4 + BANDS_20M.index("B11")):
        target = detail(scene.reference[band : band + 1])[:, 0]
        weights = np.linalg.lstsq(seen, target, rcond=None)[0]
        explained.append(1 - np.var(target - seen @ weights) / np.var(target))
    assert explained[0] > 0.85, "B8A sees nearly the light of B08"
    assert 0.5 < explained[1] < 0.88, "on real scenes the 10 m bands explain 0.55 to 0.81 of B11's detail"


@pytest.mark.parametrize("shape", [(511, 512), (512, 511), (0, 512), (-2, 2)])
def test_a_shape_not_whole_at_20_m_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"shape=\({shape[0]}, {shape[1]}\): both must be positive multiples of 2"):
        simulate(shape)


@pytest.mark.parametrize("season", [-0.1, 1.1, float("nan")])
def test_a_season_outside_of_the_year_is_refused(season: float) -> None:
    with pytest.raises(ValueError, match=f"season={season}: must be a fraction of the year"):
        simulate((8, 8), season=season)


def test_the_package_itself_imports_only_numpy_and_scipy() -> None:
    modules = Path(xr_ginet.simulation.__file__).parent.glob("*.py")
    nodes = [node for module in modules for node in ast.parse(module.read_text()).body]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    assert {name.partition(".")[0] for name in names} - sys.stdlib_module_names == {"numpy", "scipy"}


# --- the files ------------------------------------------------------------------------------------------------------


def test_files_hold_the_digital_numbers_on_the_right_grid(scene: Scene, tmp_path: Path) -> None:
    item = write(scene, tmp_path)
    values = dict(zip(BANDS, [*scene.fine, *scene.coarse], strict=True))
    assert len(item["assets"]) == 10
    for asset in item["assets"].values():
        name, size = asset["eo:bands"][0]["name"], asset["gsd"]
        assert Path(asset["href"]) == tmp_path / "S" / f"{name}.tif"
        with rasterio.open(asset["href"]) as file:
            np.testing.assert_array_equal(file.read(1), np.rint(values[name] * 10000).clip(1))
            assert tuple(file.transform)[:6] == (size, 0, 600000, 0, -size, 4900020)
            assert list(tuple(file.transform)[:6]) == asset["proj:transform"]
            assert list(file.shape) == asset["proj:shape"]
            assert file.crs == "EPSG:32630"
            assert file.nodata == 0
            assert file.dtypes == ("uint16",)


def test_files_are_cloud_optimized(scene: Scene, tmp_path: Path) -> None:
    href = write(scene, tmp_path)["assets"]["nir"]["href"]
    with rasterio.open(href) as file:
        assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert file.compression.name == "deflate"
        assert file.block_shapes == [(256, 256)]
        assert file.overviews(1) == [2]


def test_digital_numbers_are_written_as_they_are(tmp_path: Path) -> None:
    fine = np.arange(4 * 4 * 6, dtype=np.uint16).reshape(4, 4, 6)  # 0 among them: missing
    coarse = np.arange(6 * 2 * 3, dtype=np.uint16).reshape(6, 2, 3) + 9000
    item = write_cogs(
        fine, coarse, tmp_path, transform=(10, 0, 0, 0, -10, 40), crs="EPSG:32631", datetime="2024-01-01", item_id="R"
    )
    with rasterio.open(item["assets"]["blue"]["href"]) as file:
        np.testing.assert_array_equal(file.read(1), fine[0])
        np.testing.assert_array_equal(file.dataset_mask().ravel()[:2], [0, 255])
    with rasterio.open(item["assets"]["swir22"]["href"]) as file:
        np.testing.assert_array_equal(file.read(1), coarse[5])


def test_reflectance_becomes_digital_numbers_and_nan_becomes_nodata() -> None:
    reflectance = np.array([0.12344, 0.12346, 0.0, -0.1, np.nan, 7.0, np.inf])
    for dtype in ("float32", "float64"):
        np.testing.assert_array_equal(
            digital_numbers(reflectance.astype(dtype)), np.uint16([1234, 1235, 1, 1, 0, 65535, 65535])
        )


def test_the_item_is_valid_and_its_box_encloses_the_pixels(scene: Scene, tmp_path: Path) -> None:
    document = write(scene, tmp_path)
    item = pystac.Item.from_dict(document)
    assert item.datetime == dt.datetime(2024, 6, 15, 10, 56, 31, tzinfo=dt.UTC)
    assert item.collection_id == "sentinel-2-l2a"
    height, width = scene.reference.shape[1:]
    row, column = (axis.ravel() for axis in np.mgrid[0 : height + 1 : 16, 0 : width + 1 : 16])
    longitude, latitude = reproject("EPSG:32630", "EPSG:4326", 600000 + 10 * column, 4900020 - 10 * row)
    west, south, east, north = document["bbox"]
    assert west < min(longitude) < max(longitude) < east
    assert south < min(latitude) < max(latitude) < north
    assert max(east - max(longitude), min(longitude) - west) < 1e-6
    ring = np.array(document["geometry"]["coordinates"][0])
    np.testing.assert_array_equal(ring[0], ring[-1])
    x, y = ring.T
    assert np.sum(x[:-1] * y[1:] - x[1:] * y[:-1]) > 0, "exterior rings run counterclockwise"


@pytest.mark.skipif(not EARTH_SEARCH.exists(), reason=f"{EARTH_SEARCH} is not here: see shared/README.md")
def test_the_item_says_what_an_earth_search_item_says(scene: Scene, tmp_path: Path) -> None:
    real, ours = json.loads(EARTH_SEARCH.read_text()), write(scene, tmp_path)
    for key in ("type", "stac_version", "collection"):
        assert ours[key] == real[key]
    for key in ("earthsearch:boa_offset_applied", "s2:processing_baseline", "constellation", "instruments"):
        assert ours["properties"][key] == real["properties"][key]
    assert set(ours["properties"]) <= set(real["properties"]) | {"proj:centroid"}  # which came in 2024
    for key, asset in ours["assets"].items():
        theirs = real["assets"][key]
        assert set(asset) <= set(theirs)
        assert asset["raster:bands"] == [{name: theirs["raster:bands"][0][name] for name in asset["raster:bands"][0]}]
        assert asset["eo:bands"][0]["common_name"] == theirs["eo:bands"][0]["common_name"]
        assert asset["gsd"] == theirs["gsd"]
        assert asset["roles"] == theirs["roles"]


@pytest.mark.parametrize(
    "when",
    [
        dt.datetime(2024, 6, 15, 10, 56, 31),
        dt.datetime(2024, 6, 15, 12, 56, 31, tzinfo=dt.timezone(dt.timedelta(hours=2))),
        "2024-06-15T10:56:31",
    ],
)
def test_time_is_written_in_utc(scene: Scene, tmp_path: Path, when: dt.datetime | str) -> None:
    item = write(scene, tmp_path, datetime=when)
    assert item["properties"]["datetime"] == "2024-06-15T10:56:31Z"


def test_bands_that_do_not_fit_together_are_refused(scene: Scene, tmp_path: Path) -> None:
    options = {"transform": scene.transform, "crs": scene.crs, "datetime": "2024-06-15", "item_id": "S"}
    with pytest.raises(ValueError, match=r"fine \(4, 256, 320\) and coarse \(6, 128, 159\): must be \(4, y, x\)"):
        write_cogs(scene.fine, scene.coarse[..., 1:], tmp_path, **options)
    with pytest.raises(ValueError, match=r"fine \(10, 256, 320\)"):
        write_cogs(scene.reference, scene.coarse, tmp_path, **options)
    with pytest.raises(TypeError, match="dtype int32: must be floating point reflectance or uint16"):
        write_cogs(scene.fine.astype("int32"), scene.coarse, tmp_path, **options)


def test_a_crs_without_epsg_code_is_refused(scene: Scene, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"crs='\+proj=ortho .*': has no EPSG code"):
        write(scene, tmp_path, crs="+proj=ortho +lat_0=44 +lon_0=-1")
