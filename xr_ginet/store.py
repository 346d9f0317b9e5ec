"""Cubes in Zarr: one chunk of the store per Dask chunk, encodings that survive the round trip."""

from __future__ import annotations

import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import xarray as xr

from . import growing
from .encoding import Encoding, Layout, StoredDtype, encoded, encoding_of
from .paths import expanded
from .schedulers import workers_elsewhere
from .sentinel2.provenance import loaded
from .sentinel2.times import in_microseconds
from .transactions import is_repository, place_of, write_pixels

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
        raise ValueError(f"{target} lies in this process's memory, where a cluster's workers cannot write. Name a path")
    layout = Layout(zarr_format, inner_chunks, compression_level)
    path = _local_path(target)
    exists = False if is_repository(target) else _check_target(target, path, "w" if grows else mode, compute=compute)
    if grows:
        _grow(ds, path or target, mode, resume, reflectance, layout, progress, tell)
        return None
    cube, encoding = encoded(ds, reflectance, layout)
    # An existing local store is replaced when the new one is whole: until then it can be read, even by this very cube.
    beside = path.with_name(f"{path.name}.{uuid4().hex}") if path and exists else None
    place = str(beside or path) if path else target
    options: dict[str, Any] = {
        "mode": "w" if exists and not path else "w-",
        "encoding": encoding,
        "zarr_format": zarr_format,
        "consolidated": True,
    }
    with warnings.catch_warnings():
        # Version 3 does not standardise consolidated metadata yet; readers that do not know it lose nothing by it, and
        # the others open a cube in one request.
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        if not compute:
            return cube.to_zarr(place, compute=False, **options)
        try:
            write_pixels(cube, place, progress=progress, **options)
        except BaseException:
            if beside:
                _discard(beside)
            raise
    if path and beside:
        _replace(path, beside)
    return None


def _grow(
    ds: xr.Dataset,
    target: Any,
    mode: Mode | None,
    resume: bool,
    reflectance: Encoding,
    layout: Layout,
    progress: bool,
    tell: Callable[[growing.Outcome], None] | None,
) -> None:
    """Write a cube date by date: into the room that its store has, or is given."""
    if mode == "a" and "time" not in ds.dims:
        raise ValueError("mode='a' appends dates, and the cube has no dimension 'time'. Type ds.expand_dims(time=[…])")
    dates = ds.chunk(time=1) if "time" in ds.dims else ds
    cube, encoding = encoded(dates, reflectance, layout)
    cube = growing.with_static(cube)
    with warnings.catch_warnings(), _sole_writer(target), place_of(target) as place:
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        if not _exists(str(target) if isinstance(target, Path) else place.store):
            _make_room(cube, place.store, encoding, layout.zarr_format)
        else:
            growing.repair(place.store)
            growing.check_same(place.store, cube, encoding, whole=mode != "a")
            if mode == "a":
                growing.append(place.store, cube, keep=resume)
        outcomes = growing.fill(place, cube, progress=progress, tell=tell)
    if any(outcome.state == "failed" for outcome in outcomes):
        raise growing.PartialFailure(target, outcomes)


def _make_room(cube: xr.Dataset, target: Any, encoding: dict[str, dict[str, Any]], zarr_format: int) -> None:
    """Write all of a cube but its dates' pixels; a local store appears when that is whole."""
    new = growing.recorded(cube)
    encoding = encoding | {growing.CHECKSUM: {"chunks": (1,) * new[growing.CHECKSUM].ndim}}
    options: dict[str, Any] = {"mode": "w-", "zarr_format": zarr_format, "consolidated": True, "compute": False}
    if not isinstance(target, Path):
        new.to_zarr(target, encoding=encoding, **options)
        return
    beside = target.with_name(f"{target.name}.{uuid4().hex}")
    try:
        new.to_zarr(beside, encoding=encoding, **options)
        beside.rename(target)
    except BaseException:
        _discard(beside)
        raise


@contextmanager
def _sole_writer(target: Any) -> Iterator[None]:
    """Refuse where another job grows the same local store; the system frees the lock of a job that was killed."""
    if not isinstance(target, Path):
        yield
        return
    from filelock import FileLock, Timeout

    lock = FileLock(target.with_name(f"{target.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise RuntimeError(
            f"another job is writing {target}: two would write the same chunks. Wait for it, or stop it"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _local_path(target: Any) -> Path | None:
    """Return where a target lies in this machine's files, or None where it does not."""
    from zarr.storage import LocalStore

    if isinstance(target, LocalStore):
        return Path(target.root)
    if isinstance(target, str):
        target = target.removeprefix("file://")
        return None if "://" in target else Path(target)
    return target if isinstance(target, Path) else None


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


def _discard(folder: Path) -> None:
    """Delete a folder into which tasks of a computation that failed may still be writing."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


def _replace(old: Path, new: Path) -> None:
    """Put a folder in the place of another, which is deleted last."""
    place = old.resolve()  # a link stays a link
    aside = new.with_name(f"{new.name}.old")
    place.rename(aside)
    new.rename(place)
    shutil.rmtree(aside)


def _in_memory(target: Any) -> bool:
    from zarr.storage import MemoryStore

    if is_repository(target):
        # Nothing else tells: ObjectStorage(backend=InMemory… is Icechunk 1's, "type: in-memory" in a line is 2's.
        return re.search(r"^(ObjectStorage\(backend=InMemory|type: in-memory$)", repr(target.storage), re.M) is not None
    return isinstance(target, MemoryStore | dict) or str(target).startswith("memory://")
