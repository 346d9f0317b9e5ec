"""Where a job writes: a Zarr store as it is, or a branch of an Icechunk repository that readers see when all is done.

Each date is committed to a branch of the job's own, so that a job that was killed loses one date at most; at its end
``main`` moves to it, once. Until then readers see what was there before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import dask
import dask.array as da
import xarray as xr

from .paths import expanded
from .schedulers import compute_writes

MAIN, OURS = "main", "ginet-job"
NUMBERS = ("dtype", "scale_factor", "add_offset", "_FillValue")


class Place(Protocol):
    """Where a job writes."""

    @property
    def store(self) -> Any:
        """Return what Zarr opens; after a commit another object."""
        ...

    def write(self, cube: xr.Dataset, region: dict[str, slice], *, progress: bool) -> None:
        """Write pixels, now, into room that is there."""
        ...

    def commit(self, message: str) -> None:
        """Make what was written so far safe from what comes."""
        ...

    def undo(self) -> None:
        """Take back what was written since the last commit, where that can be done."""
        ...


class Plain:
    """A store without transactions: what is written is written."""

    def __init__(self, store: Any) -> None:
        self.store = store

    def write(self, cube: xr.Dataset, region: dict[str, slice], *, progress: bool) -> None:
        """Write pixels, under a progress bar if asked for."""
        write_pixels(cube, self.store, progress=progress, region=region)

    def commit(self, message: str) -> None:
        """Do nothing."""

    def undo(self) -> None:
        """Do nothing: what is not recorded is not complete."""


class Branch:
    """A branch of an Icechunk repository, made from ``main`` or left by a job that did not end."""

    def __init__(self, repository: Any) -> None:
        self.repository = repository
        start = repository.lookup_branch(MAIN)
        if OURS in repository.list_branches():
            if all(snapshot.id != start for snapshot in repository.ancestry(branch=OURS)):
                repository.delete_branch(OURS)  # main has moved on since
        if OURS not in repository.list_branches():
            repository.create_branch(OURS, start)
        self.start = start
        self.session = repository.writable_session(OURS)

    @property
    def store(self) -> Any:
        """Return the store of the session that is open."""
        return self.session.store

    def commit(self, message: str) -> None:
        """Commit to the job's branch, and open the next session."""
        if self.session.has_uncommitted_changes:
            self.session.commit(message)
            self.session = self.repository.writable_session(OURS)

    def write(self, cube: xr.Dataset, region: dict[str, slice], *, progress: bool) -> None:
        """Write pixels, from whatever processes compute them; progress is not shown."""
        import zarr
        from icechunk.dask import store_dask

        # icechunk.xarray.to_icechunk does the same, but that of 1.1.21 fails with xarray 2026.9.
        fork = self.session.fork()
        sources, targets, regions = [], [], []
        with xr.open_zarr(self.store, chunks=None, consolidated=False) as stored:
            for name, variable in cube.variables.items():
                known = stored[name].encoding
                plain = xr.Variable(variable.dims, variable.data, variable.attrs)
                plain.encoding = {key: known[key] for key in NUMBERS if key in known}
                sources.append(da.asarray(xr.conventions.encode_cf_variable(plain, name=str(name)).data))
                targets.append(zarr.open_array(fork.store, path=str(name), mode="r+"))
                regions.append(tuple(region.get(str(dim), slice(None)) for dim in variable.dims))
        self.session.merge(store_dask(sources=sources, targets=targets, regions=regions))

    def undo(self) -> None:
        """Leave what was not committed behind."""
        self.session = self.repository.writable_session(OURS)

    def publish(self) -> None:
        """Let readers see what was committed."""
        done = self.repository.lookup_branch(OURS)
        if done != self.start:
            self.repository.reset_branch(MAIN, done, from_snapshot_id=self.start)
        self.repository.delete_branch(OURS)


def write_pixels(cube: xr.Dataset, target: Any, *, progress: bool, **options: Any) -> None:
    """Write a cube now, with the options of xarray's `to_zarr`; with resources (see `map_windows`) without progress."""
    graphs = [v.data.dask.layers for v in cube.variables.values() if v.chunks is not None]
    if any("resources" in (layer.annotations or {}) for layers in graphs for layer in layers.values()):
        with dask.config.set({"optimization.fuse.active": False}):
            cube.to_zarr(target, **options)
        return
    compute_writes([cube.to_zarr(target, compute=False, **options)], progress=progress)


def is_repository(target: Any) -> bool:
    """Return whether a target is an Icechunk repository."""
    return type(target).__module__.partition(".")[0] == "icechunk" and hasattr(target, "writable_session")


def is_open(store: Any) -> bool:
    """Return whether a store is that of a session that may be written to: other processes do not see what was."""
    return hasattr(store, "session") and not store.session.read_only


def readable(target: Any) -> Any:
    """Return what Zarr opens for reading: of a repository, the store of ``main``."""
    return target.readonly_session(MAIN).store if is_repository(target) else expanded(target)


@contextmanager
def place_of(target: Any) -> Iterator[Place]:
    """Have a place to write to; what was committed is published at the end, unless an error ends the job before."""
    if not is_repository(target):
        yield Plain(target)
        return
    branch = Branch(target)
    yield branch
    branch.publish()
