"""Stores that are folders of this machine: where they lie, and how one takes another's place at once."""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

LOCAL = ("file://", "local://")

TEMPORARY = re.compile(r".*\.[0-9a-f]{32}\.partial")
"""How Zarr names a file until all of it is written."""


def local_path(target: Any) -> Path | None:
    """Return where a target lies in this machine's files, links followed, or None where it does not."""
    if isinstance(target, str):
        begin = next((prefix for prefix in LOCAL if target.startswith(prefix)), "")
        if "://" in target.removeprefix(begin):
            return None
        return Path(target.removeprefix(begin)).expanduser().resolve()
    if isinstance(target, Path):
        return target.expanduser().resolve()
    root = _root_of(target)
    return Path(root).resolve() if root is not None else None


def _root_of(store: Any) -> Any:
    """Return the folder of a store object that keeps its keys in one: of Zarr, of fsspec, of obstore."""
    from zarr.storage import LocalStore, StorePath

    if isinstance(store, StorePath):
        root = _root_of(store.store)
        return None if root is None else Path(root) / store.path
    if isinstance(store, LocalStore):
        return store.root
    inner = getattr(store, "store", None)
    if type(inner).__module__.startswith("obstore") and type(inner).__name__ == "LocalStore":
        return getattr(inner, "prefix", None)
    fs = getattr(store, "fs", None)
    fs = getattr(fs, "sync_fs", fs)  # fsspec's wrapper of file systems that know no async
    if type(fs).__name__ == "LocalFileSystem":
        return getattr(store, "path", None) or getattr(store, "root", None)
    return None


def check_replaceable(path: Path) -> None:
    """Raise where a folder cannot be put in the place of one that exists; before anything is computed.

    Raises
    ------
    ValueError
        If the place is a file system of its own.
    PermissionError
        If its parent may not be written to.
    """
    if path.exists() and (path.is_mount() or path.stat().st_dev != path.parent.stat().st_dev):
        raise ValueError(
            f"{path} is a file system of its own, whose root cannot be replaced. Name a folder within it, "
            f"{path / 'cube.zarr'}"
        )
    if path.parent.exists() and not os.access(path.parent, os.W_OK):
        raise PermissionError(errno.EACCES, "no folder can be put beside the store that is to be replaced", str(path))


def is_temporary(name: str) -> bool:
    """Return whether a name is that of a store that was not finished, or was set aside."""
    return re.fullmatch(r".*\.[0-9a-f]{32}(\.old)?", name) is not None


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Have a folder that takes the place of a store when all of it is written; if that fails, nothing is left of it."""
    new = path.with_name(f"{path.name}.{uuid4().hex}")
    new.mkdir(parents=True)
    try:
        yield new
        exchange(path, new)
    except BaseException:
        discard(new)
        raise


def exchange(path: Path, new: Path) -> None:
    """Put a new folder in the place of what is there, which is deleted."""
    if not path.exists():
        new.rename(path)
        return
    if not _swapped(path, new):  # two renames: the shortest time without a store that such a system allows
        aside = path.with_name(f"{path.name}.{uuid4().hex}.old")
        path.rename(aside)
        new.rename(path)
        new = aside
    discard(new)


def _swapped(one: Path, other: Path) -> bool:
    """Exchange two folders at once; return whether system and file system can."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename(here, os.fsencode(one), here, os.fsencode(other), swap) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(one))


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Have a file beside another one, whose place it takes when all of it is on the disk."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):  # of jobs that were killed
        left.unlink(missing_ok=True)
    part = path.with_name(f".{path.name}.{uuid4().hex}.part")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def clear_up(path: Path) -> None:
    """Clear what killed jobs left beside a store that no other job writes; a store set aside comes back."""
    ours = re.compile(re.escape(path.name) + r"\.[0-9a-f]{32}(\.old)?")
    left = [p for p in (path.parent.iterdir() if path.parent.is_dir() else ()) if ours.fullmatch(p.name) and p.is_dir()]
    for folder in left:
        if folder.suffix == ".old" and not path.exists():
            folder.rename(path)
        else:
            discard(folder)


def clear_temporary(path: Path) -> None:
    """Delete the files that Zarr had begun to write in a store when a job was killed, and no others."""
    for begun in path.rglob("*.partial"):
        if TEMPORARY.fullmatch(begun.name):
            begun.unlink(missing_ok=True)


def discard(folder: Path) -> None:
    """Delete a folder into which tasks of a computation that failed may still be writing."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)
