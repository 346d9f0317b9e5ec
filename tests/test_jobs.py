"""Batch jobs: run, failed in part, run again; what a job file may say."""

from __future__ import annotations

import errno
import gc
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import urlopen

import batch_cluster
import numpy as np
import pytest
import torch
import xarray as xr
from conftest import scene_item, two_grids
from dask.system import CPU_COUNT
from distributed import Client, LocalCluster, Nanny, Scheduler, SpecCluster, get_client
from local_stac import serve
from numpy.testing import assert_array_equal
from typer.testing import CliRunner

import xr_ginet
from xr_ginet.cli import app
from xr_ginet.growing import Outcome, PartialFailure
from xr_ginet.jobs import AreaReport, Job, Report, _save, run
from xr_ginet.mapping import predictor
from xr_ginet.mapping.predictor import Predictor, threads_here
from xr_ginet.network import Checkpoint
from xr_ginet.simulation import simulate

pytestmark = pytest.mark.filterwarnings("ignore:.*unclosed:ResourceWarning")

JOB = """
catalog = "{url}"
datetime = "2024-06"
store = "cubes/{{area}}.zarr"
report = "cubes/report.json"

[open]
chunks = 64

[superresolve]
weights = "{weights}"

[write]
dtype = "uint16"

[[area]]
name = "west"
bbox = {west}

[[area]]
name = "east"
bbox = {east}
"""


@pytest.fixture
def folder(tmp_path: Path, checkpoint: Checkpoint) -> Iterator[Path]:
    """Return a folder with a job of two areas and three dates, whose catalogue is served meanwhile."""
    scene = simulate((128, 256), seed=6)
    item = scene_item(scene, tmp_path / "cogs")
    items = []
    for day in (11, 16, 21):
        copied = json.loads(json.dumps(item))
        copied |= {"id": f"june_{day}", "properties": item["properties"] | {"datetime": f"2024-06-{day}T10:56:21Z"}}
        for asset in copied["assets"].values():
            path = Path(asset["href"])
            asset["href"] = str(path.with_name(f"{day}_{path.name}"))
            Path(asset["href"]).write_bytes(path.read_bytes())
        items.append(copied)
    west, south, east, north = item["bbox"]
    middle = (west + east) / 2
    with serve(items, tmp_path / "cogs") as url:
        text = JOB.format(
            url=url,
            weights=checkpoint.path,
            west=[west + 0.002, south + 0.002, middle - 0.001, north - 0.002],
            east=[middle, south + 0.002, east - 0.002, north - 0.002],
        )
        (tmp_path / "job.toml").write_text(text)
        yield tmp_path


def submitted(folder: Path) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(app, ["submit", str(folder / "job.toml"), "--quiet"], catch_exceptions=False)
    return result.exit_code, json.loads((folder / "cubes" / "report.json").read_text())


def states(report: dict[str, Any]) -> dict[str, list[str]]:
    return {area["area"]: [date["state"] for date in area["dates"]] for area in report["areas"]}


def test_a_job_fails_in_part_and_goes_on_to_what_it_would_have_been(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xr_ginet.sentinel2.patience.FIRST_PAUSE", 0.01)
    [lost] = (folder / "cogs").rglob("16_B11.tif")
    content = lost.read_bytes()
    lost.unlink()
    with caplog.at_level(logging.INFO, "xr_ginet"):
        code, report = submitted(folder)
    assert code == 3
    assert (report["state"], report["written"], report["failed"]) == ("partial", 4, 2)
    assert states(report) == {area: ["written", "failed", "written"] for area in ("west", "east")}
    assert "16_B11.tif" in report["areas"][0]["dates"][1]["error"]
    assert [area["state"] for area in report["areas"]] == ["partial"] * 2
    assert caplog.text.count(" failed, ") == 2
    lost.write_bytes(content)
    code, report = submitted(folder)
    assert code == 0
    assert states(report) == {area: ["kept", "written", "kept"] for area in ("west", "east")}
    whole = Job.from_toml(folder / "job.toml")
    for area in whole.area:
        cube = xr_ginet.open_stac(whole.catalog, datetime="2024-06", bbox=area.bbox, chunks=64)
        expected = cube.ginet.superresolve(weights=whole.superresolve["weights"])
        expected.ginet.to_zarr(folder / f"{area.name}.zarr", resume=True, dtype="uint16")
        stored = [xr.open_zarr(path / f"{area.name}.zarr").load() for path in (folder, folder / "cubes")]
        xr.testing.assert_identical(*stored)
        assert xr_ginet.status(folder / "cubes" / f"{area.name}.zarr", verify=True).all()


def test_new_dates_are_appended_and_an_area_that_cannot_be_opened_does_not_stop_the_others(folder: Path) -> None:
    path = folder / "job.toml"
    text = path.read_text()
    path.write_text(text.replace('datetime = "2024-06"', 'datetime = "2024-06-01/2024-06-17"'))
    assert submitted(folder)[0] == 0
    path.write_text(text + '[[area]]\nname = "sea"\nbbox = [0.0, 0.0, 1.0, 1.0]\n')
    told: list[tuple[str, str]] = []
    whiles: list[list[str]] = []

    def tell(area: str, outcome: Outcome) -> None:
        told.append((area, outcome.state))
        written = json.loads((folder / "cubes" / "report.json").read_text())  # what a job that is killed now leaves
        whiles.append([written["state"], *(part["state"] for part in written["areas"])])

    report = run(Job.from_toml(path), tell=tell)
    assert whiles[2] == ["running", "running", "waiting", "waiting"]
    assert whiles[5] == ["running", "complete", "running", "waiting"]
    assert told == [(area, state) for area in ("west", "east") for state in ("kept", "kept", "written")]
    assert [area.state for area in report.areas] == ["complete", "complete", "failed"]
    assert "ValueError: no item of 'sentinel-2-l2a'" in report.areas[2].error
    assert report.state == "partial"


def test_a_job_on_a_cluster_makes_the_same_cubes_with_weights_that_travel_to_the_workers(
    folder: Path, checkpoint: Checkpoint
) -> None:
    path = folder / "job.toml"
    path.write_text(path.read_text().rpartition("[[area]]")[0])  # one area is enough
    run(Job.from_toml(path))
    mine = folder / "mine.safetensors"
    mine.write_bytes(checkpoint.path.read_bytes())
    expected = {p.name: xr.open_zarr(p).load() for p in (folder / "cubes").glob("*.zarr")}
    (folder / "elsewhere").mkdir()
    cluster = '[cluster]\nworkers = 2\noptions = { n_workers = 1, threads_per_worker = 1, dashboard_address = ":0" }\n'
    text = path.read_text().replace(str(checkpoint.path), str(mine))
    (folder / "elsewhere" / "job.toml").write_text(text + cluster)
    there = replace(Predictor.of(checkpoint, precision="float32"), path="/nowhere/mine.safetensors")
    block = np.full((4, 64, 64), 0.1, "float32"), np.full((6, 32, 32), 0.2, "float32")
    found: list[np.ndarray] = []

    def look(area: str, outcome: Outcome) -> None:
        found.append(get_client().submit(there, *block, pure=False).result())

    report = run(Job.from_toml(folder / "elsewhere" / "job.toml"), tell=look)
    assert report.state == "complete"
    assert len(found) == 3
    for result in found:
        assert_array_equal(result, Predictor.of(checkpoint, precision="float32")(*block))
    with pytest.raises(FileNotFoundError, match="/nowhere/mine"):
        there(*block)
    for name, cube in expected.items():
        stored = xr.open_zarr(folder / "elsewhere" / "cubes" / name).load()
        xr.testing.assert_equal(stored, cube)


@pytest.mark.parametrize(
    ("chosen", "parent", "environment", "threads", "expected"),
    [
        (8, None, None, None, 8),  # in a notebook
        (3, None, "1", None, 3),
        (8, "pool", None, None, 1),
        (4, "pool", None, None, 1),  # torch's own number where a core is two processors
        (3, "pool", "3", None, 3),  # OMP_NUM_THREADS
        (1, "tcp://", "1", 4, 4),  # a worker of four threads, whose nanny says one
        (1, "tcp://", "1", 16, 8),  # more threads than cores, to wait with
        (3, "tcp://", "1", 4, 3),  # torch.set_num_threads
        (8, "tcp://", "8", 1, 8),  # OMP_NUM_THREADS
        (8, None, None, 4, 4),  # without a nanny
        (1, None, "1", 4, 1),
    ],
)
def test_a_network_has_the_threads_of_its_worker_unless_somebody_chose(
    chosen: int,
    parent: str | None,
    environment: str | None,
    threads: int | None,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = SimpleNamespace(nanny=parent, state=SimpleNamespace(nthreads=threads)) if threads else None
    monkeypatch.setattr(predictor, "_worker", lambda: worker)
    monkeypatch.setattr(predictor.multiprocessing, "parent_process", lambda: parent)
    monkeypatch.setattr(torch, "get_num_threads", lambda: chosen)
    monkeypatch.setattr(predictor, "CPU_COUNT", 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if environment:
        monkeypatch.setenv("OMP_NUM_THREADS", environment)
    assert threads_here() == expected


def test_a_network_has_the_threads_of_a_worker_with_a_nanny(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # nannies of other tests set them
        monkeypatch.delenv(name, raising=False)
    with LocalCluster(1, threads_per_worker=2, dashboard_address=":0") as cluster, Client(cluster) as client:
        assert client.submit(threads_here).result() == min(2, CPU_COUNT)


def test_a_job_makes_overviews_of_what_is_complete(folder: Path) -> None:
    path = folder / "job.toml"
    one, _, _ = path.read_text().rpartition("[[area]]")
    path.write_text("overviews = 1\n" + one.replace("{area}.zarr", "{area}.zarr/10m"))
    assert run(Job.from_toml(path)).state == "complete"
    pyramid = folder / "cubes" / "west.zarr"
    assert xr_ginet.status(pyramid / "20m").values.tolist() == [True] * 3
    layout = xr.open_datatree(pyramid, engine="zarr").attrs["multiscales"]["layout"]
    assert [entry["asset"] for entry in layout] == ["10m", "20m"]


def write_job(folder: Path, text: str = "", **keys: str) -> Job:
    """Write and read a job of two areas whose catalogue nobody asks."""
    told = {"catalog": "https://stac.example/v1", "store": "cubes/{area}.zarr", "report": "report.json"} | keys
    areas = "".join(f'[[area]]\nname = "{name}"\nbbox = [0.0, 0.0, 1.0, 1.0]\n' for name in ("north", "south"))
    lines = "".join(f'{key} = "{value}"\n' for key, value in told.items())
    (folder / "quiet.toml").write_text(lines + text + areas, encoding="utf-8")
    return Job.from_toml(folder / "quiet.toml")


def read_report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (SystemExit(3), "SystemExit: 3"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left"),
    ],
)
@pytest.mark.parametrize("written", [0, 1])
def test_a_job_that_has_ended_leaves_no_report_that_says_it_runs(
    error: BaseException, shown: str, written: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whiles: list[str] = []

    def end(job: Job, area: Any, told: Callable[[Outcome], None]) -> None:
        whiles.append(read_report(tmp_path)["state"])
        for _ in range(written):
            told(Outcome("2024-06-11", "written", 1.0))
        raise error

    monkeypatch.setattr("xr_ginet.jobs._write_area", end)
    with pytest.raises(type(error)):
        run(write_job(tmp_path))
    report = read_report(tmp_path)
    assert whiles == ["running"]
    assert report["state"] == ("partial" if written else "failed")
    assert [area["state"] for area in report["areas"]] == ["partial" if written else "failed", "failed"]
    assert shown in report["areas"][0]["error"]
    assert "not begun: the job was ended by" in report["areas"][1]["error"]
    assert [path.name for path in tmp_path.iterdir() if "report" in path.name] == ["report.json"]


def test_a_cluster_that_cannot_be_had_leaves_no_report_that_says_it_runs(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"state": "running"}')  # of a job that was killed
    job = replace(write_job(tmp_path), cluster={"class": "dask_jobqueue.NoSuchCluster"})
    with pytest.raises(ImportError):
        run(job)
    assert read_report(tmp_path)["state"] == "failed"


def test_reports_of_two_jobs_do_not_meet_while_they_are_saved(tmp_path: Path) -> None:
    """Each save goes by way of a file of its own, and what is read meanwhile is whole."""
    job = write_job(tmp_path)
    reports = [Report(f"{n}", [AreaReport(f"{n}" * 4000, "store") for _ in range(n)]) for n in (3, 30)]
    beside: set[str] = set()
    replaced = Path.replace

    def spied(path: Path, target: Path) -> Path:
        beside.add(path.name)
        return replaced(path, target)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(4) as pool:
        patch.setattr(Path, "replace", spied)
        jobs_ = [pool.submit(_save, job, report) for report in reports * 20]
        while not all(saved.done() for saved in jobs_):
            if (tmp_path / "report.json").exists():
                assert len(read_report(tmp_path)["areas"]) in (3, 30)
        for saved in jobs_:
            saved.result()
    assert len(beside) == 40
    assert {path.name for path in tmp_path.iterdir()} == {"quiet.toml", "report.json"}


def test_secrets_are_in_no_report_log_or_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    address = "s3://me:hidden@bucket.example/{area}.zarr?key=hidden"

    def fail(job: Job, area: Any, told: Callable[[Outcome], None]) -> None:
        if area.name == "north":
            raise RuntimeError("https://me:hidden@blobs.example/B11.tif?sig=hidden is gone")
        told(Outcome("2024-06-11", "failed", 1.0, "x"))
        raise PartialFailure(job.store_of(area), [Outcome("2024-06-11", "failed", 1.0, "x")])

    monkeypatch.setattr("xr_ginet.jobs._write_area", fail)
    with caplog.at_level(logging.DEBUG, "xr_ginet"):
        report = run(write_job(tmp_path, store=address))
    failure = PartialFailure(address, [Outcome("2024-06-11", "failed", 1.0, "x")])
    told = report.to_json() + caplog.text + str(failure) + failure.target + (tmp_path / "report.json").read_text()
    assert "hidden" not in told
    assert "bucket.example" in report.areas[0].store
    assert "blobs.example/B11.tif is gone" in report.areas[0].error
    assert [area.state for area in report.areas] == ["failed", "failed"]


@pytest.mark.parametrize("name", ["..", ".", "", " ", "a/b", "/a", "a\\\\b", "a\\u0000b", "a\\nb", "...", "../a"])
def test_an_area_whose_name_is_no_name_of_a_folder_is_refused(name: str, tmp_path: Path) -> None:
    job = 'catalog = "https://stac.example/v1"\nstore = "cubes/{area}.zarr"\n'
    (tmp_path / "job.toml").write_text(job + f'[[area]]\nname = "{name}"\nbbox = [0.0, 0.0, 1.0, 1.0]\n')
    with pytest.raises(ValueError, match="each needs a name of its own, without slashes, and not of dots"):
        Job.from_toml(tmp_path / "job.toml")


def test_job_files_are_read_as_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    write_job(tmp_path, store="Grünland/{area}.zarr")
    code = f"from xr_ginet.jobs import Job; print(ascii(Job.from_toml({str(tmp_path / 'quiet.toml')!r}).store))"
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "Gr\\xfcnland" in told.stdout


def test_a_job_goes_on_with_what_its_store_was_made_with_and_its_plan_says_so(folder: Path) -> None:
    path = folder / "job.toml"
    path.write_text(path.read_text().rpartition("[[area]]")[0].replace("2024-06", "2024-06-01/2024-06-12"))
    named = path.read_text().replace("[superresolve]", '[superresolve]\nprecision = "bfloat16"\ndepth = 10')
    path.write_text(named.replace(named.split("weights = ")[1].split("\n")[0], '"ginet-xs"'))
    assert run(Job.from_toml(path)).state == "complete"
    left = "\n".join(
        line for line in path.read_text().splitlines() if not line.startswith(("precision", "depth", "weig"))
    )
    path.write_text(left.replace("2024-06-12", "2024-06-17"))
    planned = CliRunner().invoke(app, ["submit", str(path), "--dry-run"], catch_exceptions=False)
    assert planned.exit_code == 0, planned.output
    assert "device   cpu, precision bfloat16" in planned.output
    assert "weights  ginet-xs" in planned.output
    assert "depth 10 pixels" in planned.output
    assert "which exists; not written: dry run" in planned.output
    report = run(Job.from_toml(path))
    assert [outcome.state for outcome in report.areas[0].dates] == ["kept", "written"]
    described = CliRunner().invoke(app, ["info", str(folder / "cubes" / "west.zarr")], catch_exceptions=False)
    dates = json.loads(described.output)["dates"]
    assert [(date["complete"], date["items"]) for date in dates] == [(True, "june_11"), (True, "june_16")]


def slurm_answers() -> bool:
    return shutil.which("sinfo") is not None and subprocess.run(["sinfo"], capture_output=True).returncode == 0


def looks_on_a_cluster(folder: Path, kind: str, options: str, look: Callable[[], Any]) -> list[Any]:
    """Return what was seen after each date of an area's job on one worker of a cluster of that class."""
    path = folder / "job.toml"
    one, _, _ = path.read_text().rpartition("[[area]]")
    path.write_text(f'{one}[cluster]\nclass = "{kind}"\nworkers = 1\noptions = {{ {options} }}\n')
    seen: list[Any] = []
    report = run(Job.from_toml(path), tell=lambda area, outcome: seen.append(look()))
    assert report.state == "complete"
    assert xr_ginet.status(folder / "cubes" / "west.zarr", verify=True).values.tolist() == [True] * 3
    return seen


ONE_WORKER = 'cores = 1, processes = 1, memory = "2GiB", scheduler_options = { dashboard_address = ":0" }'


@pytest.mark.slow  # workers are jobs of a shell here, as they would be Slurm's
def test_a_job_runs_on_the_workers_that_dask_jobqueue_starts(folder: Path) -> None:
    def threads() -> list[int]:
        return [worker["nthreads"] for worker in get_client().scheduler_info()["workers"].values()]

    assert looks_on_a_cluster(folder, "dask_jobqueue.local.LocalCluster", ONE_WORKER, threads) == [[1]] * 3


@pytest.mark.slow
@pytest.mark.skipif(not slurm_answers(), reason="needs Slurm, if only on this machine alone")
def test_a_job_runs_on_the_workers_that_slurm_starts(folder: Path) -> None:
    def queued() -> bool:
        queue = subprocess.run(["squeue", "--noheader"], capture_output=True, text=True, check=True).stdout
        return "dask-wor" in queue

    options = f'{ONE_WORKER}, walltime = "00:10:00", local_directory = "{folder}", log_directory = "{folder}"'
    assert looks_on_a_cluster(folder, "dask_jobqueue.SLURMCluster", options, queued) == [True] * 3


GATEWAY = """
import sys
c.DaskGateway.backend_class = "dask_gateway_server.backends.local.UnsafeLocalBackend"
c.DaskGateway.authenticator_class = "dask_gateway_server.auth.SimpleAuthenticator"
c.DaskGateway.address = "127.0.0.1:{server}"
c.Proxy.address = "127.0.0.1:{proxy}"
c.UnsafeLocalBackend.clusters_directory = "{folder}"
c.ClusterConfig.scheduler_cmd = [sys.executable, "-m", "distributed.cli.dask_scheduler"]
c.ClusterConfig.worker_cmd = [sys.executable, "-m", "distributed.cli.dask_worker"]
"""


def answers(url: str) -> bool:
    try:
        with urlopen(url) as response:
            return response.status == 200
    except OSError:
        return False


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[str]:
    """Serve dask-gateway, whose clusters are processes of this machine, and yield its address."""
    with socket.socket() as one, socket.socket() as other:
        for listener in (one, other):
            listener.bind(("127.0.0.1", 0))
        server, proxy = (listener.getsockname()[1] for listener in (one, other))
    config = tmp_path / "dask_gateway_config.py"
    config.write_text(GATEWAY.format(server=server, proxy=proxy, folder=tmp_path / "clusters"))
    command = [sys.executable, "-m", "dask_gateway_server", "-f", str(config)]
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            while not answers(f"http://127.0.0.1:{proxy}/api/health"):  # by way of the proxy, which is there earlier
                time.sleep(0.2)
            yield f"http://127.0.0.1:{proxy}"
        finally:
            os.killpg(process.pid, signal.SIGTERM)
    gc.collect()  # its client says at its end that its loop has stopped: here, not in whatever test comes later


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Exception ignored in.*Gateway:pytest.PytestUnraisableExceptionWarning")
def test_a_job_runs_on_a_cluster_that_dask_gateway_starts(folder: Path, gateway: str) -> None:
    def protocol() -> str:
        return get_client().scheduler.address.partition(":")[0]

    seen = looks_on_a_cluster(folder, "dask_gateway.GatewayCluster", f'address = "{gateway}"', protocol)
    assert seen == ["gateway"] * 3


def networks_built() -> int:
    """Return how many this process has built since it was last asked."""
    from xr_ginet.mapping.predictor import _network

    found = _network.cache_info().currsize
    _network.cache_clear()
    return found


def test_the_network_runs_where_its_resources_are_and_only_there(checkpoint: Checkpoint, tmp_path: Path) -> None:
    native = two_grids((32, 32), n_times=1).chunk(y=16, x=16)
    cube = native.ginet.superresolve(weights=checkpoint, resources={"GPU": 1}, device="cpu", precision="float32")
    worker = {"nthreads": 1, "dashboard_address": None}
    workers = {
        "with": {"cls": Nanny, "options": worker | {"resources": {"GPU": 1}}},
        "without": {"cls": Nanny, "options": worker},
    }
    scheduler = {"cls": Scheduler, "options": {"dashboard_address": ":0"}}
    with SpecCluster(workers=workers, scheduler=scheduler) as cluster, Client(cluster) as client:
        client.wait_for_workers(2)
        names = {address: info["name"] for address, info in client.scheduler_info()["workers"].items()}
        for resume in (True, False):
            cube.ginet.to_zarr(tmp_path / f"{resume}.zarr", resume=resume)
            found = client.run(networks_built)
            assert {names[address]: number for address, number in found.items()} == {"with": 1, "without": 0}
    expected = native.ginet.superresolve(weights=checkpoint, precision="float32")["B8A"].compute()
    for resume in (True, False):
        xr.testing.assert_allclose(xr.open_zarr(tmp_path / f"{resume}.zarr")["B8A"].load(), expected)


def test_resources_are_of_the_network_alone_and_its_device_may_be_elsewhere(checkpoint: Checkpoint) -> None:
    native = two_grids((32, 32)).chunk(y=16, x=16)
    layers = native.ginet.superresolve(weights=checkpoint, resources={"GPU": 1}, device="cuda")["B8A"].data.dask.layers
    told = {name for name, layer in layers.items() if layer.annotations}
    assert len(told) == 1
    assert told.pop().startswith("ginet-windows-")


def test_the_example_runs_with_a_local_cluster_in_place_of_its_own(tmp_path: Path) -> None:
    report = batch_cluster.main(tmp_path, size=96, on="slurm", local=True)
    assert report.state == "complete"
    assert report.counts["written"] == 6


@pytest.mark.parametrize("on", ["slurm", "gateway"])
def test_the_clusters_of_the_example_are_known(on: str, tmp_path: Path) -> None:
    text = batch_cluster.JOB.format(catalog="a", store="b", cluster=batch_cluster.CLUSTERS[on], west=[], east=[])
    (tmp_path / "job.toml").write_text(text)
    assert Job.from_toml(tmp_path / "job.toml").cluster["workers"] == [1, 20]


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("catalog =", "catalog ", "is no TOML"),
        ("[open]", "[opened]", r"has opened; the keys are area, catalog, cluster"),
        ("bbox = ", "box = ", r"\[\[area\]\] has box; the keys are bbox, datetime, intersects, name"),
        ('name = "west"', 'name = "east"', r"the areas are called \['east', 'east'\]; each needs a name of its own"),
        ('name = "west"', 'name = "../west"', "each needs a name of its own, without slashes"),
        ('name = "west"', "", "missing 1 required positional argument: 'name'"),
        ("{area}", "all", "is one for several areas"),
        ("{area}", "{year}", r"the only name to fill in is \{area\}"),
        ("{area}", "{area", "store=.*expected '}'"),
        (
            "[write]",
            '[cluster]\nclass = "os.system"\n[write]',
            r"\[cluster\] class='os.system': must be a class of coiled",
        ),
        ("[write]", "[cluster]\nworker = 3\n[write]", r"\[cluster\] has worker; see xr_ginet.jobs"),
        (
            "[write]",
            '[cluster]\nclass = "coiled.Cluster"\naddress = "tcp://a:1"\n[write]',
            "class and address: drop one",
        ),
        ("[open]", "open = 3\n[opened]", "has opened"),
        ('catalog = "', 'catalog = 3 # "', "catalog=3 must be text"),
        ('datetime = "2024-06"', "cluster = 3", r"cluster=3 must be a table, \[cluster\]"),
        ('name = "west"', "name = []", "makes no sense: TypeError"),
        ('datetime = "2024-06"', "overviews = true", r"several areas would share a folder .*{area}.zarr/10m"),
        ('datetime = "2024-06"', 'overviews = "all"', "overviews='all' must be true, false or how many"),
    ],
)
def test_a_job_file_that_is_wrong_says_where(folder: Path, old: str, new: str, match: str) -> None:
    text = (folder / "job.toml").read_text()
    assert old in text
    (folder / "job.toml").write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=match):
        Job.from_toml(folder / "job.toml")


def test_a_job_without_areas_or_with_a_cluster_that_is_not_installed_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "none.toml").write_text('catalog = "a"\nstore = "b"\n')
    with pytest.raises(ValueError, match=r"names no area: add \[\[area\]\] with name= and bbox="):
        Job.from_toml(folder / "none.toml")
    text = (folder / "job.toml").read_text()
    (folder / "job.toml").write_text(text + '[cluster]\nclass = "dask_jobqueue.SLURMCluster"\n')
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    with pytest.raises(ImportError, match=r"\[cluster\] class='dask_jobqueue.SLURMCluster': .*Install what it is part"):
        run(Job.from_toml(folder / "job.toml"))
    result = CliRunner().invoke(app, ["submit", str(folder / "gone.toml")])
    assert result.exit_code == 1
    assert "gone.toml" in result.output
