"""Cubes in Zarr: one chunk of the store per Dask chunk, encodings that survive the round trip."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import xarray as xr

from . import growing
from .documents import in_memory
from .encoding import Layout, StoredDtype, encoded, encoding_of
from .folders import beside, check_replaceable, clear_temporary, clear_up, local_path
from .guards import Alive, memory_of, sole_writer
from .paths import expanded
from .replacing import Replacing
from .schedulers import workers_elsewhere
from .sentinel2.addresses import without_secrets
from .sentinel2.provenance import loaded
from .sentinel2.times import in_microseconds
from .transactions import Place, Plain, is_repository, place_of

Mode = Literal["w", "w-", "a"]


def to_zarr(
    ds: xr.Dataset,
    target: Any,
    *,
    mode: Mode | None = None,
    resume: bool = False,
    dtype: StoredDtype = "float32",
    like: Literal["input"] | None = None,
    zarr_format: int = 3,
    inner_chunks: int | None = None,
    compression_level: int = 3,
    progress: bool = False,
    tell: Callable[[growing.Outcome], None] | None = None,
    compute: bool = True,
) -> Any:
    """Write a cube to a Zarr store, chunk by chunk.

    Parameters
    ----------
    ds : Dataset
        Float reflectance, lazy or not. Each Dask chunk becomes one chunk of the store; where chunks are ragged, the
        cube is first rechunked to its largest chunk on each axis.
    target : str, Path, zarr store or icechunk.Repository
        Where to. A store that exists already is left alone unless ``mode="w"``. Of a repository readers of ``main`` see
        the job when it ends, all at once; one that was interrupted goes on from its last complete date, or is forgotten
        by ``repository.delete_branch("ginet-job")``.
    mode : {"w", "w-", "a"}, optional
        ``"w"`` replaces an existing store, a local one only after the new one is complete; ``"w-"`` and None refuse.
        ``"a"`` appends the dates that the store does not have, and writes those anew that it has; like ``resume``,
        date by date.
    resume : bool
        Write date by date, each recorded when it is complete, and skip the dates that the store holds completely
        already: the same call goes on with an interrupted job. See `status`.
    dtype : {"float32", "uint16"}
        ``"uint16"`` stores digital numbers with CF ``scale_factor`` 0.0001 and ``add_offset`` -0.1; reflectance beyond
        -0.0999 and 6.4534 is clipped, missing is 0.
    like : {"input"}, optional
        In place of ``dtype``: dtype, scale, offset and nodata are those of the digital numbers that the cube was made
        from.
    zarr_format : {3, 2}
    inner_chunks : int, optional
        Each Dask chunk becomes one shard (one file or object) of chunks of so many pixels on each axis, which can be
        read one by one: few objects to keep, little to read for a small window. The Dask chunks must be multiples of
        it; of Zarr version 3.
    compression_level : int
        Of Zstandard, 0 to 22.
    progress : bool
        Show a progress bar while computing.
    tell : callable, optional
        Called with the `growing.Outcome` of each date, where dates are written one by one.
    compute : bool
        Otherwise write metadata only and return a `dask.delayed.Delayed` that writes the pixels.

    Returns
    -------
    Delayed or None
        With ``compute=False``, what writes the pixels when computed.

    Raises
    ------
    FileExistsError
        If the store exists, and ``mode`` is neither ``"w"`` nor ``"a"`` and nothing is to be resumed; or if the target
        is a file, or a folder with other files, whatever the mode.
    ValueError
        If an argument has an unknown value, ``inner_chunks`` does not divide the chunks, an attribute cannot be stored,
        ``like="input"`` and the cube does not tell what it was made from, the target lies in this process's memory
        while a cluster computes in others, a time is missing or no datetime, or the store to go on with was made from
        another grid, other bands, weights, options or (``resume``) dates and items.
    RuntimeError
        If another job on this machine grows the same local store.
    growing.PartialFailure
        A RuntimeError too: if some of the dates could not be computed or written, after all others are complete.
    """
    target = expanded(target)
    if mode not in (None, "w", "w-", "a"):
        raise ValueError(
            f"mode={mode!r}: must be 'w' to replace a store, 'a' to append dates, or 'w-' to refuse where there is one"
        )
    grows = resume or mode == "a"
    if grows and (mode == "w" or not compute):
        raise ValueError(f"mode={mode!r}, resume={resume}, compute={compute}: a store either grows now, or is replaced")
    ds = loaded(in_microseconds(ds))
    reflectance = encoding_of(ds, dtype, like)
    if zarr_format not in (2, 3):
        raise ValueError(f"zarr_format={zarr_format!r}: must be 2 or 3")
    if inner_chunks is not None and (zarr_format != 3 or inner_chunks < 1):
        raise ValueError(f"inner_chunks={inner_chunks}, zarr_format={zarr_format}: shards are of Zarr version 3")
    if progress and not compute:
        raise ValueError("progress=True shows the computation, but compute=False puts it off")
    if is_repository(target):
        if zarr_format != 3:
            raise ValueError(f"zarr_format={zarr_format}: an Icechunk repository holds version 3")
        if not grows:
            raise ValueError("an Icechunk repository is written date by date. Type resume=True, or mode='a'")
    if _in_memory(target) and workers_elsewhere():
        raise ValueError(
            f"{target} lies in this process's memory, where a cluster's workers and other processes cannot write. Name "
            "a path"
        )
    layout = Layout(zarr_format, inner_chunks, compression_level)
    if mode == "a" and "time" not in ds.dims:
        raise ValueError("mode='a' appends dates, and the cube has no dimension 'time'. Type ds.expand_dims(time=[…])")
    cube, encoding = encoded(growing.by_date(ds) if grows else ds, reflectance, layout)
    with warnings.catch_warnings():
        # Version 3 does not standardise consolidated metadata yet; readers that do not know it lose nothing by it, and
        # the others open a cube in one request.
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        if is_repository(target):
            with place_of(target) as place:
                outcomes = _grow(place, cube, encoding, layout, mode, resume, progress=progress, tell=tell)
            _check_outcomes(target, outcomes)
            return None
        path = local_path(target)
        with sole_writer(target) as alive:
            if path:
                clear_up(path)
            exists = _check_target(target, path, "w" if grows else mode, compute=compute)
            job = Job(path or target, exists, alive, cube, encoding, layout)
            if not compute:
                return cube.to_zarr(
                    str(path) if path else target,
                    mode="w-",
                    encoding=encoding,
                    zarr_format=zarr_format,
                    consolidated=True,
                    compute=False,
                )
            if not grows:
                job.at_once(progress=progress)
            elif "time" not in ds.dims:
                _check_outcomes(target, job.resume_at_once(progress=progress, tell=tell))
            else:
                _check_outcomes(target, job.grow(mode, resume, progress=progress, tell=tell))
    return None


@dataclass(frozen=True)
class Job:
    """What is written to a Zarr store that this job alone writes to."""

    target: Any
    exists: bool
    alive: Alive
    cube: xr.Dataset
    encoding: dict[str, dict[str, Any]]
    layout: Layout

    def grow(
        self, mode: Mode | None, resume: bool, *, progress: bool, tell: Callable[[growing.Outcome], None] | None
    ) -> list[growing.Outcome]:
        """Write date by date: into the room that the store has, or is given."""
        if not self.exists and isinstance(self.target, Path):
            with beside(self.target) as new:
                place = Plain(new, self.alive)
                growing.make(place, self.cube, self.encoding, self.layout.zarr_format)
                place.commit("no date yet", 0)
        elif self.exists and isinstance(self.target, Path):
            clear_temporary(self.target)
        place = Plain(self.target, self.alive)
        return _grow(place, self.cube, self.encoding, self.layout, mode, resume, progress=progress, tell=tell)

    def at_once(self, *, progress: bool, record: bool = False) -> None:
        """Write all of the cube, which readers see when it is whole."""
        cube = growing.recorded(self.cube) if record else self.cube
        memory = in_memory(cube, self.encoding, self.layout.zarr_format)
        if isinstance(self.target, Path):
            if self.exists:
                check_replaceable(self.target)
            with beside(self.target) as new:
                growing.write_whole(Plain(new, self.alive), cube, memory, progress=progress)
        else:
            place = (Replacing if self.exists else Plain)(self.target, self.alive)
            growing.write_whole(place, cube, memory, progress=progress)

    def resume_at_once(
        self, *, progress: bool, tell: Callable[[growing.Outcome], None] | None
    ) -> list[growing.Outcome]:
        """Write a cube without dates, unless its store is complete."""
        began, error = time.monotonic(), ""
        state: growing.State = "kept"
        if self.exists:
            growing.check_same(Plain(self.target, self.alive), self.cube, self.encoding, whole=True)
        if not self.exists or not growing.status(self.target).item():
            try:
                self.at_once(progress=progress, record=True)
                state = "written"
            except Exception as problem:
                if growing.no_room(problem):
                    raise
                state, error = "failed", without_secrets(f"{type(problem).__name__}: {problem}")
        outcome = growing.Outcome("", state, round(time.monotonic() - began, 3), error)
        growing.told(self.target, outcome, tell)
        return [outcome]


def _grow(
    place: Place,
    cube: xr.Dataset,
    encoding: Mapping[str, Mapping[str, Any]],
    layout: Layout,
    mode: Mode | None,
    resume: bool,
    *,
    progress: bool,
    tell: Callable[[growing.Outcome], None] | None,
) -> list[growing.Outcome]:
    if place.documents is None:
        growing.make(place, cube, encoding, layout.zarr_format)
    else:
        growing.repair(place)
        cube = growing.as_stored(place, cube)
        growing.check_same(place, cube, encoding, whole=mode != "a")
        if mode == "a":
            appended = growing.append(place, cube, keep=resume)
            for outcome in appended.refused:
                growing.told(growing.shown(place), outcome, tell)
            outcomes = growing.fill(place, appended.cube, progress=progress, tell=tell, reasons=appended.reasons)
            return sorted([*appended.refused, *outcomes], key=lambda outcome: outcome.date)
    return growing.fill(place, cube, progress=progress, tell=tell)


def _check_outcomes(target: Any, outcomes: list[growing.Outcome]) -> None:
    if any(outcome.state == "failed" for outcome in outcomes):
        raise growing.PartialFailure(target, outcomes)


def _check_target(target: Any, path: Path | None, mode: Mode | None, *, compute: bool) -> bool:
    """Return whether a store is there already; raise where writing would destroy something, or be lost."""
    exists = _exists(str(path) if path else target)
    if exists and mode != "w":
        raise FileExistsError(f"{target} holds a Zarr store already. Type mode='w' to replace it, or name another")
    if exists and not compute:
        raise ValueError(f"{target} is replaced once the new pixels are written, but compute=False puts them off")
    if path and path.exists() and not exists and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{target} exists and is no Zarr store: it is never replaced. Name another")
    return exists


def _exists(target: Any) -> bool:
    import zarr

    try:
        zarr.open(target, mode="r")
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: version 2 without its metadata
        return False
    return True


def _in_memory(target: Any) -> bool:
    if is_repository(target):
        # Nothing else tells: ObjectStorage(backend=InMemory… is Icechunk 1's, "type: in-memory" in a line is 2's.
        return re.search(r"^(ObjectStorage\(backend=InMemory|type: in-memory$)", repr(target.storage), re.M) is not None
    return memory_of(target) is not None
