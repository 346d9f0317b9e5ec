"""Cubes in object stores: a real S3 server on localhost, through fsspec and obstore; Icechunk's transactions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import boto3
import dask.array as da
import icechunk
import kills
import numpy as np
import pytest
import xarray as xr
import zarr
from conftest import no_compute, two_grids
from distributed import Client, LocalCluster
from moto.server import ThreadedMotoServer
from obstore.store import MemoryStore, S3Store
from zarr.storage import ObjectStore

import xr_ginet
from xr_ginet.documents import at, get, keys
from xr_ginet.growing import Outcome
from xr_ginet.network import Checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:datetime.datetime.utcnow")


@pytest.fixture(scope="module")
def cube(checkpoint: Checkpoint) -> xr.Dataset:
    """Return three super-resolved dates, lazy."""
    native = two_grids((20, 14), n_times=3).chunk({"time": 1, "y": 24, "x": 16})
    return native.ginet.superresolve(weights=checkpoint)[["B02", "B07", "B11"]]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """Return the URL of an S3 server with a bucket ``cubes``."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b"), ("DEFAULT_REGION", "us-east-1")):
            patch.setenv(f"AWS_{name}", value)
        patch.setenv("AWS_ENDPOINT_URL", url)
        boto3.client("s3", endpoint_url=url).create_bucket(Bucket="cubes")
        yield url
    server.stop()


def fsspec_url(endpoint: str, name: str) -> str:
    return f"s3://cubes/{name}.zarr"


def object_store(endpoint: str, name: str) -> ObjectStore:
    options = {"access_key_id": "a", "secret_access_key": "b", "region": "us-east-1"}
    return ObjectStore(S3Store("cubes", prefix=name, endpoint=endpoint, client_options={"allow_http": True}, **options))


@pytest.mark.parametrize("place", [fsspec_url, object_store], ids=["fsspec", "obstore"])
def test_cubes_grow_and_resume_on_s3(
    cube: xr.Dataset, endpoint: str, place: Callable[[str, str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = place(endpoint, uuid4().hex)
    cube.isel(time=slice(2)).ginet.to_zarr(target, mode="a", dtype="uint16")
    with monkeypatch.context() as patch:  # complete dates are not computed again
        patch.setattr("xr_ginet.mapping.predictor.Predictor.__call__", lambda *_: 1 / 0)
        cube.isel(time=slice(2)).ginet.to_zarr(target, mode="a", resume=True, dtype="uint16")
    cube.ginet.to_zarr(target, mode="a", resume=True, dtype="uint16")
    assert xr_ginet.status(target, verify=True).values.tolist() == [True] * 3
    stored = xr.open_zarr(target).load()
    for name in ("B02", "B11"):
        np.testing.assert_allclose(stored[name], cube[name], rtol=0, atol=5.1e-5)
    with pytest.raises(FileExistsError, match="holds a Zarr store already"):
        cube.ginet.to_zarr(target)


def test_an_s3_server_that_drops_requests_costs_dates_at_most(
    cube: xr.Dataset, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    target, written = f"s3://cubes/{uuid4().hex}.zarr", []
    write = s3fs.S3FileSystem._pipe_file

    async def dropping(self: Any, path: str, *arguments: Any, **options: Any) -> Any:
        if "/B07/c/1/" in path:
            written.append(path)
            raise ConnectionResetError("the server is gone")
        return await write(self, path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(s3fs.S3FileSystem, "_pipe_file", dropping)
        with pytest.raises(RuntimeError, match=r"1 of 3 dates .*ConnectionResetError"):
            cube.ginet.to_zarr(target, resume=True)
    assert written
    assert xr_ginet.status(target, verify=True).values.tolist() == [True, False, True]
    stored = xr.open_zarr(target)["B07"].load()
    np.testing.assert_array_equal(stored[[0, 2]], cube["B07"][[0, 2]].astype("float32"))
    cube.ginet.to_zarr(target, resume=True)
    assert xr_ginet.status(target, verify=True).all()
    np.testing.assert_array_equal(xr.open_zarr(target)["B07"], cube["B07"].astype("float32"))


@pytest.fixture
def repository(tmp_path: Path) -> icechunk.Repository:
    return icechunk.Repository.create(icechunk.local_filesystem_storage(str(tmp_path / "repository")))


def read(repository: icechunk.Repository) -> xr.Dataset:
    return xr.open_zarr(repository.readonly_session("main").store, consolidated=False)


def test_a_job_on_icechunk_is_seen_when_it_ends(cube: xr.Dataset, repository: icechunk.Repository) -> None:
    cube.isel(time=slice(2)).ginet.to_zarr(repository, mode="a", dtype="uint16")
    before = repository.lookup_branch("main")
    seen: list[tuple[int, bool]] = []

    def look(outcome: object) -> None:
        seen.append((read(repository).sizes["time"], repository.lookup_branch("main") == before))

    cube.ginet.to_zarr(repository, mode="a", resume=True, dtype="uint16", tell=look)
    assert seen == [(2, True)] * 3
    assert repository.list_branches() == {"main"}
    assert xr_ginet.status(repository, verify=True).values.tolist() == [True] * 3
    np.testing.assert_allclose(read(repository)["B11"], cube["B11"], rtol=0, atol=5.1e-5)
    end = repository.lookup_branch("main")
    cube.ginet.to_zarr(repository, resume=True, dtype="uint16")  # nothing to do, nothing committed
    assert repository.lookup_branch("main") == end


def test_workers_of_a_cluster_write_to_icechunk(cube: xr.Dataset, repository: icechunk.Repository) -> None:
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster, Client(cluster):
        lazy = cube.chunk(time=1, y=16, x=16)
        lazy.ginet.to_zarr(repository, resume=True, dtype="uint16")
        assert xr_ginet.status(repository, verify=True).values.tolist() == [True] * 3
    np.testing.assert_allclose(read(repository)["B11"], cube["B11"], rtol=0, atol=5.1e-5)
    assert repository.list_branches() == {"main"}


def test_an_interrupted_job_on_icechunk_is_not_seen_and_goes_on(
    cube: xr.Dataset, repository: icechunk.Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(outcome: Outcome) -> None:
        if outcome.date.startswith("2024-05-06"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cube.ginet.to_zarr(repository, resume=True, tell=stop)
    with pytest.raises(FileNotFoundError):
        read(repository)
    states: list[str] = []
    cube.ginet.to_zarr(repository, resume=True, tell=lambda outcome: states.append(outcome.state))
    assert states == ["kept", "kept", "written"]
    np.testing.assert_array_equal(read(repository)["B07"], cube["B07"].astype("float32"))


def test_a_job_on_icechunk_begins_anew_where_main_has_moved_on(
    cube: xr.Dataset, repository: icechunk.Repository
) -> None:
    def stop(outcome: Outcome) -> None:
        raise KeyboardInterrupt

    cube.isel(time=slice(1)).ginet.to_zarr(repository, mode="a")
    with pytest.raises(KeyboardInterrupt):
        cube.ginet.to_zarr(repository, mode="a", resume=True, tell=stop)
    with repository.transaction("main", message="someone else's") as store:
        zarr.open_array(store, path="B02", mode="r+")[0, 0, 0] = 0.5
    states: list[str] = []
    cube.ginet.to_zarr(repository, mode="a", resume=True, tell=lambda outcome: states.append(outcome.state))
    assert states == ["kept", "written", "written"]
    assert read(repository)["B02"][0, 0, 0] == 0.5
    assert xr_ginet.status(repository, verify=True).values.tolist() == [False, True, True]


def test_a_date_that_fails_is_not_seen_in_part(cube: xr.Dataset, repository: icechunk.Repository) -> None:
    def fail(block: np.ndarray, block_id: tuple[int, ...]) -> np.ndarray:
        if block_id == (1, 1, 1):
            raise OSError("gone")
        return block

    broken = cube.assign(B11=cube["B11"].copy(data=cube["B11"].data.map_blocks(fail, dtype="float32")))
    with pytest.raises(RuntimeError, match=r"(?s)1 of 3 dates .*OSError: gone"):
        broken.ginet.to_zarr(repository, resume=True)
    assert xr_ginet.status(repository, verify=True).values.tolist() == [True, False, True]
    assert read(repository)[["B02", "B07", "B11"]].isel(time=1).isnull().all().to_array().all()


def test_icechunk_refuses_what_it_cannot_do(
    cube: xr.Dataset, repository: icechunk.Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"is written date by date. Type resume=True, or mode='a'"):
        cube.ginet.to_zarr(repository)
    with pytest.raises(ValueError, match="zarr_format=2: an Icechunk repository holds version 3"):
        cube.ginet.to_zarr(repository, resume=True, zarr_format=2)
    monkeypatch.setattr("xr_ginet.store.workers_elsewhere", lambda: True)
    with pytest.raises(ValueError, match="lies in this process's memory, where a cluster's workers"):
        cube.ginet.to_zarr(icechunk.Repository.create(icechunk.in_memory_storage()), resume=True)
    assert repository.list_branches() == {"main"}


def test_main_is_not_moved_from_under_someone_else(cube: xr.Dataset, repository: icechunk.Repository) -> None:
    cube.isel(time=slice(1)).ginet.to_zarr(repository, mode="a")

    def meanwhile(outcome: Outcome) -> None:
        if outcome.date.startswith("2024-05-11"):
            with repository.transaction("main", message="someone else's") as store:
                zarr.open_array(store, path="B02", mode="r+")[0, 0, 0] = 0.5

    with pytest.raises(RuntimeError, match=r"main of .* has moved while this job was writing"):
        cube.ginet.to_zarr(repository, mode="a", resume=True, tell=meanwhile)
    assert read(repository)["B02"][0, 0, 0] == 0.5
    assert read(repository).sizes["time"] == 1
    cube.ginet.to_zarr(repository, mode="a", resume=True)
    assert read(repository)["B02"][0, 0, 0] == 0.5
    assert read(repository).sizes["time"] == 3


@pytest.mark.parametrize("place", [fsspec_url, object_store], ids=["fsspec", "obstore"])
def test_a_cube_on_s3_is_replaced_at_once(endpoint: str, place: Callable[[str, str], Any]) -> None:
    target, expected, seen = place(endpoint, uuid4().hex), kills.cube(2)["B05"].values, []
    kills.cube(2).ginet.to_zarr(target)
    for _ in range(2):  # there and back: keys take turns
        lazy = xr.open_zarr(target, chunks={})

        def look(block: np.ndarray, expected: np.ndarray) -> np.ndarray:
            with xr.open_zarr(target) as found:
                seen.append(np.array_equal(found["B05"], expected))
            return block

        options = {"dtype": "float32", "meta": np.empty((0,) * 3, "float32"), "expected": expected}
        data = da.map_blocks(look, lazy["B05"].data * 2, **options)
        lazy.assign(B05=lazy["B05"].copy(data=data)).ginet.to_zarr(target, mode="w")
        expected = expected * 2
        np.testing.assert_array_equal(xr.open_zarr(target)["B05"], expected)
        assert len([key for key in keys(at(target), "B05/") if "/c" in key]) == 2
    assert seen == [True] * 4


def test_what_cannot_be_replaced_at_once_is_refused() -> None:
    store = ObjectStore(MemoryStore())
    kills.cube(2).ginet.to_zarr(store, zarr_format=2)
    before = {key: get(at(store), key) for key in keys(at(store))}
    with no_compute(), pytest.raises(ValueError, match=r"time differs|source differs.*zarr_format=3"):
        kills.cube(3).ginet.to_zarr(store, mode="w", zarr_format=2)
    assert {key: get(at(store), key) for key in keys(at(store))} == before
    kills.cube(2, seed=1).assign_coords(source=kills.cube(2)["source"]).ginet.to_zarr(store, mode="w", zarr_format=2)
    np.testing.assert_array_equal(xr.open_zarr(store)["B05"], kills.cube(2, seed=1)["B05"])
    kills.cube(3).ginet.to_zarr(store, mode="w", zarr_format=3)
    np.testing.assert_array_equal(xr.open_zarr(store)["B05"], kills.cube(3)["B05"])
    assert not [key for key in keys(at(store)) if ".z" in key]
    kills.cube(1).ginet.to_zarr(store, mode="w", zarr_format=2)
    np.testing.assert_array_equal(xr.open_zarr(store)["B05"], kills.cube(1)["B05"])
    assert not [key for key in keys(at(store)) if key.endswith("zarr.json")]
