"""One writer per store: every kind of store, every spelling of its place, jobs that died or were taken for dead."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import dask
import dask.array as da
import icechunk
import numpy as np
import obstore
import pytest
import xarray as xr
import zarr
from obstore.store import LocalStore, MemoryStore
from zarr.storage import ObjectStore, WrapperStore

import xr_ginet
from xr_ginet import guards
from xr_ginet.documents import at, get, put
from xr_ginet.guards import Lease


def cube(value: float = 0.5, n_times: int = 1) -> xr.Dataset:
    times = np.datetime64("2024-05-01", "ns") + np.arange(n_times) * np.timedelta64(5, "D")
    coords = {"time": times, "y": -10.0 * np.arange(4), "x": 10.0 * np.arange(4)}
    data = da.full((n_times, 4, 4), value, dtype="float32", chunks=(1, 2, 4))
    return xr.Dataset({"B02": (("time", "y", "x"), data)}, coords)


def meanwhile(cube: xr.Dataset, call: Callable[[], None]) -> xr.Dataset:
    """Return a cube that makes a call when its first block is computed."""
    calls = [call]

    def block(values: np.ndarray) -> np.ndarray:
        if calls:
            calls.pop()()
        return values

    meta = np.empty((0, 0, 0), "float32")
    return cube.assign(B02=cube["B02"].copy(data=cube["B02"].data.map_blocks(block, dtype="float32", meta=meta)))


@contextmanager
def kinds(folder: Path) -> Iterator[dict[str, tuple[Any, Any]]]:
    """Yield two names of one store, by kind."""
    path, objects, held = folder / "cube.zarr", MemoryStore(), {}
    (folder / "link").symlink_to(folder)
    memory, url = zarr.storage.MemoryStore(), f"memory://{uuid4().hex}"
    yield {
        "path": (path, str(path)),
        "relative": (path, os.path.relpath(path)),
        "link": (path, folder / "link" / "cube.zarr"),
        "file url": (path, f"file://{path}"),
        "local url": (f"local://{path}", path),
        "local store": (path, zarr.storage.LocalStore(path)),
        "obstore": (ObjectStore(LocalStore(str(folder / "cube.zarr"), mkdir=True)), path),
        "fsspec": (zarr.storage.FsspecStore.from_url(f"local://{path}"), path),
        "memory": (memory, WrapperStore(memory)),
        "dict": (held, zarr.storage.MemoryStore(held)),
        "memory url": (url, f"{url}/"),
        "objects": (ObjectStore(objects), WrapperStore(ObjectStore(objects))),
    }


KINDS = ["path", "relative", "link", "memory", "dict", "objects", "obstore", "fsspec"]
KINDS += ["file url", "local url", "local store", "memory url"]


@pytest.mark.filterwarnings("ignore:.*asynchronous=True")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{"mode": "a"}, {"mode": "w"}, {}], ids=["append", "replace", "new"])
def test_a_second_job_is_refused_whatever_it_calls_the_store(kind: str, options: dict, tmp_path: Path) -> None:
    with kinds(tmp_path) as known:
        first, second = known[kind]
    seen = []

    def other() -> None:
        with pytest.raises(RuntimeError, match=r"another job .*is writing .*two would write the same chunks\. Wait"):
            cube(0.9).ginet.to_zarr(second, **options)
        seen.append(True)

    with dask.config.set(scheduler="synchronous"):
        meanwhile(cube(0.1), other).ginet.to_zarr(first, mode="a")
    assert seen
    assert (xr.open_zarr(first)["B02"] == np.float32(0.1)).all()
    cube(0.2).ginet.to_zarr(second, mode="a")  # and afterwards the store is free
    assert (xr.open_zarr(first)["B02"] == np.float32(0.2)).all()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "link") in ([], ["cube.zarr"])


def test_a_second_job_on_a_repository_is_refused(tmp_path: Path) -> None:
    repository = icechunk.Repository.create(icechunk.local_filesystem_storage(str(tmp_path / "repository")))
    same = icechunk.Repository.open(icechunk.local_filesystem_storage(str(tmp_path / "repository")))
    seen = []

    def other() -> None:
        with pytest.raises(RuntimeError, match=r"another job \(process \d+ on this machine\) is writing .*ginet-lease"):
            cube(0.9).ginet.to_zarr(same, mode="a")
        seen.append(True)

    meanwhile(cube(0.1), other).ginet.to_zarr(repository, mode="a")
    assert seen
    assert repository.list_branches() == {"main"}
    stored = xr.open_zarr(repository.readonly_session("main").store, consolidated=False)
    assert (stored["B02"] == np.float32(0.1)).all()


def dead_process() -> int:
    job = subprocess.Popen([sys.executable, "-c", ""])
    job.wait()
    return job.pid


def lease(**changes: Any) -> str:
    """Return the lease of another process of another machine, that was renewed right now."""
    return str(Lease("elsewhere", 4711, "", "token", guards._now())._replace(**changes))


@pytest.mark.parametrize(
    "left",
    [
        lambda: lease(renewed=guards._now() - 121_000),
        lambda: lease(host=guards._host(), pid=dead_process(), started="1"),
        lambda: lease(host=guards._host(), pid=os.getpid()),  # of this process, by a job that ended
        lambda: "no lease",
    ],
    ids=["expired", "dead", "ended", "garbage"],
)
@pytest.mark.parametrize("kind", ["objects", "repository"])
def test_the_lease_of_a_job_that_died_is_taken_over(kind: str, left: Callable[[], str], tmp_path: Path) -> None:
    if kind == "objects":
        target: Any = ObjectStore(MemoryStore())
        put(at(target), guards.LEASE, left().encode())
    else:
        target = icechunk.Repository.create(icechunk.local_filesystem_storage(str(tmp_path / "repository")))
        target.create_branch(f"ginet-lease.{left()}", target.lookup_branch("main"))
    cube().ginet.to_zarr(target, resume=True)
    assert xr_ginet.status(target, verify=True).all()
    if kind == "objects":
        assert get(at(target), guards.LEASE) is None
    else:
        assert target.list_branches() == {"main"}


@pytest.mark.parametrize("changes", [{}, {"renewed": 0, "host": guards._host(), "pid": os.getppid()}])
def test_the_lease_of_a_job_that_lives_is_not(changes: dict) -> None:
    if changes:
        changes = changes | {"started": guards._started(changes["pid"])}
    target = ObjectStore(MemoryStore())
    put(at(target), guards.LEASE, lease(**changes).encode())
    with pytest.raises(RuntimeError, match=r"another job \(process \d+ on .* machine\) .*wait for 120 s, or delete"):
        cube().ginet.to_zarr(target, resume=True)
    assert obstore.list(target.store).collect()[0]["path"] == guards.LEASE


def test_a_job_that_was_taken_for_dead_shows_nothing_more() -> None:
    store = MemoryStore()
    target = ObjectStore(store)
    told = []

    def other(outcome: Any) -> None:
        told.append(outcome.date)
        put(at(target), guards.LEASE, lease().encode())

    with pytest.raises(RuntimeError, match=r"has taken this one for dead"):
        cube(n_times=3).ginet.to_zarr(target, resume=True, tell=other)
    assert len(told) == 1
    assert xr.open_zarr(target).sizes["time"] == 1
    assert get(at(target), guards.LEASE) is not None  # it is the other's


def test_a_lease_is_renewed_while_the_job_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "RENEWED", 0.001)
    target, seen = ObjectStore(MemoryStore()), set()
    with guards.sole_writer(target) as alive:
        while len(seen) < 3:  # or the test never ends
            seen.add(get(at(target), guards.LEASE))
            alive()
    assert len({Lease.read(found.decode()).token for found in seen}) == 1


def test_a_refused_call_leaves_nothing_behind(tmp_path: Path) -> None:
    for target in (tmp_path / "a" / "b" / "cube.zarr", f"file://{tmp_path}/c/cube.zarr"):
        broken = cube().assign(B02=cube()["B02"].assign_attrs(made=object()))
        with pytest.raises(ValueError, match="which Zarr cannot store"):
            broken.ginet.to_zarr(target)
        failing = meanwhile(cube(), lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            failing.ginet.to_zarr(target)
    assert list(tmp_path.iterdir()) == []


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for options in ({}, {"mode": "w"}, {"mode": "a", "resume": False}):
        name = f"{len(options)}.zarr"
        cube().ginet.to_zarr(f"~/{name}", **options)
        assert (xr.open_zarr(tmp_path / "home" / name)["B02"] == 0.5).all()
    cube().isel(time=0, drop=True).rio.write_crs(32630).ginet.to_cog("~/cogs")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home"]
