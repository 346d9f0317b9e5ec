"""Cubes that grow: interrupted, killed, appended to, overwritten; what is complete is right to the bit."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any
from uuid import uuid4

import dask
import dask.array as da
import numpy as np
import pytest
import xarray as xr
import zarr
from conftest import no_compute, two_grids
from distributed import Client, LocalCluster
from zarr.storage import WrapperStore

import xr_ginet
from xr_ginet import digests, transactions
from xr_ginet.growing import CHECKSUM, Outcome, PartialFailure, no_room
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


def tiny(n_times: int, *, seed: int = 0, bands: tuple[str, ...] = ("B02", "B05")) -> xr.Dataset:
    """Return a cube of some hundred bytes, lazy."""
    rng = np.random.default_rng(seed)
    times = np.datetime64("2024-05-01", "ns") + np.arange(n_times) * np.timedelta64(5, "D")
    coords = {"time": times, "y": -10.0 * np.arange(4), "x": 10.0 * np.arange(4)}
    data = {band: rng.random((6, 4, 4), "float32")[:n_times] for band in bands}
    return xr.Dataset({b: (("time", "y", "x"), da.from_array(v, (1, 2, 4))) for b, v in data.items()}, coords)


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("kind", ["folder", "memory"])
def test_readers_see_no_part_of_a_date(kind: str, zarr_format: int, tmp_path: Path) -> None:
    target = tmp_path / "cube.zarr" if kind == "folder" else zarr.storage.MemoryStore()
    seen = []

    def look(block: np.ndarray) -> np.ndarray:
        with xr.open_zarr(target) as stored:
            seen.append(stored.sizes["time"])
            assert stored["B02"].notnull().all()
        return block

    def watched(cube: xr.Dataset) -> xr.Dataset:
        data = da.map_blocks(look, cube["B05"].data, dtype="float32", meta=np.empty((0,) * 3, "float32"))
        return cube.assign(B05=cube["B05"].copy(data=data))

    with dask.config.set(scheduler="synchronous"):
        watched(tiny(2)).ginet.to_zarr(target, mode="a", zarr_format=zarr_format)
        assert seen == [0, 0, 1, 1]
        watched(tiny(3)).ginet.to_zarr(target, mode="a", resume=True, zarr_format=zarr_format)
        assert seen[4:] == [2, 2]
        watched(tiny(2, seed=1).isel(time=[1])).ginet.to_zarr(target, mode="a", zarr_format=zarr_format)
        assert seen[6:] == [1, 1]
    stored = xr.open_zarr(target).load()
    np.testing.assert_array_equal(stored["B05"], [*tiny(1)["B05"], tiny(2, seed=1)["B05"][1], tiny(3)["B05"][2]])


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_what_was_written_of_a_date_that_failed_is_taken_back(zarr_format: int, tmp_path: Path) -> None:
    def fail(block: np.ndarray, block_id: tuple[int, ...]) -> np.ndarray:
        if block_id[:2] == (1, 1):
            raise OSError("gone")
        return block

    cube, targets = tiny(3), (tmp_path / "cube.zarr", zarr.storage.MemoryStore())
    data = da.map_blocks(fail, cube["B05"].data, dtype="float32", meta=np.empty((0,) * 3, "float32"))
    for target in targets:
        with dask.config.set(scheduler="synchronous"), pytest.raises(PartialFailure, match="1 of 3 dates"):
            cube.assign(B05=cube["B05"].copy(data=data)).ginet.to_zarr(target, resume=True, zarr_format=zarr_format)
        stored = xr.open_zarr(target).load()
        assert stored["B02"].notnull().all(("y", "x")).values.tolist() == [True, False, True]
        assert stored.isel(time=1)[["B02", "B05"]].isnull().all().to_array().all()
        cube.ginet.to_zarr(target, resume=True, zarr_format=zarr_format)
        xr.testing.assert_equal(xr.open_zarr(target)[["B02", "B05"]].load(), cube.compute())


def test_a_task_that_comes_late_writes_nothing_of_a_date_that_failed(tmp_path: Path) -> None:
    """Dask raises the first error while other threads go on: what they write would be part of a date."""
    begun, failed, cube = threading.Event(), threading.Event(), tiny(2)

    def block(values: np.ndarray, block_id: tuple[int, ...]) -> np.ndarray:
        if block_id[:2] == (0, 0):
            assert begun.wait(60)
            raise OSError("gone")
        if block_id[:2] == (0, 1):
            begun.set()
            assert failed.wait(60)
        return values

    data = da.map_blocks(block, cube["B02"].data, dtype="float32", meta=np.empty((0,) * 3, "float32"))
    late: list[Any] = []
    put = transactions._put

    @wraps(put)
    def told(*arguments: Any, **options: Any) -> Any:
        try:
            return put(*arguments, **options)
        except RuntimeError as error:
            late.append(error)
            raise

    def tell(outcome: Outcome) -> None:
        if outcome.state == "failed":
            failed.set()
            while not late:  # or the test never ends
                time.sleep(0.01)

    with pytest.MonkeyPatch.context() as patch, dask.config.set(scheduler="threads", num_workers=4):
        patch.setattr(transactions, "_put", told)
        with pytest.raises(PartialFailure):
            cube.assign(B02=cube["B02"].copy(data=data)).ginet.to_zarr(tmp_path / "c.zarr", resume=True, tell=tell)
    assert "has failed" in str(late[0])
    assert xr.open_zarr(tmp_path / "c.zarr").isel(time=0)["B02"].isnull().all()


class Forgetful(WrapperStore):
    """A store that loses what is written under some keys."""

    async def set(self, key: str, value: Any) -> None:
        if "B05" not in key or "json" in key:
            await super().set(key, value)


def test_writes_that_are_lost_are_not_certified() -> None:
    memory = zarr.storage.MemoryStore()
    with pytest.raises(PartialFailure, match=r"2 of 2 dates .*OSError: .* not give back .*: 2 of 2 blocks of B05"):
        tiny(2).ginet.to_zarr(Forgetful(memory), resume=True)
    assert not xr_ginet.status(memory).any()
    assert xr.open_zarr(memory).sizes["time"] == 0
    plain = zarr.storage.MemoryStore()
    with pytest.raises(OSError, match="does not give back what was written: 4 of 4 blocks of B05 differ"):
        tiny(2).ginet.to_zarr(Forgetful(plain))
    with pytest.raises(FileNotFoundError):
        xr.open_zarr(plain)
    for wrapped in (zarr.storage.LoggingStore(memory), zarr.storage.WrapperStore(memory), f"memory://{uuid4().hex}"):
        with dask.config.set(scheduler="processes"), pytest.raises(ValueError, match="lies in this process's memory"):
            tiny(2).ginet.to_zarr(wrapped, resume=True)


def test_a_record_covers_all_that_is_stored_of_a_date(tmp_path: Path) -> None:
    native = two_grids((4, 6), n_times=2).chunk(time=1).assign_coords(sun=("time", [30.0, 40.0]))
    native = native.assign(height=(("y", "x"), np.ones((8, 12))), cover=("time", [0.5, 0.25]))
    native = native.assign_coords(item=("time", np.array(["a", "b"], object)))
    path = tmp_path / "cube.zarr"
    native.ginet.to_zarr(path, resume=True)
    assert xr_ginet.status(path, verify=True).values.tolist() == [True, True]
    before = files(path)
    for name in ("B02", "B05", "time", "sun", "cover", "item", "x_20m", "y", "height"):
        array = zarr.open_array(path, path=name, mode="r+")
        at = (1,) + (0,) * (array.ndim - 1)
        array[at] = "z" if name == "item" else array[at] + 1
        dated = name not in ("x_20m", "y", "height")
        assert xr_ginet.status(path, verify=True).values.tolist() == [dated, False], name
        for key, content in before.items():
            (path / key).write_bytes(content)
    swapped = {key: before[key.replace("B03", "B_").replace("B02", "B03").replace("B_", "B02")] for key in before}
    for key, content in swapped.items():
        (path / key).write_bytes(content)
    assert xr_ginet.status(path, verify=True).values.tolist() == [False, False]


def test_no_digest_depends_on_how_missing_or_nothing_is_written() -> None:
    odd = np.array([0x7FC00001, 0xFFC00000, 0x80000000], "uint32").view("float32")
    assert digests.digest(odd) == digests.digest(np.array([np.nan, np.nan, 0], "float32"))
    assert digests.digest(odd) != digests.digest(np.array([np.nan, np.nan, 1e-45], "float32"))
    assert digests.digest(np.array(["ab", "c"], object)) != digests.digest(np.array(["a", "bc"], object))
    big = np.arange(3, dtype=">u2")
    assert digests.digest(big) == digests.digest(big.astype("<u2"))


def test_a_checksum_is_never_that_of_a_date_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Zero:
        def update(self, data: bytes) -> None: ...

        def digest(self) -> bytes:
            return bytes(8)

    monkeypatch.setattr(digests, "blake2b", lambda **options: Zero())
    assert digests.total({"B02": np.zeros(2, "<u8")}) == 1


def of_the_first_rule(path: Path) -> None:
    """Make the records of a store what they were before they covered all of a date."""
    metadata = json.loads((path / CHECKSUM / "zarr.json").read_text())
    metadata["attributes"].pop("version", None)
    (path / CHECKSUM / "zarr.json").write_text(json.dumps(metadata))
    records = zarr.open_array(path, path=CHECKSUM, mode="r+")
    for i in range(records.shape[0]):
        total = hashlib.blake2b(digest_size=8)
        for name in ("B02", "B05"):
            raw = zarr.open_array(path, path=name, mode="r")[i : i + 1]
            blocks = [raw[:, y : y + 2] for y in (0, 2)]
            total.update(name.encode())
            total.update(b"".join(hashlib.blake2b(b.tobytes(), digest_size=8).digest() for b in blocks))
        records[i] = int.from_bytes(total.digest(), "little")


def test_a_store_of_an_older_version_is_verified_and_grows_by_its_rule(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, cube = tmp_path / "cube.zarr", tiny(3).assign_attrs(ginet_version="2")
    cube.isel(time=slice(2)).assign_attrs(ginet_version="1").ginet.to_zarr(path, resume=True)
    of_the_first_rule(path)
    assert xr_ginet.status(path, verify=True).values.tolist() == [True, True]
    with caplog.at_level("INFO"):
        cube.ginet.to_zarr(path, mode="a", resume=True)
    assert "was begun with ginet_version 1, and goes on with 2" in caplog.text
    assert xr_ginet.status(path, verify=True).values.tolist() == [True, True, True]
    known = zarr.open_array(path, path=CHECKSUM, mode="r")[:]
    of_the_first_rule(path)
    np.testing.assert_array_equal(zarr.open_array(path, path=CHECKSUM, mode="r")[:], known)
    zarr.open_array(path, path="B05", mode="r+")[2, 0, 0] = 7
    assert xr_ginet.status(path, verify=True).values.tolist() == [True, True, False]


def test_two_dates_of_one_time_and_times_that_are_missing_are_refused(tmp_path: Path) -> None:
    times = tiny(3)["time"].values
    for changed, match in (
        (times[[0, 1, 1]], r"2 steps have the time 2024-05-06.*one place in a cube.*groupby='solar_day'"),
        (np.array([times[0], "NaT", times[2]], "datetime64[ns]"), r"1 of 3 times are missing \(NaT\)"),
    ):
        for options in ({"resume": True}, {"mode": "a"}):
            with no_compute(), pytest.raises(ValueError, match=match):
                tiny(3).assign_coords(time=changed).ginet.to_zarr(tmp_path / "cube.zarr", **options)
    assert not list(tmp_path.iterdir())


def test_scale_and_offset_of_a_store_are_kept_to(tmp_path: Path) -> None:
    for scale, offset, match in ((1e-4, 0.0, "add_offset of B02 -0.1, now 0.0"), (2e-4, -0.1, "scale_factor of B02")):
        source = {"dtype": "uint16", "scale_factor": scale, "add_offset": offset, "nodata": 0}
        cube = tiny(1).assign_attrs({f"source_{key}": value for key, value in source.items()})
        cube.ginet.to_zarr(tmp_path / f"{scale}.zarr", resume=True, dtype="uint16")
        with no_compute(), pytest.raises(ValueError, match=match):
            cube.ginet.to_zarr(tmp_path / f"{scale}.zarr", resume=True, like="input")


class SafetensorError(Exception):
    pass


def chained() -> Exception:
    error = RuntimeError("could not be written")
    error.__cause__ = OSError(errno.EDQUOT, "Disk quota exceeded")
    return error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        chained(),
        RuntimeError("CPLE_AppDefinedError: Cannot write 4 bytes: No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        ExceptionGroup("several", [ValueError("one"), OSError(errno.EROFS, "")]),
    ],
    ids=["plain", "chained", "gdal", "safetensors", "group"],
)
def test_a_full_disk_stops_the_job_in_any_disguise(error: Exception, tmp_path: Path) -> None:
    told: list[Outcome] = []
    cube = tiny(3)
    data = failing(cube.rename(B05="B11"), 1, error)["B11"].data
    with pytest.raises(type(error)):
        cube.assign(B05=cube["B05"].copy(data=data)).ginet.to_zarr(tmp_path / "c.zarr", resume=True, tell=told.append)
    assert [outcome.state for outcome in told] == ["written"]
    assert not no_room(ValueError("no such band"))


def test_files_that_zarr_had_begun_are_cleared_and_no_others(tmp_path: Path) -> None:
    path = tmp_path / "cube.zarr"
    tiny(1).ginet.to_zarr(path, mode="a")
    ours = [path / "B02" / "c" / "0" / "0" / f"0.{uuid4().hex}.partial", path / f"zarr.{uuid4().hex}.partial"]
    mine = [path / "notes.partial", path / "B02" / f"{uuid4().hex}.txt", tmp_path / f"cube.zarr.{uuid4().hex}.txt"]
    for file in (*ours, *mine):
        file.write_text("begun")
    tiny(1).ginet.to_zarr(path, mode="a", resume=True)
    assert [file.exists() for file in ours] == [False, False]
    assert all(file.read_text() == "begun" for file in mine)


def test_metadata_is_consolidated_again_where_an_older_version_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "cube.zarr"
    tiny(2).ginet.to_zarr(path, mode="a")
    root = json.loads((path / "zarr.json").read_text())
    (path / "zarr.json").write_text(json.dumps({k: v for k, v in root.items() if k != "consolidated_metadata"}))
    for name in ("B02", "time"):
        array = zarr.open_array(path, path=name, mode="r+")
        array.resize((3, *array.shape[1:]))
    assert xr_ginet.status(path, verify=True).values.tolist() == [True, True]
    tiny(2).ginet.to_zarr(path, mode="a", resume=True)
    assert zarr.open_array(path, path="B02").shape[0] == zarr.open_array(path, path="time").shape[0] == 2
    consolidated = zarr.open_group(path, mode="r").metadata.consolidated_metadata.metadata
    assert consolidated["B02"].shape[0] == 2
    xr.testing.assert_equal(xr.open_zarr(path)[["B02", "B05"]].load(), tiny(2).load())
