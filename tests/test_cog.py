"""Cloud Optimized GeoTIFFs: pixels, names, scale and place as any GIS reads them, and nothing half written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import dask
import dask.array as da
import numpy as np
import pytest
import rasterio
import xarray as xr
from conftest import no_compute, scene_item, single_grid, two_grids
from numpy.testing import assert_allclose, assert_array_equal

import xr_ginet
from xr_ginet.network import Checkpoint
from xr_ginet.sentinel2.bands import BANDS_10M, BANDS_20M
from xr_ginet.simulation import simulate


@pytest.fixture(scope="module")
def result(checkpoint: Checkpoint) -> xr.Dataset:
    cube = two_grids((20, 14), n_times=2).chunk({"time": 1, "y": 24, "x": 16})
    cube["B05"] = cube["B05"].where(cube["B05"]["y_20m"] < cube["y_20m"][3])
    return cube.ginet.superresolve(weights=checkpoint)


def test_a_file_per_band_holds_name_scale_place_and_pixels(result: xr.Dataset, tmp_path: Path) -> None:
    paths = result.ginet.to_cog(tmp_path / "out")
    assert len(paths) == 20
    assert paths == sorted(paths, key=lambda path: path.name[:15])
    assert paths[3] == tmp_path / "out" / "20240501T105031_B05.tif"
    assert sorted((tmp_path / "out").iterdir()) == sorted(paths)
    with rasterio.open(paths[3]) as file:
        assert file.descriptions == ("B05",)
        assert (file.scales, file.offsets, file.nodata) == ((1e-4,), (-0.1,), 0)
        assert (file.dtypes, file.crs.to_epsg()) == (("uint16",), 32630)
        assert file.transform == result.rio.transform()
        assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert file.tags()["TIFFTAG_DATETIME"] == "2024:05:01 10:50:31"
        assert file.tags()["ginet_weights_sha256"] == result.attrs["ginet_weights_sha256"]
        assert file.tags(1)["wavelength"] == "704.1"
        pixels = file.read(1, masked=True) * 1e-4 - 0.1
    truth = result["B05"].values[0]
    assert_array_equal(pixels.mask, np.isnan(truth))
    assert pixels.mask.sum() == 8 * 28
    assert_allclose(pixels.filled(np.nan), truth, rtol=0, atol=0.51e-4)


def test_stacked_bands_lie_in_one_file_per_time(result: xr.Dataset, tmp_path: Path) -> None:
    paths = result.ginet.to_cog(tmp_path, stacked=True, dtype="float32")
    assert [path.name for path in paths] == ["20240501T105031.tif", "20240506T105031.tif"]
    with rasterio.open(paths[1]) as file:
        assert file.descriptions == tuple(result.data_vars)
        assert set(file.dtypes) == {"float32"}
        assert np.isnan(file.nodata)
        assert_array_equal(file.read(), result.isel(time=1).to_dataarray().values.astype("float32"))


def test_a_cube_without_time_is_named_by_its_bands(result: xr.Dataset, tmp_path: Path) -> None:
    one = result.isel(time=0, drop=True).compute()
    assert [p.name for p in one[["B02", "B11"]].ginet.to_cog(tmp_path)] == ["B02.tif", "B11.tif"]
    assert [p.name for p in one.ginet.to_cog(tmp_path, stacked=True)] == ["bands.tif"]


def test_the_network_runs_once_for_all_files_of_a_time(result: xr.Dataset, tmp_path: Path) -> None:
    calls = []

    class Count(dask.callbacks.Callback):
        def _posttask(self, key, *_: object) -> None:
            calls.append(key)

    with Count():
        result.ginet.to_cog(tmp_path)
    windows = [key for key in calls if str(key).startswith("('ginet-windows-")]
    assert len(windows) == len(set(windows)) == 2 * 2 * 2


@pytest.mark.parametrize("writer", ["cog", "zarr"])
@pytest.mark.parametrize("offset", [0, -1000])
def test_like_input_gives_the_digital_numbers_back(offset: int, writer: str, tmp_path: Path) -> None:
    scene = simulate((32, 48), seed=2)
    fine, coarse = (np.round(image * 1e4).astype("uint16") - np.int32(offset) for image in (scene.fine, scene.coarse))
    fine[0, 3, 4] = 0
    numbers = {"fine": fine.astype("uint16"), "coarse": coarse.astype("uint16")}
    item = scene_item(replace(scene, **numbers), tmp_path / "in")
    cube = xr_ginet.open_stac([item], offset=offset)
    result = cube.ginet.superresolve(weights=None)
    for i, band in enumerate(BANDS_10M):
        if writer == "cog":
            path = tmp_path / "out" / f"20240621T105621_{band}.tif"
            if not path.exists():
                result.ginet.to_cog(tmp_path / "out", like="input")
            with rasterio.open(path) as file:
                assert (file.scales, file.offsets, file.nodata) == ((1e-4,), (offset * 1e-4,), 0)
                stored = file.read(1)
        else:
            result.ginet.to_zarr(tmp_path / "out.zarr", like="input", mode="w")
            raw = xr.open_zarr(tmp_path / "out.zarr", mask_and_scale=False)[band]
            assert (raw.attrs["scale_factor"], raw.attrs["add_offset"]) == (1e-4, offset * 1e-4)
            stored = raw.values[0]
        assert stored.dtype == np.uint16
        assert_array_equal(stored, fine[i])


def test_what_a_pair_was_made_from_is_remembered(tmp_path: Path) -> None:
    fine, coarse = (
        (single_grid(bands, (n, n), pixel) * 1e4).astype("int16")
        for bands, n, pixel in ((BANDS_10M, 16, 10), (BANDS_20M, 8, 20))
    )
    cube = xr_ginet.pair(fine, coarse, scale=1e-4, offset=-0.1, nodata=-99)
    assert [cube.attrs[f"source_{k}"] for k in ("dtype", "scale_factor", "add_offset", "nodata")] == [
        "int16",
        1e-4,
        -0.1,
        -99,
    ]
    [path] = cube.ginet.superresolve(weights=None)[["B03"]].ginet.to_cog(tmp_path, like="input")
    with rasterio.open(path) as file:
        assert (file.dtypes, file.nodata) == (("int16",), -99)
        assert_array_equal(file.read(1), fine["B03"])


def test_what_exists_is_left_alone(result: xr.Dataset, tmp_path: Path) -> None:
    one = result[["B02"]].isel(time=0)
    [path] = one.ginet.to_cog(tmp_path)
    before = path.read_bytes()
    with no_compute(), pytest.raises(FileExistsError, match=r"20240501T105031_B02.tif exists, and 0 more.*overwrite"):
        one.ginet.to_cog(tmp_path)
    assert path.read_bytes() == before
    (one + 0.1).assign_attrs(one.attrs).ginet.to_cog(tmp_path, overwrite=True)
    with rasterio.open(path) as file:
        assert_allclose(file.read(1) * 1e-4 - 0.1, one["B02"].values + 0.1, rtol=0, atol=0.51e-4)


def test_a_failure_leaves_nothing_half_written(result: xr.Dataset, tmp_path: Path) -> None:
    def fail(block: np.ndarray) -> np.ndarray:
        raise OSError("the catalogue is gone")

    broken = result[["B02"]].isel(time=0)
    [path] = broken.ginet.to_cog(tmp_path)
    before = path.read_bytes()
    data = da.map_blocks(fail, broken["B02"].data, meta=np.empty((0, 0)))
    with pytest.raises(OSError, match="the catalogue is gone"):
        broken.assign(B02=broken["B02"].copy(data=data)).ginet.to_cog(tmp_path, overwrite=True)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


def test_what_cannot_be_written_is_refused(result: xr.Dataset, tmp_path: Path) -> None:
    with no_compute():
        with pytest.raises(ValueError, match=r"its bands must lie on one grid"):
            two_grids((8, 8)).ginet.to_cog(tmp_path)
        with pytest.raises(ValueError, match="no CRS, by which to place"):
            result.drop_vars("spatial_ref").ginet.to_cog(tmp_path)
        with pytest.raises(ValueError, match=r"like='input', but the cube .* does not tell of one kind"):
            result.ginet.to_cog(tmp_path, like="input")
        with pytest.raises(ValueError, match="like='output': must be 'input'"):
            result.ginet.to_zarr(tmp_path / "c.zarr", like="output")
        with pytest.raises(ValueError, match="dtype='int8': must be"):
            result.ginet.to_cog(tmp_path, dtype="int8")
        twice = xr.concat([result.isel(time=[0]), result.isel(time=[0])], "time")
        with pytest.raises(ValueError, match="less than a second apart"):
            twice.ginet.to_cog(tmp_path)
    assert not list(tmp_path.iterdir())


def test_workers_of_a_cluster_write_the_same_files(result: xr.Dataset, tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    one = result[["B02", "B05"]].isel(time=0)
    alone = one.ginet.to_cog(tmp_path / "alone")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        distributed.Client(cluster),
    ):
        together = one.ginet.to_cog(tmp_path / "together")
    for a, b in zip(alone, together, strict=True):
        with rasterio.open(a) as first, rasterio.open(b) as second:
            assert_array_equal(first.read(), second.read())


def test_overviews_are_means(tmp_path: Path) -> None:
    cube = single_grid(("B02",), (1024, 1024), 10)
    [path] = cube.ginet.to_cog(tmp_path, dtype="float32")
    with rasterio.open(path) as file:
        assert file.overviews(1) == [2]
    with rasterio.open(path, overview_level=0) as file:
        means = cube["B02"].values.reshape(512, 2, 512, 2).mean((1, 3))
        assert_allclose(file.read(1), means, rtol=1e-6)


def test_a_file_has_one_writer_and_what_it_left_is_cleared(result: xr.Dataset, tmp_path: Path) -> None:
    one = result[["B02"]].isel(time=0)
    left = [f".20240501T105031_B02.tif.{'0' * 32}{end}" for end in (".tif", ".part.tif", ".txt")]
    for name in left:
        (tmp_path / name).write_text("half")
    seen = []

    def other(block: np.ndarray) -> np.ndarray:
        if not seen:
            with pytest.raises(RuntimeError, match=r"another job is writing .*_B02\.tif"):
                one.ginet.to_cog(tmp_path)
            result[["B02"]].isel(time=1).ginet.to_cog(tmp_path)  # another date may be
            seen.append(True)
        return block

    data = da.map_blocks(other, one["B02"].data, dtype="float32", meta=np.empty((0, 0), "float32"))
    with dask.config.set(scheduler="synchronous"):
        one.assign(B02=one["B02"].copy(data=data)).ginet.to_cog(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        left[2],
        "20240501T105031_B02.tif",
        "20240506T105031_B02.tif",
    ]
