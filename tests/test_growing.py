"""Cubes that grow: interrupted, killed, appended to, overwritten; what is complete is right to the bit."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import dask.array as da
import numpy as np
import pytest
import xarray as xr
import zarr
from conftest import no_compute, two_grids
from distributed import Client, LocalCluster

import xr_ginet
from xr_ginet.growing import CHECKSUM, Outcome, PartialFailure
from xr_ginet.network import Checkpoint


@pytest.fixture(scope="module")
def cube(checkpoint: Checkpoint) -> xr.Dataset:
    """Return four super-resolved dates, lazy, of ragged chunks."""
    native = two_grids((20, 14), n_times=4).chunk({"time": 2, "y": 24, "x": 16})
    return native.assign_attrs(source_items=list("abcd")).ginet.superresolve(weights=checkpoint)


@pytest.fixture(scope="module")
def whole(cube: xr.Dataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the files of a store that was written without interruption."""
    path = tmp_path_factory.mktemp("whole") / "cube.zarr"
    cube.ginet.to_zarr(path, resume=True)
    return files(path)


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def pixels(content: dict[str, bytes]) -> dict[str, bytes]:
    """Return the files of bands and records: those of times and metadata tell how a store has grown."""
    return {name: data for name, data in content.items() if "/c/" in name and not name.startswith("time/")}


GONE = OSError("https://me:secret@blobs.example/B11.tif?sig=secret is gone")


def failing(cube: xr.Dataset, date: int, error: BaseException = GONE) -> xr.Dataset:
    """Return a cube one of whose dates cannot be computed."""

    def fail(block: np.ndarray, block_id: tuple[int, ...]) -> np.ndarray:
        if block_id[0] == date:
            raise error
        return block

    chunked = cube.chunk(time=1)
    data = da.map_blocks(fail, chunked["B11"].data, dtype="float32", meta=np.empty((0,) * 3, "float32"))
    return chunked.assign(B11=chunked["B11"].copy(data=data))


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("dtype", ["float32", "uint16"])
def test_date_by_date_gives_the_same_cube(cube: xr.Dataset, tmp_path: Path, zarr_format: int, dtype: str) -> None:
    for name, options in (("at_once", {}), ("by_date", {"resume": True})):
        cube.ginet.to_zarr(tmp_path / name, dtype=dtype, zarr_format=zarr_format, **options)
    at_once, by_date = (xr.open_zarr(tmp_path / name, decode_coords="all") for name in ("at_once", "by_date"))
    xr.testing.assert_identical(by_date.drop_vars(CHECKSUM).load(), at_once.load())
    assert xr_ginet.status(tmp_path / "by_date").values.tolist() == [True] * 4
    assert xr_ginet.status(tmp_path / "by_date", verify=True).values.tolist() == [True] * 4


def test_an_interrupted_job_goes_on_and_ends_at_the_same_bits(cube: xr.Dataset, whole: dict, tmp_path: Path) -> None:
    path = tmp_path / "cube.zarr"
    with pytest.raises(KeyboardInterrupt):
        failing(cube, 2, KeyboardInterrupt()).ginet.to_zarr(path, resume=True)
    assert xr_ginet.status(path, verify=True).values.tolist() == [True, True, False, False]
    with xr.open_zarr(path) as stored:
        xr.testing.assert_equal(stored["B11"][:2].load(), cube["B11"][:2].astype("float32").load())
    with pytest.raises(KeyboardInterrupt):
        failing(cube, 3, KeyboardInterrupt()).ginet.to_zarr(path, resume=True)
    assert xr_ginet.status(path).values.tolist() == [True, True, True, False]
    failing(cube, 0).ginet.to_zarr(path, resume=True)  # the first date is not computed again
    assert files(path) == whole
    with no_network():
        cube.ginet.to_zarr(path, resume=True)
    assert files(path) == whole


def test_a_chunk_becomes_one_shard_of_small_chunks(cube: xr.Dataset, tmp_path: Path) -> None:
    small, plain, dtype = tmp_path / "small.zarr", tmp_path / "plain.zarr", "uint16"
    regular = cube[["B02", "B05"]].isel(time=slice(2)).chunk(time=1, y=24, x=16)
    regular.isel(time=slice(1)).ginet.to_zarr(small, mode="a", inner_chunks=8, dtype=dtype)
    regular.ginet.to_zarr(small, mode="a", inner_chunks=8, dtype=dtype)
    regular.ginet.to_zarr(plain, resume=True, dtype=dtype)
    array = zarr.open_array(small, path="B05", mode="r")
    assert (array.chunks, array.shards) == ((1, 8, 8), (1, 24, 16))
    assert len(list((small / "B05" / "c").rglob("*"))) == len(list((plain / "B05" / "c").rglob("*")))
    stored = [xr.open_zarr(path).drop_vars(CHECKSUM).load() for path in (small, plain)]
    xr.testing.assert_equal(*stored)
    assert xr_ginet.status(small, verify=True).all()
    at_once = tmp_path / "at_once.zarr"
    regular.ginet.to_zarr(at_once, inner_chunks=8, dtype=dtype)
    xr.testing.assert_equal(xr.open_zarr(at_once).load(), stored[1])
    with pytest.raises(ValueError, match=r"shards of B02 \(1, 24, 16\), now None|chunks of B02"):
        regular.ginet.to_zarr(small, mode="a", dtype=dtype)
    for options, match in (
        ({"inner_chunks": 7}, r"inner_chunks=7 does not divide the cube's chunks \(1, 24, 16\)"),
        ({"inner_chunks": 8, "zarr_format": 2}, "shards are of Zarr version 3"),
    ):
        with pytest.raises(ValueError, match=match):
            regular.ginet.to_zarr(tmp_path / "none.zarr", **options)


@contextmanager
def no_network() -> Iterator[None]:
    """Fail where the network runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xr_ginet.mapping.predictor.Predictor.__call__", lambda *_: 1 / 0)
        yield


def test_a_date_that_fails_is_told_and_the_others_are_written(
    cube: xr.Dataset, whole: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "cube.zarr"
    told: list[Outcome] = []
    with (
        caplog.at_level(logging.INFO, "xr_ginet"),
        pytest.raises(
            PartialFailure, match=r"1 of 4 dates .*cube.zarr .*2024-05-06T10:50:31: OSError: .* again"
        ) as failure,
    ):
        failing(cube, 1).ginet.to_zarr(path, resume=True, tell=told.append)
    assert [outcome.state for outcome in told] == ["written", "failed", "written", "written"]
    copied = pickle.loads(pickle.dumps(failure.value))
    assert (str(copied), copied.outcomes) == (str(failure.value), told)
    assert told[1].error == "OSError: https://blobs.example/B11.tif is gone"
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING", "INFO", "INFO"]
    assert "4/4 2024-05-16T10:50:31 written" in caplog.text
    assert "secret" not in caplog.text
    assert xr_ginet.status(path, verify=True).values.tolist() == [True, False, True, True]
    told.clear()
    cube.ginet.to_zarr(path, resume=True, tell=told.append)
    assert [outcome.state for outcome in told] == ["kept", "written", "kept", "kept"]
    assert files(path) == whole


def test_a_full_disk_stops_the_job_and_its_complete_dates_stay(cube: xr.Dataset, whole: dict, tmp_path: Path) -> None:
    path = tmp_path / "cube.zarr"
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="No space left"):
        failing(cube, 1, full).ginet.to_zarr(path, resume=True)
    assert xr_ginet.status(path, verify=True).values.tolist() == [True, False, False, False]
    cube.ginet.to_zarr(path, resume=True)
    assert files(path) == whole


def test_a_cube_without_time_resumes_as_a_whole(cube: xr.Dataset, tmp_path: Path) -> None:
    one = cube.isel(time=0, drop=True)
    path = tmp_path / "one.zarr"
    one.ginet.to_zarr(path, resume=True)
    assert xr_ginet.status(path, verify=True).item() is True
    xr.testing.assert_equal(xr.open_zarr(path)["B11"].load(), one["B11"].astype("float32").load())
    with no_network():
        one.ginet.to_zarr(path, resume=True)


def test_what_belongs_to_no_date_is_written_too(tmp_path: Path) -> None:
    times = np.datetime64("2024-05-01", "ns") + np.arange(2) * np.timedelta64(5, "D")
    coords = {"time": times, "y": -10.0 * np.arange(4), "x": 10.0 * np.arange(6)}
    rng = np.random.default_rng(0)
    lazy = {name: da.from_array(rng.random((2, 4, 6)[-n:]), chunks=2) for name, n in (("B02", 3), ("height", 2))}
    cube = xr.Dataset({"B02": (("time", "y", "x"), lazy["B02"]), "height": (("y", "x"), lazy["height"])}, coords)
    cube = cube.assign_coords(sun=(("time", "y", "x"), lazy["B02"] * 90))
    cube.ginet.to_zarr(tmp_path / "cube.zarr", resume=True)
    stored = xr.open_zarr(tmp_path / "cube.zarr")
    for name, atol in (("B02", 1e-7), ("height", 1e-7), ("sun", 1e-5)):
        np.testing.assert_allclose(stored[name], cube[name], rtol=0, atol=atol)
    assert xr_ginet.status(tmp_path / "cube.zarr", verify=True).all()


def test_a_date_that_rotted_is_found_by_its_checksum(cube: xr.Dataset, tmp_path: Path) -> None:
    path = tmp_path / "cube.zarr"
    cube.ginet.to_zarr(path, resume=True)
    array = zarr.open_array(path, path="B06", mode="r+")
    array[1, 3, 5] = array[1, 3, 5] + np.float32(1e-6)
    assert xr_ginet.status(path).values.tolist() == [True] * 4
    assert xr_ginet.status(path, verify=True).values.tolist() == [True, False, True, True]


def test_dates_are_appended_and_written_anew(cube: xr.Dataset, whole: dict, tmp_path: Path) -> None:
    path = tmp_path / "cube.zarr"
    first = cube.isel(time=slice(2)).assign_attrs(source_items=["a", "b"])
    (first + 0).assign_attrs(first.attrs).ginet.to_zarr(path, mode="a")
    later = cube.isel(time=slice(1, 4)).assign_attrs(source_items=["b", "c", "d"])
    changed = later.copy()
    changed["B02"] = later["B02"] + 0.5
    changed.ginet.to_zarr(path, mode="a")
    with xr.open_zarr(path, decode_coords="all") as stored:
        assert stored.sizes["time"] == 4
        assert stored.attrs["source_items"] == ["a", "b", "c", "d"]
        expected = cube["B02"].values + np.array([0, 0.5, 0.5, 0.5])[:, None, None]
        np.testing.assert_allclose(stored["B02"], expected, rtol=1e-6)
    with no_network():
        later.ginet.to_zarr(path, mode="a", resume=True)  # complete dates stay as they are
    later.ginet.to_zarr(path, mode="a")
    assert xr_ginet.status(path, verify=True).values.all()
    assert pixels(files(path)) == pixels(whole)


def test_an_overwritten_date_is_in_doubt_until_it_is_complete(cube: xr.Dataset, tmp_path: Path) -> None:
    path = tmp_path / "cube.zarr"
    cube.ginet.to_zarr(path, resume=True)
    with pytest.raises(KeyboardInterrupt):
        failing(cube, 1, KeyboardInterrupt()).isel(time=slice(1, 3)).ginet.to_zarr(path, mode="a")
    assert xr_ginet.status(path).values.tolist() == [True, False, False, True]


def test_room_that_was_half_made_is_taken_back(cube: xr.Dataset, whole: dict, tmp_path: Path) -> None:
    path = tmp_path / "cube.zarr"
    cube.isel(time=slice(3)).ginet.to_zarr(path, mode="a")
    group = zarr.open_group(path, mode="r+", use_consolidated=False)
    for name in ("B02", "B05", "time"):
        group[name].resize((4, *group[name].shape[1:]))
    cube.isel(time=slice(3)).ginet.to_zarr(path, mode="a", resume=True)
    assert {group[name].shape[0] for name in ("B02", "B11", "time", CHECKSUM)} == {3}
    cube.ginet.to_zarr(path, mode="a", resume=True)
    assert pixels(files(path)) == pixels(whole)


def test_what_was_made_differently_is_refused(cube: xr.Dataset, tmp_path: Path) -> None:
    path = tmp_path / "cube.zarr"
    cube.isel(time=slice(1, 3)).ginet.to_zarr(path, resume=True)
    before = files(path)
    two = cube.isel(time=slice(1, 3))
    cases = [
        (two.assign_attrs(ginet_weights_sha256="0"), {"resume": True}, r"ginet_weights_sha256 '.*', now '0'"),
        (two.assign_attrs(ginet_depth=2), {"mode": "a"}, "ginet_depth 30, now 2"),
        (two.assign_attrs(source_items=["z"]), {"resume": True}, r"source_items \['a'.*now \['z'\]"),
        (two.drop_vars("B05"), {"resume": True}, "bands B02, .*B05.*, now"),
        (two, {"resume": True, "dtype": "uint16"}, "dtype of B02 float32, now uint16"),
        (two.chunk(x=8), {"mode": "a"}, r"chunks of B02 \(1, 24, 16\), now \(1, 24, 8\)"),
        (two.assign_coords(x=two["x"] + 10), {"mode": "a"}, r"x 28 from .*, now 28 from"),
        (two.rio.write_crs(32631), {"mode": "a"}, "crs EPSG:32630, now EPSG:32631"),
        (cube, {"resume": True}, r"time 2 from .*, now 4 from"),
        (two.isel(time=0, drop=True), {"mode": "a"}, "mode='a' appends dates, and the cube has no dimension 'time'"),
    ]
    for other, options, match in cases:
        with no_network(), pytest.raises(ValueError, match=match):
            other.ginet.to_zarr(path, **options)
    assert files(path) == before
    two.ginet.to_zarr(tmp_path / "plain.zarr")
    for call in (
        lambda: two.ginet.to_zarr(tmp_path / "plain.zarr", resume=True),
        lambda: xr_ginet.status(tmp_path / "plain.zarr"),
    ):
        with pytest.raises(ValueError, match="has no ginet_checksum: it was not written with resume=True"):
            call()
    for options in ({"mode": "w", "resume": True}, {"mode": "a", "compute": False}):
        with no_compute(), pytest.raises(ValueError, match="either grows now, or is replaced"):
            two.ginet.to_zarr(tmp_path / "other.zarr", **options)


def test_a_second_job_on_one_store_is_refused(cube: xr.Dataset, tmp_path: Path) -> None:
    two = cube.isel(time=slice(2))
    path = tmp_path / "cube.zarr"
    seen = []

    def second(block: np.ndarray) -> np.ndarray:
        if not seen:  # while the first job is writing
            with pytest.raises(RuntimeError, match=r"another job is writing .*cube.zarr"):
                two.ginet.to_zarr(path, resume=True)
            seen.append(True)
        return block

    data = da.map_blocks(second, two["B02"].data, dtype="float32", meta=np.empty((0,) * 3, "float32"))
    two.assign(B02=two["B02"].copy(data=data)).ginet.to_zarr(path, resume=True)
    assert seen
    two.ginet.to_zarr(path, mode="a")


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize(
    "target", [zarr.storage.MemoryStore, lambda: f"memory://{uuid4().hex}.zarr"], ids=["store", "url"]
)
def test_cubes_grow_in_any_store(target: Callable[[], Any], zarr_format: int) -> None:
    times = np.datetime64("2024-05-01", "ns") + np.arange(3) * np.timedelta64(5, "D")
    coords = {"time": times, "y": -10.0 * np.arange(20), "x": 10.0 * np.arange(30)}
    values = np.random.default_rng(0).random((3, 20, 30), "float32")
    cube = xr.Dataset({"B02": (("time", "y", "x"), values)}, coords).chunk(x=16)
    place = target()
    cube.isel(time=slice(2)).ginet.to_zarr(place, mode="a", zarr_format=zarr_format)
    cube.ginet.to_zarr(place, mode="a", resume=True, zarr_format=zarr_format)
    assert xr_ginet.status(place, verify=True).values.tolist() == [True] * 3
    np.testing.assert_array_equal(xr.open_zarr(place)["B02"], values)


def test_a_worker_killed_in_the_middle_of_a_date_costs_nothing(cube: xr.Dataset, whole: dict, tmp_path: Path) -> None:
    killed = []

    def kill(block: np.ndarray, block_id: tuple[int, ...], mark: Path) -> np.ndarray:
        if block_id[:2] == (1, 0) and not mark.exists():  # the worker that computes the second date, once
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return block

    dates = cube.chunk(time=1)
    data = dates["B11"].data.map_blocks(kill, dtype="float32", mark=tmp_path / "killed")
    deadly = dates.assign(B11=dates["B11"].copy(data=data))
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster, Client(cluster):
        deadly.ginet.to_zarr(tmp_path / "cube.zarr", resume=True, tell=killed.append)
    assert (tmp_path / "killed").exists()
    assert [outcome.state for outcome in killed] == ["written"] * 4
    assert pixels(files(tmp_path / "cube.zarr")) == pixels(whole)
    assert xr_ginet.status(tmp_path / "cube.zarr", verify=True).all()


KILLED = """
import itertools, os, signal, sys
import dask, dask.array as da, numpy as np, xarray as xr, xr_ginet

path, last, n = sys.argv[1], int(sys.argv[2]), 6
computed = itertools.count(1)

def deadly(block):
    if next(computed) == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return block

def blocks(values):
    return da.from_array(values, chunks=(1, 16, 16)).map_blocks(deadly, meta=values[:0])

values = np.random.default_rng(0).random((n, 32, 48))
coords = {"time": np.datetime64("2024-05-01", "ns") + np.arange(n) * np.timedelta64(5, "D"),
          "y": -10.0 * np.arange(32), "x": 10.0 * np.arange(48)}
bands = {"B02": blocks(values), "B05": blocks(values[::-1])}
cube = xr.Dataset({name: (("time", "y", "x"), data) for name, data in bands.items()}, coords)
with dask.config.set(num_workers=2):
    cube.ginet.to_zarr(path, resume=True)
"""


@pytest.mark.slow  # forty processes
def test_a_job_killed_at_twenty_moments_ends_at_the_same_bits(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(KILLED)

    def job(name: str, last: int = 0) -> int:
        return subprocess.run([sys.executable, str(script), str(tmp_path / name), str(last)], check=False).returncode

    assert job("whole.zarr") == 0
    expected, known = files(tmp_path / "whole.zarr"), []
    for last in np.linspace(1, 72, 20).astype(int):  # of six dates of twelve blocks
        path = tmp_path / f"{last}.zarr"
        assert job(path.name, last) == -signal.SIGKILL
        complete = xr_ginet.status(path, verify=True)
        assert complete.equals(xr_ginet.status(path))
        known.append(int(complete.sum()))
        with xr.open_zarr(path) as stored, xr.open_zarr(tmp_path / "whole.zarr") as truth:
            assert stored.sizes["time"] in (complete.sum(), complete.sum() - 1)  # recorded, but not shown yet
            xr.testing.assert_equal(stored["B02"].load(), truth["B02"][: stored.sizes["time"]].load())
        assert job(path.name) == 0
        assert files(path) == expected
    assert len(set(known)) > 2
