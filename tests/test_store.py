"""What is written is read back, an existing store is left alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import dask
import dask.array as da
import kills
import numpy as np
import pytest
import xarray as xr
import zarr
from conftest import no_compute, two_grids
from dask.core import get_deps
from dask.order import order
from dask.utils import key_split
from numpy.testing import assert_allclose, assert_array_equal

import xr_ginet
from xr_ginet import folders, schedulers
from xr_ginet.network import Checkpoint


@pytest.fixture
def cube(checkpoint: Checkpoint) -> xr.Dataset:
    source = two_grids((24, 20), n_times=2)
    source["B05"][1, 3, 4] = np.nan
    return source.chunk({"time": 1, "y": 32, "x": 16}).ginet.superresolve(weights=checkpoint.path, precision="float32")


@pytest.mark.parametrize("zarr_format", [3, 2])
@pytest.mark.parametrize("dtype", ["float32", "uint16"])
def test_a_cube_survives_the_round_trip(cube: xr.Dataset, tmp_path, zarr_format: int, dtype: str) -> None:
    path = tmp_path / "cube.zarr"
    cube.ginet.to_zarr(path, zarr_format=zarr_format, dtype=dtype)
    stored = xr.open_zarr(path, decode_coords="all")
    for coord in ("time", "y", "x"):
        assert_array_equal(stored[coord].values, cube[coord].values)
    assert stored.rio.crs == cube.rio.crs
    assert stored.rio.transform() == cube.rio.transform()
    assert stored["B11"].attrs["wavelength"] == 1613.7
    assert stored.attrs == cube.attrs
    raw = zarr.open(path)["B05"]
    assert raw.dtype == dtype
    assert raw.chunks == (1, 32, 16)
    for band in cube.data_vars:
        if dtype == "uint16":
            assert_allclose(stored[band].values, cube[band].clip(-0.0999, 6.4534).values, rtol=0, atol=0.51e-4)
        else:
            assert_allclose(stored[band].values, cube[band].values.astype("float32"), rtol=0, atol=0)
    assert np.isnan(stored["B05"].values[1]).sum() == 4
    assert zarr.open(path).metadata.zarr_format == zarr_format


def test_uint16_clips_beyond_its_range_and_keeps_the_sign(tmp_path) -> None:
    values = np.array([[-0.5, -0.09, 0.0], [6.4534, 8.0, np.nan]], "float32")
    ds = xr.Dataset({"B02": (("y", "x"), values)}, {"y": [15.0, 5], "x": [5.0, 15, 25]})
    ds.ginet.to_zarr(tmp_path / "c.zarr", dtype="uint16")
    assert_array_equal(zarr.open(tmp_path / "c.zarr")["B02"][:], [[1, 100, 1000], [65534, 65534, 0]])


def test_ragged_chunks_are_made_even(tmp_path) -> None:
    ds = xr.Dataset({"B02": (("y", "x"), np.arange(30.0).reshape(10, 3))}, {"y": -np.arange(10.0), "x": np.arange(3.0)})
    ds.chunk({"y": (2, 5, 3)}).ginet.to_zarr(tmp_path / "c.zarr")
    assert zarr.open(tmp_path / "c.zarr")["B02"].chunks == (5, 3)
    assert_array_equal(xr.open_zarr(tmp_path / "c.zarr")["B02"], ds["B02"])


def test_an_existing_store_is_left_alone(cube: xr.Dataset, tmp_path) -> None:
    path = tmp_path / "cube.zarr"
    small = cube.isel(y=slice(0, 8), x=slice(0, 8))
    small.ginet.to_zarr(path)
    before = xr.open_zarr(path).load()
    for mode in (None, "w-"):
        with no_compute(), pytest.raises(FileExistsError, match=r"holds a Zarr store already. Type mode='w'"):
            (small + 1).ginet.to_zarr(path, mode=mode)
    xr.testing.assert_identical(xr.open_zarr(path).load(), before)
    (small + 1).ginet.to_zarr(path, mode="w")
    assert_allclose(xr.open_zarr(path)["B02"], before["B02"] + 1, rtol=1e-6)


def test_writing_can_be_put_off_and_watched(cube: xr.Dataset, tmp_path, capsys) -> None:
    with no_compute():
        delayed = cube.ginet.to_zarr(tmp_path / "a.zarr", compute=False)
    assert np.isnan(xr.open_zarr(tmp_path / "a.zarr")["B05"].values).all()
    delayed.compute()
    assert not np.isnan(xr.open_zarr(tmp_path / "a.zarr")["B05"].values).all()
    xr_ginet.to_zarr(cube, tmp_path / "b.zarr", progress=True)
    assert "100% Completed" in capsys.readouterr().out
    xr.testing.assert_identical(xr.open_zarr(tmp_path / "a.zarr").load(), xr.open_zarr(tmp_path / "b.zarr").load())
    distributed = pytest.importorskip("distributed")
    with distributed.Client(processes=False, n_workers=1, dashboard_address=":0"):
        xr_ginet.to_zarr(cube, tmp_path / "c.zarr", progress=True)
    assert "100% Completed" in capsys.readouterr().out
    xr.testing.assert_identical(xr.open_zarr(tmp_path / "a.zarr").load(), xr.open_zarr(tmp_path / "c.zarr").load())


def blocks_held(graph: dict) -> int:
    """Return how many of the network's blocks wait for their writing at once, by the order that Dask gives a graph."""
    depends_on, dependents = get_deps(graph)
    left = {key: len(dependents[key]) for key in graph if key_split(key) == "ginet-windows"}
    assert len(left) == 16
    held, most = set(), 0
    for key in sorted(graph, key=order(graph).get):
        held |= {key} & set(left)
        for block in depends_on[key] & left.keys():
            left[block] -= 1
            held -= {block} if not left[block] else set()
        most = max(most, len(held))
    return most


@pytest.mark.parametrize("write", [xr_ginet.to_zarr, xr_ginet.to_cog, partial(xr_ginet.to_cog, stacked=True)])
def test_a_cluster_keeps_few_blocks_that_are_not_written(
    write: Callable[..., Any], tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Recorder:
        def get(self, graph: dict, key: str, sync: bool) -> Any:
            self.held = blocks_held(graph)
            return dask.get(graph, key)

        def gather(self, result: Any) -> Any:
            return result

    source = two_grids((128, 128))
    for seed, (name, band) in enumerate(source.data_vars.items()):  # each chunk is read by itself
        chunks = [size // 4 for size in band.shape]
        source[name] = band.copy(data=da.random.default_rng(seed).random(band.shape, chunks=chunks))
    cube = source.ginet.superresolve(weights="ginet-xs", depth="auto")
    write(cube, tmp_path / "local")
    client = Recorder()
    monkeypatch.setattr(schedulers, "current_client", lambda: client)
    write(cube, tmp_path / "cluster")
    assert client.held <= 5  # a row, and the next row's first
    files = [path for path in (tmp_path / "local").rglob("*") if path.is_file() and path.name != "zarr.json"]
    assert len(files) in (1, 10, 162)
    for path in files:
        assert path.read_bytes() == (tmp_path / "cluster" / path.relative_to(tmp_path / "local")).read_bytes()
    if write is xr_ginet.to_zarr:
        (delayed,) = dask.optimize(cube.ginet.to_zarr(tmp_path / "later", compute=False))
        assert blocks_held(dict(delayed.__dask_graph__())) == 16  # where tasks wait for all of a band


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"mode": "r"}, "mode='r': must be 'w'"),
        ({"dtype": "int8"}, "dtype='int8': must be 'float32' or 'uint16'"),
        ({"zarr_format": 4}, "zarr_format=4: must be 2 or 3"),
        ({"progress": True, "compute": False}, "compute=False puts it off"),
    ],
)
def test_to_zarr_refuses(cube: xr.Dataset, tmp_path, arguments: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        cube.ginet.to_zarr(tmp_path / "c.zarr", **arguments)
    assert not (tmp_path / "c.zarr").exists()


def test_nothing_but_a_zarr_store_is_ever_replaced(cube: xr.Dataset, tmp_path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    folder = tmp_path / "folder"
    for target in (folder, folder / "thesis.txt", f"file://{folder}", zarr.storage.LocalStore(folder)):
        for mode in (None, "w", "w-"):
            with pytest.raises(FileExistsError, match="exists and is no Zarr store: it is never replaced"):
                cube.ginet.to_zarr(target, mode=mode)
    assert (tmp_path / "folder" / "thesis.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    cube.ginet.to_zarr(tmp_path / "empty")


def test_a_cube_may_replace_the_store_that_it_is_read_from(tmp_path) -> None:
    path = tmp_path / "source.zarr"
    two_grids((16, 16)).chunk({"y": 16}).ginet.to_zarr(path)
    source = xr.open_zarr(path, decode_coords="all")
    expected = source["B02"].values * 2
    doubled = source.assign({b: source[b] * 2 for b in source.data_vars})
    for target in (path, f"file://{path}", zarr.storage.LocalStore(path)):
        doubled.ginet.to_zarr(target, mode="w")
        assert_allclose(xr.open_zarr(path)["B02"].values, expected)
        expected = expected * 2
    assert [p.name for p in tmp_path.iterdir()] == ["source.zarr"]
    with pytest.raises(ValueError, match=r"is replaced once the new pixels are written, but compute=False"):
        doubled.ginet.to_zarr(path, mode="w", compute=False)


def test_a_write_that_fails_leaves_the_old_store(cube: xr.Dataset, tmp_path) -> None:
    def fail(block: np.ndarray) -> np.ndarray:
        raise OSError("the disk is gone")

    small = cube.isel(y=slice(0, 8), x=slice(0, 8))
    small.ginet.to_zarr(tmp_path / "c.zarr")
    before = xr.open_zarr(tmp_path / "c.zarr").load()
    broken = small.assign(B02=small["B02"].copy(data=small["B02"].data.map_blocks(fail, dtype="float32")))
    with pytest.raises(OSError, match="the disk is gone"):
        broken.ginet.to_zarr(tmp_path / "c.zarr", mode="w")
    xr.testing.assert_identical(xr.open_zarr(tmp_path / "c.zarr").load(), before)
    assert [p.name for p in tmp_path.iterdir()] == ["c.zarr"]


def test_only_bands_are_packed(cube: xr.Dataset, tmp_path) -> None:
    extra = cube.assign(sun_zenith=cube["B02"] * 0 + 35, SCL=(cube["B02"] * 0 + 4).astype("uint8"))
    extra.ginet.to_zarr(tmp_path / "c.zarr", dtype="uint16")
    stored = xr.open_zarr(tmp_path / "c.zarr", decode_coords="all")
    assert float(stored["sun_zenith"].max()) == 35
    assert stored["SCL"].rio.crs.to_epsg() == 32630


def test_a_crs_under_another_name_is_kept(checkpoint: Checkpoint, tmp_path) -> None:
    source = two_grids((16, 16)).drop_vars("spatial_ref").rio.write_crs("EPSG:32630", grid_mapping_name="crs").chunk()
    result = source.ginet.superresolve(weights=checkpoint.path)
    assert result.rio.crs.to_epsg() == result["B05"].rio.crs.to_epsg() == 32630
    result.ginet.to_zarr(tmp_path / "c.zarr")
    assert xr.open_zarr(tmp_path / "c.zarr", decode_coords="all")["B05"].rio.crs.to_epsg() == 32630


def test_a_two_grid_cube_survives_the_round_trip_and_serves_again(checkpoint: Checkpoint, tmp_path) -> None:
    source = two_grids((24, 20), n_times=2).astype("float32").chunk({"time": 1, "y": 16, "y_20m": 10})
    source.ginet.to_zarr(tmp_path / "two.zarr", dtype="float32")
    stored = xr.open_zarr(tmp_path / "two.zarr", decode_coords="all")
    result, expected = (ds.ginet.superresolve(weights=checkpoint.path) for ds in (stored, source))
    xr.testing.assert_allclose(result.compute(), expected.compute())
    assert result.rio.crs.to_epsg() == 32630
    # Nothing of the first store's encoding or of the 10 m bands' attributes sticks to the result.
    assert not result["B05"].encoding.keys() - {"grid_mapping"}
    noted = source.assign(B02=source["B02"].assign_attrs(common_name="blue"))
    assert "common_name" not in noted.ginet.superresolve(weights=checkpoint.path)["B11"].attrs


def test_a_cut_cube_is_placed_where_it_was_cut(cube: xr.Dataset, tmp_path) -> None:
    cut = cube.isel(y=slice(4, 20), x=slice(6, 30))
    cut.ginet.to_zarr(tmp_path / "cut.zarr")
    stored = xr.open_zarr(tmp_path / "cut.zarr", decode_coords="all")
    assert stored["spatial_ref"].attrs["GeoTransform"] == "742980.0 10.0 0.0 4848560.0 0.0 -10.0"
    assert stored["y"].attrs["transform"] == [10, 0, 742_980, 0, -10, 4_848_560]
    assert cube["y"].attrs["transform"] == [10, 0, 742_920, 0, -10, 4_848_600]


def test_bands_chunked_differently_are_written_alike(checkpoint: Checkpoint, tmp_path) -> None:
    source = two_grids((24, 20)).chunk({"y": 16})
    source["B03"] = source["B03"].chunk({"y": 11})
    result = source.ginet.superresolve(weights=checkpoint.path)
    result.ginet.to_zarr(tmp_path / "c.zarr")
    assert {zarr.open(tmp_path / "c.zarr")[b].chunks for b in ("B02", "B03", "B05")} == {(16, 40)}
    whole = two_grids((24, 20)).chunk().ginet.superresolve(weights=checkpoint.path)
    assert_allclose(xr.open_zarr(tmp_path / "c.zarr")["B05"], whole["B05"].compute(), atol=1e-5)


def test_an_attribute_that_cannot_be_stored_is_refused_before_anything_is_written(cube: xr.Dataset, tmp_path) -> None:
    cube["B02"].attrs["made"] = object()
    with pytest.raises(ValueError, match="the attribute 'made' of B02 is a object, which Zarr cannot store"):
        cube.ginet.to_zarr(tmp_path / "c.zarr")
    assert not (tmp_path / "c.zarr").exists()


def test_memory_of_this_process_is_refused_where_others_compute(cube: xr.Dataset) -> None:
    distributed = pytest.importorskip("distributed")
    small = cube.isel(y=slice(0, 8), x=slice(0, 8))
    store = zarr.storage.MemoryStore()
    with distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster:
        with distributed.Client(cluster), pytest.raises(ValueError, match="lies in this process's memory"):
            small.ginet.to_zarr(store)
    small.ginet.to_zarr(store)
    assert not xr.open_zarr(store)["B02"].isnull().any()


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("level", [1, 19])
def test_pixels_are_compressed_as_much_as_asked_for(zarr_format: int, level: int, tmp_path) -> None:
    kills.cube(1).ginet.to_zarr(tmp_path / "c.zarr", zarr_format=zarr_format, compression_level=level)
    [compressor] = zarr.open_array(tmp_path / "c.zarr", path="B02").compressors
    assert compressor.level == level


def test_a_store_is_replaced_where_folders_cannot_be_exchanged(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.zarr"
    kills.cube(2).ginet.to_zarr(path)
    monkeypatch.setattr(folders, "_swapped", lambda one, other: False)
    kills.cube(3).ginet.to_zarr(path, mode="w")
    assert xr.open_zarr(path).sizes["time"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["c.zarr"]
    path.rename(tmp_path / f"c.zarr.{'0' * 32}.old")  # a job was killed between the two renames
    (tmp_path / f"c.zarr.{'1' * 32}").mkdir()
    with pytest.raises(FileExistsError, match="holds a Zarr store already"):
        kills.cube(1).ginet.to_zarr(path)
    assert xr.open_zarr(path).sizes["time"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["c.zarr"]


def test_what_cannot_be_exchanged_is_refused_before_anything_is_computed(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kills.cube(2).ginet.to_zarr(tmp_path / "c.zarr")
    monkeypatch.setattr("pathlib.Path.is_mount", lambda self: self.name == "c.zarr")
    with no_compute(), pytest.raises(ValueError, match=r"is a file system of its own.*Name a folder within it"):
        kills.cube(3).ginet.to_zarr(tmp_path / "c.zarr", mode="w")
    assert xr.open_zarr(tmp_path / "c.zarr").sizes["time"] == 2


def test_a_link_stays_a_link(tmp_path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "c.zarr").symlink_to(tmp_path / "far" / "real.zarr")
    for n in (2, 3):
        kills.cube(n).ginet.to_zarr(tmp_path / "c.zarr", mode="w")
        assert xr.open_zarr(tmp_path / "far" / "real.zarr").sizes["time"] == n
    assert (tmp_path / "c.zarr").is_symlink()
    assert [p.name for p in (tmp_path / "far").iterdir()] == ["real.zarr"]
