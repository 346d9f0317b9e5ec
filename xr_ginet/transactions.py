"""Where a job writes: a Zarr store as it is, or a branch of an Icechunk repository that readers see when all is done.

In a Zarr store readers see a date when its job puts the cube's consolidated metadata, which is one object. In a
repository each date is committed to a branch of the job's own, so that a job that was killed loses one date at most; at
its end ``main`` moves to it, once. Until then readers see what was there before.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Protocol
from uuid import uuid4

import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray
from zarr.core.sync import sync
from zarr.storage import StorePath

from .digests import digest, outer_chunks, region_of
from .documents import Documents, at, copied, keys, put
from .guards import Alive, leased, sole_writer
from .paths import expanded
from .schedulers import compute_writes, current_client, workers_elsewhere

MAIN, OURS, LEASE = "main", "ginet-job", "ginet-lease."

ENCODED = ("dtype", "scale_factor", "add_offset", "_FillValue", "units", "calendar")
"""What decides, of a variable's encoding, which values are stored."""


class Place(Protocol):
    """Where a job writes."""

    documents: Documents | None
    """Of all that there is, whatever readers see; None where there is no cube."""
    shown: int
    """Of how many dates it is known that those without a record hold nothing."""

    @property
    def where(self) -> StorePath:
        """Return where the keys lie; after a commit another object."""
        ...

    def make(self, memory: StorePath) -> None:
        """Make what a store in memory holds, the metadata and values of a cube before any pixel."""
        ...

    def extend(self, values: Mapping[str, bytes], metadata: Mapping[str, bytes]) -> None:
        """Put the values of dates to come, and metadata by which there is room for them."""
        ...

    def write(self, cube: xr.Dataset, region: Mapping[str, slice], *, progress: bool) -> dict[str, NDArray]:
        """Write pixels, now, into room that is there; return the digests of the blocks as they were computed."""
        ...

    def commit(self, message: str, length: int | None) -> None:
        """Make what was written so far safe from what comes, and let readers see so many dates."""
        ...

    def undo(self, index: int | None) -> None:
        """Take back all that was written of a date that is not complete."""
        ...


class Plain:
    """A store without transactions: what is written is written, and seen when it is shown."""

    def __init__(self, target: Any, alive: Alive) -> None:
        self.where, self.alive = at(target), alive
        seen = Documents.seen(self.where)
        self.documents = None if seen is None or not seen.arrays else seen.there(self.where)
        self.shown = seen.lengths("time") if seen is not None else 0

    def make(self, memory: StorePath) -> None:
        """Write all but what makes it a group, so that a job that is killed before has made nothing."""
        made = Documents.seen(memory)
        assert made is not None
        for name in made.arrays:  # a job that was killed may have been at another cube
            if keys(self.where, f"{name}/"):
                sync((self.where / name).delete_dir())
        self.documents, self.shown = copied(memory, self.where), 0

    def extend(self, values: Mapping[str, bytes], metadata: Mapping[str, bytes]) -> None:
        """Put values before there is room for them: a job that is killed leaves no date whose time is not there."""
        for key, content in (*values.items(), *metadata.items()):
            put(self.where, key, content)

    def write(self, cube: xr.Dataset, region: Mapping[str, slice], *, progress: bool) -> dict[str, NDArray]:
        """Write pixels, under a progress bar if asked for."""
        assert self.documents is not None
        digests, _ = write_blocks(cube, self.documents, self.where, region, progress=progress)
        return digests

    def commit(self, message: str, length: int | None) -> None:
        """Put the metadata by which readers open the cube."""
        self.alive()
        assert self.documents is not None
        (self.documents if length is None else self.documents.resized("time", length)).show(self.where)
        self.shown = length or 0

    def undo(self, index: int | None) -> None:
        """Delete the chunks of a date."""
        assert self.documents is not None
        for name in self.documents.along("time"):
            array = self.documents.array(self.where, name)
            if array.ndim > 1 and index is not None:
                part = {"time": slice(index, index + 1)}
                # Zarr deletes a chunk that holds nothing but missing pixels.
                array[region_of(self.documents.dims(name), part)] = array.fill_value


class Branch:
    """A branch of an Icechunk repository, made from ``main`` or left by a job that did not end."""

    def __init__(self, repository: Any, alive: Alive) -> None:
        self.repository, self.alive = repository, alive
        start = repository.lookup_branch(MAIN)
        if OURS in repository.list_branches():
            if all(snapshot.id != start for snapshot in repository.ancestry(branch=OURS)):
                repository.delete_branch(OURS)  # main has moved on since
        if OURS not in repository.list_branches():
            repository.create_branch(OURS, start)
        self.start = start
        self._open()

    def _open(self) -> None:
        self.session = self.repository.writable_session(OURS)
        seen = Documents.seen(self.where)
        self.documents = seen if seen is not None and seen.arrays else None
        self.shown = seen.lengths("time") if seen is not None else 0  # no commit holds a part of a date

    @property
    def where(self) -> StorePath:
        """Return the store of the session that is open."""
        return at(self.session.store)

    def make(self, memory: StorePath) -> None:
        """Write the metadata and values of a cube."""
        self.documents = Documents.seen(memory)
        self._describe()  # Icechunk takes nothing that has no parent
        copied(memory, self.where)

    def _describe(self) -> None:
        assert self.documents is not None
        alone = Documents(3, self.documents.attrs, {})
        (key, content), *_ = alone.root_files(consolidated=False).items()
        put(self.where, key, content)

    def extend(self, values: Mapping[str, bytes], metadata: Mapping[str, bytes]) -> None:
        """Put metadata and values, which are committed together."""
        for key, content in (*metadata.items(), *values.items()):
            put(self.where, key, content)

    def write(self, cube: xr.Dataset, region: Mapping[str, slice], *, progress: bool) -> dict[str, NDArray]:
        """Write pixels, from whatever processes compute them."""
        assert self.documents is not None
        fork = self.session.fork()
        digests, sessions = write_blocks(cube, self.documents, at(fork.store), region, progress=progress)
        self.session.merge(*sessions)
        return digests

    def commit(self, message: str, length: int | None) -> None:
        """Commit to the job's branch, and open the next session."""
        self.alive()
        if self.documents is not None and self.documents.attrs != self._stored_attrs():
            self._describe()
        if self.session.has_uncommitted_changes:
            self.session.commit(message)
            self._open()

    def _stored_attrs(self) -> Any:
        seen = Documents.seen(self.where)
        return None if seen is None else seen.attrs

    def undo(self, index: int | None) -> None:
        """Leave what was not committed behind."""
        self._open()

    def publish(self) -> None:
        """Let readers see what was committed."""
        self.alive()
        done = self.repository.lookup_branch(OURS)
        if self.repository.lookup_branch(MAIN) != self.start:
            raise RuntimeError(
                f"{MAIN} of {self.repository} has moved while this job was writing, and readers see that. Make the "
                "same call again: it begins from there"
            )
        if done != self.start:
            self.repository.reset_branch(MAIN, done, from_snapshot_id=self.start)
        self.repository.delete_branch(OURS)


class BranchSlot:
    """A lease in the name of a branch: names can be put and taken away at once, and cost no snapshot."""

    def __init__(self, repository: Any) -> None:
        self.repository = repository

    def read(self) -> str | None:
        """Return the lease that counts: the first by name, where two jobs put theirs at once."""
        names = sorted(name for name in self.repository.list_branches() if name.startswith(LEASE))
        return names[0].removeprefix(LEASE) if names else None

    def claim(self, lease: str) -> None:
        """Make a branch of that name."""
        self.repository.create_branch(LEASE + lease, self.repository.lookup_branch(MAIN))

    def renew(self, old: str, new: str) -> None:
        """Make the new one, then take the old one away."""
        self.claim(new)
        self.free(old)

    def free(self, lease: str) -> None:
        """Delete the branch of that name."""
        self.repository.delete_branch(LEASE + lease)


def write_blocks(
    cube: xr.Dataset, documents: Documents, where: StorePath, region: Mapping[str, slice], *, progress: bool
) -> tuple[dict[str, NDArray], list[Any]]:
    """Write the variables of a cube into a region of a store's arrays, now.

    Each block is digested in the task that writes it.

    Returns
    -------
    digests : dict
        Of each variable, by blocks.
    sessions : list
        Where the store is that of an Icechunk session, all that have written.
    """
    writes, sizes, job = [], {}, uuid4().hex
    for name, variable in encoded_variables(cube, documents, where).items():
        array = documents.array(where, name)
        part = region_of([str(dim) for dim in variable.dims], region)
        steps = tuple(min(n, size) for n, size in zip(outer_chunks(array), variable.shape, strict=True))
        data = variable.data
        data = data.rechunk(steps) if variable.chunks is not None else da.from_array(data, steps, asarray=False)
        sizes[name] = data.npartitions
        writes.append(
            data.map_blocks(
                _put,
                name=f"ginet-store-{name}-{data.name}",
                dtype=object,
                chunks=tuple((1,) * len(sizes) for sizes in data.chunks),
                meta=np.empty((0,) * data.ndim, object),
                variable=name,
                array=array,
                origin=tuple(p.start or 0 for p in part),
                steps=steps,
                n_blocks=data.numblocks,
                job=job,
            )
        )
    digests = {name: np.zeros(size, "<u8") for name, size in sizes.items()}
    sessions = {}
    try:
        told = compute_writes(writes, progress=progress)
    except BaseException:
        end_everywhere(job)
        raise
    for name, number, found, session in told:
        digests[name][number] = found
        sessions[id(session)] = session
    return digests, [session for session in sessions.values() if session is not None]


def encoded_variables(cube: xr.Dataset, documents: Documents, where: StorePath) -> dict[str, xr.Variable]:
    """Return a cube's variables as the numbers that a store's encoding has for them."""
    found = {}
    with documents.opened(where) as stored:
        for name, variable in cube.variables.items():
            if name not in stored.variables:
                continue
            plain = xr.Variable(variable.dims, variable.data)
            if variable.dtype.kind not in "OUST":
                known = stored[name].encoding
                plain.encoding = {key: known[key] for key in ENCODED if key in known}
                plain = xr.conventions.encode_cf_variable(plain, name=str(name))
            found[str(name)] = plain
    return found


def _put(
    block: NDArray,
    *,
    variable: str,
    array: Any,
    origin: tuple[int, ...],
    steps: tuple[int, ...],
    n_blocks: tuple[int, ...],
    job: str,
    block_id: tuple[int, ...],
) -> NDArray:
    """Write a block; return in an array of one element whose it is, its number, its digest and the session."""
    if array.dtype.kind not in "OTUS":
        block = np.asarray(block).astype(array.dtype, copy=False)  # it may not be of the type that its graph tells
    starts = [first + i * step for first, i, step in zip(origin, block_id, steps, strict=True)]
    with _unless_ended(job):
        array[tuple(slice(a, a + n) for a, n in zip(starts, block.shape, strict=True))] = block
    told = np.empty((1,) * block.ndim, object)
    number = int(np.ravel_multi_index(block_id, n_blocks)) if block_id else 0
    told[(0,) * block.ndim] = (variable, number, digest(block), getattr(array.store, "session", None))
    return told


_gate, _ended, _writing = threading.Condition(), set[str](), Counter[str]()


@contextmanager
def _unless_ended(job: str) -> Iterator[None]:
    """Be among the tasks that write, unless their computation has failed: what they wrote may be undone already."""
    with _gate:
        if job in _ended:
            raise RuntimeError("what this block belongs to has failed")
        _writing[job] += 1
    try:
        yield
    finally:
        with _gate:
            _writing[job] -= 1
            _gate.notify_all()


def _end(job: str) -> None:
    """Let no task of a computation write any more, in this process, and wait for those that do."""
    with _gate:
        _ended.add(job)
        _gate.wait_for(lambda: not _writing[job], timeout=60)


def end_everywhere(job: str) -> None:
    """Let no task of a computation write any more: Dask raises the first error while others go on."""
    _end(job)
    if (client := current_client()) is not None and workers_elsewhere():
        with suppress(Exception):  # a worker that is gone writes no more
            client.run(_end, job)


def is_repository(target: Any) -> bool:
    """Return whether a target is an Icechunk repository."""
    return type(target).__module__.partition(".")[0] == "icechunk" and hasattr(target, "writable_session")


def readable(target: Any) -> Any:
    """Return what Zarr opens for reading: of a repository, the store of ``main``."""
    return target.readonly_session(MAIN).store if is_repository(target) else expanded(target)


@contextmanager
def place_of(target: Any) -> Iterator[Place]:
    """Have a place that this job alone writes to; of a repository, what was committed is published at the end.

    Raises
    ------
    RuntimeError
        If another job writes there.
    """
    if is_repository(target):
        with leased(BranchSlot(target), target) as alive:
            branch = Branch(target, alive)
            yield branch
            branch.publish()
    else:
        with sole_writer(target) as alive:
            yield Plain(target, alive)
