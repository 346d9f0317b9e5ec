"""Kills at every write: what readers find then, and whether the same call completes the job.

Jobs run in this process. From their n-th change of a store on, every change raises `Killed`, so that nothing is tidied
up either; for each n a reader opens the store before the job is run again.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch
from uuid import uuid4

import dask.array as da
import icechunk
import numpy as np
import obstore
import rasterio
import rioxarray  # noqa: F401 - registers .rio
import torch
import xarray as xr
import zarr.storage
import zarr.storage._local
from zarr.storage import LocalStore, MemoryStore, WrapperStore

import xr_ginet
from xr_ginet import folders
from xr_ginet.documents import at, get, keys, put
from xr_ginet.overviews import halved


class Killed(BaseException):
    """The job is dead."""


class Fate:
    """Counts changes, and ends the job before one of them."""

    def __init__(self) -> None:
        self.count, self.last, self._lock = 0, 1 << 60, threading.Lock()

    def strikes(self) -> None:
        with self._lock:
            self.count += 1
            if self.count >= self.last:
                raise Killed

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that is not called any more when the job is dead."""

        def mortal(*arguments: Any, **options: Any) -> Any:
            self.strikes()
            return function(*arguments, **options)

        return mortal


class Mortal(WrapperStore):
    """A store whose changes are counted."""

    def __init__(self, store: Any, fate: Fate) -> None:
        super().__init__(store)
        self.fate = fate

    def _with_store(self, store: Any) -> Mortal:
        return Mortal(store, self.fate)

    async def set(self, key: str, value: Any) -> None:
        self.fate.strikes()
        await self._store.set(key, value)

    async def set_if_not_exists(self, key: str, value: Any) -> None:
        self.fate.strikes()
        await self._store.set_if_not_exists(key, value)

    async def delete(self, key: str) -> None:
        self.fate.strikes()
        await self._store.delete(key)

    async def delete_dir(self, prefix: str) -> None:
        for key in [key async for key in self._store.list_prefix(f"{prefix.rstrip('/')}/" if prefix else "")]:
            await self.delete(key)


@contextmanager
def mortal_folders(fate: Fate) -> Iterator[None]:
    """Count what is done to files: writes, renames, exchanges and deletions."""

    def emptied(folder: Path, **options: Any) -> None:
        for path in sorted(Path(folder).rglob("*"), reverse=True):
            fate.strikes()
            path.rmdir() if path.is_dir() else path.unlink()
        fate.strikes()
        Path(folder).rmdir()

    def half(content: Any, file: Any) -> None:
        file.write(b"half of it")
        fate.strikes()
        file.seek(0)
        save(content, file)

    save = torch.save
    names = ((zarr.storage._local, "_put"), (folders, "_swapped"), (LocalStore, "delete"))
    with ExitStack() as stack:
        for owner, name in (*names, *((Path, name) for name in ("rename", "replace", "unlink"))):
            stack.enter_context(patch.object(owner, name, fate.before(getattr(owner, name))))
        stack.enter_context(patch.object(folders.shutil, "rmtree", emptied))
        stack.enter_context(patch.object(torch, "save", half))
        yield


@contextmanager
def mortal_repositories(fate: Fate) -> Iterator[None]:
    """Count what is done to Icechunk repositories."""
    repository = ("create_branch", "reset_branch", "delete_branch")
    names = [(icechunk.IcechunkStore, "set"), (icechunk.IcechunkStore, "delete"), (icechunk.Session, "commit")]
    with ExitStack() as stack:
        for owner, name in names + [(icechunk.Repository, name) for name in repository]:
            stack.enter_context(patch.object(owner, name, fate.before(getattr(owner, name))))
        yield


def cube(n_times: int, *, seed: int = 0, side: int = 4) -> xr.Dataset:
    """Return a tiny cube, lazy, the items of its dates along time."""
    rng = np.random.default_rng(seed)
    times = np.datetime64("2024-05-01", "ns") + np.arange(n_times) * np.timedelta64(5, "D")
    coords = {"time": times, "y": 4.9e6 - 10.0 * np.arange(side), "x": 6e5 + 10.0 * np.arange(side)}
    data = {band: rng.random((6, side, side), "float32")[:n_times] for band in ("B02", "B05")}
    bands = {band: (("time", "y", "x"), da.from_array(values, (1, side, side))) for band, values in data.items()}
    items = np.array([f"item {seed} {'i' * i}" for i in range(n_times)], object)
    return xr.Dataset(bands, coords).rio.write_crs(32630).assign_coords(source=("time", items))


class Folder:
    """A store in a folder, named by path."""

    def __init__(self, zarr_format: int, root: Path) -> None:
        self.zarr_format, self.root = zarr_format, root

    def new(self, fate: Fate, like: Any = None) -> Path:
        target = self.root / uuid4().hex / "cube.zarr"
        target.parent.mkdir()
        if like is not None:
            (shutil.copytree if like.is_dir() else shutil.copy)(like, target)
        return target

    def mortal(self, fate: Fate) -> Any:
        return mortal_folders(fate)

    def opened(self, target: Any) -> xr.Dataset:
        return xr.open_zarr(target)

    def content(self, target: Any) -> dict[str, bytes]:
        # The lock of a job that was killed when it freed it stays until the next job that writes there.
        files = [path for path in target.parent.rglob("*") if path.is_file() and path.suffix != ".lock"]
        return {str(path.relative_to(target.parent)): path.read_bytes() for path in files}


class Objects(Folder):
    """An object store: a lease, no renaming."""

    def inner(self) -> Any:
        return zarr.storage.ObjectStore(obstore.store.MemoryStore())

    def new(self, fate: Fate, like: Any = None) -> Any:
        store = self.inner()
        if like is not None:
            for key in keys(at(like)):
                put(at(store), key, get(at(like), key) or b"")
        return Mortal(store, fate)

    @contextmanager
    def mortal(self, fate: Fate) -> Iterator[None]:
        yield

    def content(self, target: Any) -> dict[str, bytes]:
        return {key: get(at(target), key) or b"" for key in keys(at(target))}


class Memory(Objects):
    def inner(self) -> Any:
        return MemoryStore()


class Fsspec(Objects):
    def inner(self) -> Any:
        return zarr.storage.FsspecStore.from_url(f"memory://{uuid4().hex}")


class Repositories(Folder):
    """An Icechunk repository in a folder."""

    def new(self, fate: Fate, like: Any = None) -> Any:
        folder = self.root / uuid4().hex
        if like is not None:
            shutil.copytree(like.folder, folder)
        open_ = icechunk.Repository.open if like is not None else icechunk.Repository.create
        repository = open_(icechunk.local_filesystem_storage(str(folder)))
        repository.folder = folder
        return repository

    def mortal(self, fate: Fate) -> Any:
        return mortal_repositories(fate)

    def opened(self, target: Any) -> xr.Dataset:
        return xr.open_zarr(target.readonly_session("main").store, consolidated=False)

    def content(self, target: Any) -> dict[str, bytes]:
        assert target.list_branches() == {"main"}
        with self.opened(target).load() as stored:
            return {str(name): np.asarray(v.values).tolist() for name, v in stored.variables.items()}


@dataclass
class Operation:
    """What is done to a store, from a cube that is there or from none."""

    name: str
    before: Callable[[Any, int], Any] | None
    job: Callable[[Any, int], Any]
    fine: Callable[[xr.Dataset | None], bool]
    """Whether what a reader finds, or None for no cube, is whole."""
    recorded: bool = True
    read: Callable[[Any], Any] | None = None
    """How a reader opens what was made, if it is no cube; such things are made in folders alone."""


def _holds(stored: xr.Dataset, *wholes: xr.Dataset) -> list[bool]:
    """Return of each date whether it is that of one of some cubes, in all of its variables."""
    return [
        any(
            whole.sizes["time"] > i
            and all(np.array_equal(stored[n][i], whole[n][i]) for n in ("time", "source", "B02", "B05"))
            for whole in wholes
        )
        for i in range(stored.sizes["time"])
    ]


def _same(stored: xr.Dataset, whole: xr.Dataset) -> bool:
    return stored.sizes == whole.sizes and all(_holds(stored, whole)) and bool((stored["y"] == whole["y"]).all())


NEW = cube(3, seed=1).isel(time=[1])
OPERATIONS = [
    Operation(
        "create",
        None,
        lambda target, version: cube(2).ginet.to_zarr(target, resume=True, zarr_format=version),
        lambda found: found is None or all(_holds(found, cube(2))),
    ),
    Operation(
        "create at once",
        None,
        lambda target, version: cube(2).ginet.to_zarr(target, zarr_format=version),
        lambda found: found is None or _same(found, cube(2)),
        recorded=False,
    ),
    Operation(
        "create without dates",
        None,
        lambda target, version: cube(1).isel(time=0).ginet.to_zarr(target, resume=True, zarr_format=version),
        lambda found: found is None or np.array_equal(found["B05"], cube(1)["B05"][0]),
    ),
    Operation(
        "append",
        lambda target, version: cube(2).ginet.to_zarr(target, mode="a", zarr_format=version),
        lambda target, version: cube(4).ginet.to_zarr(target, mode="a", resume=True, zarr_format=version),
        lambda found: found is not None and found.sizes["time"] >= 2 and all(_holds(found, cube(4))),
    ),
    Operation(
        "overwrite",
        lambda target, version: cube(3).ginet.to_zarr(target, mode="a", zarr_format=version),
        lambda target, version: NEW.ginet.to_zarr(target, mode="a", zarr_format=version),
        lambda found: found is not None and found.sizes["time"] >= 1 and all(_holds(found, cube(3), cube(3, seed=1))),
    ),
    Operation(
        "replace",
        lambda target, version: cube(2).ginet.to_zarr(target, zarr_format=version),
        lambda target, version: cube(3, seed=2, side=6).ginet.to_zarr(target, mode="w", zarr_format=version),
        lambda found: found is not None and (_same(found, cube(2)) or _same(found, cube(3, seed=2, side=6))),
        recorded=False,
    ),
]


def _pyramid(target: Path) -> tuple[xr.DataTree | None, xr.Dataset]:
    """Return what readers see of a pyramid: the tree, if the group is described, and its finest member."""
    described = (target / "zarr.json").exists()
    return xr.open_datatree(target, engine="zarr").load() if described else None, xr.open_zarr(target / "10m").load()


def _levels_are_whole(found: tuple[xr.DataTree | None, xr.Dataset]) -> bool:
    tree, finest = found
    if tree is None:
        return True
    coarser = halved(finest)
    return set(tree.children) <= {"10m", "20m"} and all(
        np.array_equal(tree["20m"]["B05"][i], coarser["B05"][i]) for i in range(tree["20m"].sizes["time"])
    )


def _grown(target: Path) -> None:
    cube(2).ginet.to_zarr(target / "10m", mode="a")
    xr_ginet.build_overviews(target / "10m", levels=1)
    cube(3).ginet.to_zarr(target / "10m", mode="a", resume=True)


def _images(seed: int, target: Path) -> None:
    cube(1, seed=seed).drop_vars("source").ginet.to_cog(target, overwrite=True)


def _pixels(target: Path) -> list[float]:
    """Return the mean of each image: a file that is not whole cannot be read."""
    means = []
    for path in sorted(target.glob("[!.]*.tif")):
        with rasterio.open(path) as file:
            means.append(round(float(file.read(1).mean()) * 1e-4 - 0.1, 3))
    return means


def _state(number: int, target: Path) -> None:
    from xr_ginet.training.fit import _StateFile

    _StateFile().save_checkpoint({"state": torch.full((1000,), float(number))}, target)


BESIDE = [
    Operation(
        "overviews",
        lambda target, version: cube(2).ginet.to_zarr(target / "10m", mode="a"),
        lambda target, version: xr_ginet.build_overviews(target / "10m", levels=1),
        _levels_are_whole,
        recorded=False,
        read=_pyramid,
    ),
    Operation(
        "overviews of an appended date",
        lambda target, version: _grown(target),
        lambda target, version: xr_ginet.build_overviews(target / "10m", levels=1),
        _levels_are_whole,
        recorded=False,
        read=_pyramid,
    ),
    Operation(
        "overviews of a plain cube, again",
        lambda target, version: [
            cube(2).ginet.to_zarr(target / "10m"),
            xr_ginet.build_overviews(target / "10m", levels=1),
        ],
        lambda target, version: xr_ginet.build_overviews(target / "10m", levels=1),
        _levels_are_whole,
        recorded=False,
        read=_pyramid,
    ),
    Operation(
        "COG",
        lambda target, version: _images(0, target),
        lambda target, version: _images(1, target),
        lambda found: (
            len(found) == 2
            and all(
                any(abs(mean - float(cube(1, seed=seed)[band].mean())) < 0.001 for seed in (0, 1))
                for mean, band in zip(found, ("B02", "B05"), strict=True)
            )
        ),
        recorded=False,
        read=_pixels,
    ),
    Operation(
        "training state",
        lambda target, version: _state(1, target),
        lambda target, version: _state(2, target),
        lambda found: found in (1, 2),
        recorded=False,
        read=lambda target: float(torch.load(target, weights_only=True)["state"].mean()),
    ),
]


def places(root: Path) -> dict[str, Folder]:
    """Return the kinds of stores, by name."""
    return {
        "folder, Zarr 3": Folder(3, root),
        "folder, Zarr 2": Folder(2, root),
        "obstore, Zarr 3": Objects(3, root),
        "obstore, Zarr 2": Objects(2, root),
        "fsspec, Zarr 3": Fsspec(3, root),
        "memory, Zarr 3": Memory(3, root),
        "Icechunk": Repositories(3, root),
    }


def possible(operation: Operation, kind: str) -> bool:
    """Return whether a kind of store knows an operation."""
    if operation.read:
        return kind == "folder, Zarr 3"
    if kind == "Icechunk":
        return operation.recorded
    # On object stores of version 2 a cube of other dates is not replaced: it would need the same keys.
    return (operation.name, kind) != ("replace", "obstore, Zarr 2")


@dataclass
class Found:
    """What a series of kills has shown."""

    moments: int = 0
    unreadable: int = 0
    parts: int = 0
    incomplete: int = 0
    first: str = ""
    """Where and what, of the first fault."""

    @property
    def faults(self) -> int:
        return self.unreadable + self.parts + self.incomplete

    def note(self, kind: str, n: int, what: object) -> None:
        setattr(self, kind, getattr(self, kind) + 1)
        self.first = self.first or f"{kind} when killed before change {n}: {what}"[:2000]


def killed_at_every_change(operation: Operation, place: Folder, step: int = 1, offset: int = 0) -> Found:
    """Kill an operation before each of its changes, or before each ``step``-th; return what was found."""
    template, fate = None, Fate()
    if operation.before:
        template = place.new(Fate())
        operation.before(template, place.zarr_format)
    undisturbed = place.new(fate, template)
    with place.mortal(fate):
        operation.job(undisturbed, place.zarr_format)
    expected, found = place.content(undisturbed), Found()
    for n in range(1 + offset, fate.count + 1, step):
        mine = Fate()
        target = place.new(mine, template)
        mine.count, mine.last = 0, n
        with place.mortal(mine), suppress(Killed):
            operation.job(target, place.zarr_format)
        mine.last = 1 << 60
        found.moments += 1
        try:
            stored: Any = operation.read(target) if operation.read else place.opened(target).load()
        except FileNotFoundError:
            stored = None
        except Exception as error:
            found.note("unreadable", n, repr(error))
            stored = None
        if not operation.fine(stored):
            found.note("parts", n, stored)
        try:
            operation.job(target, place.zarr_format)
            content = place.content(target)
        except Exception as error:
            if not (isinstance(error, FileExistsError) and operation.name == "create at once"):  # whole already
                found.note("incomplete", n, repr(error))
                continue
            content = place.content(target)
        if operation.name == "replace" and isinstance(place, Objects):  # old and new keys take turns
            with place.opened(target).load() as one, place.opened(undisturbed).load() as other:
                same = one.identical(other) and len(content) == len(expected)
        else:
            same = content == expected
        if not same:
            differ = {k for k in {*content, *expected} if content.get(k) != expected.get(k)}
            found.note("incomplete", n, f"differ: {sorted(differ)}")
        elif operation.recorded and not xr_ginet.status(target, verify=True).all():
            found.note("incomplete", n, "checksums")
    return found


def rows(root: Path, step: int = 1) -> Iterator[list[str]]:
    """Kill all operations in all kinds of stores; yield what was found, a row for each."""
    for operation in (*OPERATIONS, *BESIDE):
        for kind, place in places(root).items():
            if possible(operation, kind):
                found = killed_at_every_change(operation, place, step)
                if found.faults:
                    print(operation.name, kind, found.first)
                counts = (found.moments, found.unreadable, found.parts, found.incomplete)
                yield [operation.name, kind, *map(str, counts)]
