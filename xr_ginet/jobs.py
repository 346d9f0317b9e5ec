"""Batch jobs: areas and dates of a catalogue into cubes, from a TOML file, here or on a Dask cluster.

catalog = "https://stac.example/v1"
datetime = "2024"
store = "cubes/{area}.zarr"        # a path or an fsspec URL; relative paths (of weights too) start at the file's folder
report = "cubes/report.json"       # what became of each area and date, kept up to date
overviews = true                   # or how many, beside cubes that lie in a group: store = "cubes/{area}.zarr/10m"

[open]                             # further arguments of open_stac, such as
chunks = 1024

[superresolve]                     # arguments of superresolve
depth = "auto"

[write]                            # arguments of to_zarr
dtype = "uint16"

[[area]]
name = "gers"
bbox = [0.05, 43.65, 0.15, 43.72]

[cluster]                          # without it: threads of this process
class = "distributed.LocalCluster" # or of dask_jobqueue, dask_gateway, dask_kubernetes, dask_cuda, coiled
workers = 4                        # to scale to, or [1, 20] to adapt between
options = { threads_per_worker = 1 }
# or, in place of class: address = "tcp://10.0.0.1:8786"

A job that is run again writes what its stores do not hold completely: dates that failed, and dates that are new.
Weights, depth and precision that the file does not name are those of the store, once there is one. Dates are computed
one after the other, so that graphs stay small however long the series, and one that fails does not stop the others.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from uuid import uuid4

import xarray as xr

from . import growing, tables
from .paths import expanded
from .sentinel2.addresses import failure, without_secrets
from .tables import build

if TYPE_CHECKING:
    from .mapping.likeness import Choice

CLUSTER_MODULES = ("coiled", "dask_cuda", "dask_gateway", "dask_jobqueue", "dask_kubernetes", "distributed")
"""Where a job file may have its cluster from."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Area:
    """One area of a job, and its cube."""

    name: str
    bbox: tuple[float, float, float, float] | None = None
    """West, south, east, north in degrees."""
    intersects: Mapping[str, Any] | None = None
    """GeoJSON geometry, in place of ``bbox``."""
    datetime: str | None = None
    """In place of the job's."""


@dataclass(frozen=True)
class Job:
    """What a TOML file says."""

    catalog: str
    """URL of a STAC API."""
    store: str
    """Path or URL of each area's cube, with ``{area}`` for its name."""
    area: tuple[Area, ...]
    datetime: str | None = None
    """Date or range to search."""
    report: str | None = None
    """Path of a JSON file."""
    overviews: bool | int = False
    """Whether overviews are made of cubes that are complete, or how many."""
    mask_clouds: bool = False
    """Whether what the scene classification calls cloudy is left out."""
    open: Mapping[str, Any] = field(default_factory=dict)
    superresolve: Mapping[str, Any] = field(default_factory=dict)
    write: Mapping[str, Any] = field(default_factory=dict)
    cluster: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_toml(cls, path: str | Path) -> Job:
        """Return the job that a file describes.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If it is no TOML, has an unknown key, lacks one, or a value makes no sense.
        """
        return tables.read(path, cls._of_table)

    @classmethod
    def _of_table(cls, table: dict[str, Any], path: Path) -> Job:
        areas = table.get("area")
        if not isinstance(areas, list) or not areas or not all(isinstance(area, dict) for area in areas):
            raise ValueError(f"{path} names no area: add [[area]] with name= and bbox=")
        table["area"] = tuple(build(Area, area, f"{path} [[area]]") for area in areas)
        for key in ("store", "report"):
            value = table.get(key)
            if isinstance(value, str) and "://" not in value:
                table[key] = str(path.parent / expanded(value))
        _check_report(table.get("report"), path)
        options = table.get("superresolve", {})
        for key in ("weights", "weights_60m"):
            if str(options.get(key, "")).endswith(".safetensors"):
                options[key] = str(path.parent / expanded(options[key]))
        job = build(cls, table, str(path))
        job._check(str(path))
        return job

    def _check(self, where: str) -> None:
        """Raise where a value makes no sense; of what is handed on, only that it is a table."""
        for name in ("catalog", "store"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{where}: {name}={getattr(self, name)!r} must be text")
        if not isinstance(self.overviews, int) or self.overviews < 0:
            raise ValueError(f"{where}: overviews={self.overviews!r} must be true, false or how many")
        for name in ("open", "superresolve", "write", "cluster"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"{where}: {name}={getattr(self, name)!r} must be a table, [{name}]")
        names = [area.name for area in self.area]
        if len(set(names)) < len(names) or not all(
            isinstance(name, str) and name.isprintable() and not set(name) & set("/\\") and name.strip(". ")
            for name in names
        ):
            raise ValueError(
                f"{where}: the areas are called {names}; each needs a name of its own, without slashes, and not of dots"
            )
        placed = [self.store_of(area) for area in self.area]
        if len(set(placed)) < len(placed):
            raise ValueError(f"{where}: store={self.store!r} is one for several areas. Type a name with {{area}} in it")
        if self.overviews and len({store.rpartition("/")[0] for store in placed}) < len(placed):
            raise ValueError(
                f"{where}: overviews lie beside their cube, and several areas would share a folder with "
                f"store={self.store!r}. Type a group for each, as {self.store.rstrip('/')}/10m"
            )
        if unknown := self.cluster.keys() - {"class", "address", "workers", "options"}:
            raise ValueError(f"{where} [cluster] has {', '.join(sorted(unknown))}; see xr_ginet.jobs for the keys")
        kind = self.cluster.get("class")
        if kind is not None and (not isinstance(kind, str) or kind.partition(".")[0] not in CLUSTER_MODULES):
            raise ValueError(f"{where} [cluster] class={kind!r}: must be a class of {', '.join(CLUSTER_MODULES)}")
        if kind is not None and "address" in self.cluster:
            raise ValueError(f"{where} [cluster] has class and address: drop one")

    def store_of(self, area: Area) -> str:
        """Return where an area's cube lies."""
        try:
            parts = [part for part in Formatter().parse(self.store) if part[1] is not None]
        except ValueError as error:
            raise ValueError(f"store={self.store!r}: {error}") from error
        if any((name, spec or "", conversion) != ("area", "", None) for _, name, spec, conversion in parts):
            raise ValueError(f"store={self.store!r}: the only name to fill in is {{area}}, as it stands")
        return self.store.replace("{area}", area.name)


State = Literal["waiting", "running", "complete", "partial", "failed"]


@dataclass
class AreaReport:
    """What became of one area."""

    area: str
    store: str
    """Without what may be secret in its address."""
    state: State = "waiting"
    error: str = ""
    dates: list[growing.Outcome] = field(default_factory=list)

    @property
    def state_of_dates(self) -> State:
        """Return whether some of its dates are complete, of an area that is not as a whole."""
        return "partial" if any(outcome.state != "failed" for outcome in self.dates) else "failed"


@dataclass
class Report:
    """What became of a job."""

    started: str
    areas: list[AreaReport]

    @property
    def state(self) -> State:
        """Return whether the job is running, and then whether all, some or none of its areas are complete."""
        states = {area.state for area in self.areas}
        if states & {"waiting", "running"}:
            return "running"
        return next(iter(states)) if len(states) == 1 else "partial"

    @property
    def counts(self) -> dict[str, int]:
        """Return how many dates were written, kept and failed."""
        states = [outcome.state for area in self.areas for outcome in area.dates]
        return {state: states.count(state) for state in ("written", "kept", "failed")}

    def ended_by(self, error: BaseException) -> None:
        """Tell of a job that an error, or who started it, has ended: nothing of it is running or waiting any more."""
        for area in self.areas:
            if area.state == "running":
                area.state, area.error = area.state_of_dates, failure(error)
            elif area.state == "waiting":
                area.state, area.error = "failed", f"not begun: the job was ended by {failure(error)}"

    def to_json(self) -> str:
        """Return the report as JSON."""
        areas = [vars(area) | {"dates": [outcome._asdict() for outcome in area.dates]} for area in self.areas]
        return json.dumps({"started": self.started, "state": self.state, **self.counts, "areas": areas}, indent=2)


def run(job: Job, *, tell: Callable[[str, growing.Outcome], None] | None = None) -> Report:
    """Run a job, now, and return what became of each of its areas and dates.

    Parameters
    ----------
    job : Job
    tell : callable, optional
        Called with the name of an area and each of its dates' outcomes.

    Returns
    -------
    Report
        Also written to the job's ``report`` after each date, so that it tells of a job that was killed.

    Raises
    ------
    ValueError, ImportError
        If the cluster cannot be had. What goes wrong in an area is in the report, and the next one is begun.
    OSError
        If a store or the report has no room left.
    """
    parts = [AreaReport(area.name, without_secrets(job.store_of(area))) for area in job.area]
    report = Report(datetime.now(UTC).isoformat(timespec="seconds"), parts)
    named = (job.superresolve.get(key) for key in ("weights", "weights_60m"))
    try:
        _save(job, report)
        with _cluster(job.cluster, [name for name in named if isinstance(name, str) and Path(name).is_file()]):
            for area, part in zip(job.area, parts, strict=True):
                part.state = "running"
                _run_area(job, area, part, report, tell)
                _save(job, report)
    except BaseException as error:  # Ctrl-C too: a report that says "running" is that of a job that runs
        report.ended_by(error)
        with suppress(OSError):  # it may be the one that there is no room for
            _save(job, report)
        raise
    return report


def _run_area(
    job: Job, area: Area, part: AreaReport, report: Report, tell: Callable[[str, growing.Outcome], None] | None
) -> None:
    """Write an area's cube, and tell in the report what became of it."""

    def told(outcome: growing.Outcome) -> None:
        part.dates.append(outcome)
        _save(job, report)
        if tell:
            tell(part.area, outcome)

    try:
        _write_area(job, area, told)
    except growing.PartialFailure:
        part.state = part.state_of_dates
    except Exception as error:
        if growing.no_room(error):
            raise
        part.error, part.state = failure(error), part.state_of_dates
        _log.warning("%s failed: %s", area.name, part.error)
    else:
        part.state = "complete"


class Opened(NamedTuple):
    """What an area is to become, lazily."""

    cube: xr.Dataset
    """What is read."""
    result: xr.Dataset
    """What is written."""
    choice: Choice
    """How it is computed: what the job names, else what the store has, else what the machine decides."""


def open_area(job: Job, area: Area) -> Opened:
    """Return what an area of a job is to become; its catalogue is searched, and nothing is read or written."""
    from .mapping import superresolve
    from .mapping.likeness import Choice, like_the_store
    from .sentinel2.bands import layers_for
    from .sentinel2.catalog import open_stac
    from .sentinel2.scl import mask_clouds

    began = time.monotonic()
    named = dict(job.superresolve)
    defaults = {"weights": "default", "depth": None, "device": "auto", "precision": "auto"}
    choice = Choice(**{key: named.pop(key, default) for key, default in defaults.items()})
    choice = like_the_store(job.store_of(area), choice)
    where = {"bbox": area.bbox and tuple(area.bbox), "intersects": area.intersects}
    layers = layers_for(job.superresolve.get("bands", "20m"), mask_clouds=job.mask_clouds)
    options: dict[str, Any] = {"datetime": area.datetime or job.datetime, "bands": layers, **where, **job.open}
    cube = open_stac(job.catalog, **options)
    if job.mask_clouds:
        cube = mask_clouds(cube)
    result = superresolve(cube, **choice._asdict(), **named)
    _log.info("%s: %s dates, opened in %.1f s", area.name, result.sizes.get("time", 1), time.monotonic() - began)
    return Opened(cube, result, choice)


def _write_area(job: Job, area: Area, told: Callable[[growing.Outcome], None]) -> None:
    from .overviews import build_overviews
    from .store import to_zarr

    result, target = open_area(job, area).result, job.store_of(area)
    if "://" not in target:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
    to_zarr(result, target, mode="a", resume=True, tell=told, **job.write)
    if job.overviews:
        build_overviews(target, levels=None if job.overviews is True else job.overviews)


def _save(job: Job, report: Report) -> None:
    """Write a report in one step, whoever else writes it."""
    if job.report is None:
        return
    path = Path(job.report)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        beside.write_text(report.to_json() + "\n", encoding="utf-8")
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _check_report(report: Any, path: Path) -> None:
    """Raise where a report would take the place of the job's file."""
    if isinstance(report, str) and path.resolve() == Path(report).resolve():
        raise ValueError(f"{path}: report={report!r} would overwrite the job's file. Name another, such as report.json")


def _is_cluster(kind: Any) -> bool:
    """Return whether something makes Dask clusters: dask_gateway's has a base of its own."""
    from distributed.deploy.cluster import Cluster
    from distributed.deploy.spec import SpecCluster

    if not isinstance(kind, type) or kind in (Cluster, SpecCluster):
        return False
    return issubclass(kind, Cluster) or (
        kind.__module__.startswith("dask_gateway.") and kind.__name__.endswith("Cluster")
    )


@contextmanager
def _cluster(options: Mapping[str, Any], files: Sequence[str]) -> Iterator[None]:
    """Have a Dask cluster that has some files while the context lasts, or compute in threads of this process."""
    if not options:
        yield
        return
    from distributed import Client
    from distributed.diagnostics.plugin import UploadFile

    address = options.get("address")
    cluster: AbstractContextManager[Any] = nullcontext(address)
    if address is None:
        name = options.get("class", "distributed.LocalCluster")
        module, _, kind = name.rpartition(".")
        try:
            make = getattr(import_module(module), kind)
        except (ImportError, AttributeError) as error:
            raise ImportError(f"[cluster] class={name!r}: {error}. Install what it is part of") from error
        if not _is_cluster(make):
            raise ValueError(f"[cluster] class={name!r} is no class of Dask clusters, such as distributed.LocalCluster")
        cluster = make(**options.get("options", {}))
    with cluster as at, Client(at) as client:
        workers = options.get("workers")
        if isinstance(workers, list):
            at.adapt(minimum=workers[0], maximum=workers[1])
        elif workers is not None and address is None:
            at.scale(workers)
        client.wait_for_workers(1)
        for path in files:  # once to each worker, also to those that come later
            client.register_plugin(UploadFile(path, load=False))
        yield
