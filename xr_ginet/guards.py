"""One writer per store, whatever kind of store it is.

A folder has a lock file beside it, which the system frees when a job ends in any way. A store in this process's memory
has a lock in it. Other stores hold a lease: an object that says who writes, renewed while the job lives. A job that is
found dead, or has not renewed its lease for two minutes, has lost it; it finds that out before it shows anything.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from uuid import uuid4

from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore, StorePath

from .documents import at, delete, get, put
from .folders import local_path
from .sentinel2.addresses import without_secrets

LEASE = ".ginet-lease"
"""Key of the object that says which job writes to a store."""

RENEWED, EXPIRED = 20.0, 120.0
"""Seconds between renewals, and without one after which a job is taken for dead."""

Alive = Callable[[], None]
"""What raises where a job has lost its store to another."""

_held: set[str] = set()
"""What this process writes: identities of stores in memory, and leases."""

_holding = threading.Lock()


class Slot(Protocol):
    """Where one lease lies."""

    def read(self) -> str | None:
        """Return the lease that is there."""
        ...

    def claim(self, lease: str) -> None:
        """Put a lease where there is none; where two do at once, one of them is there afterwards."""
        ...

    def renew(self, old: str, new: str) -> None:
        """Put a lease in the place of another."""
        ...

    def free(self, lease: str) -> None:
        """Take a lease away."""
        ...


@contextmanager
def sole_writer(target: Any) -> Iterator[Alive]:
    """Be the only job that writes to a store.

    Raises
    ------
    RuntimeError
        If another one does.
    """
    path = local_path(target)
    if path is not None:
        with locked(path.with_name(f"{path.name}.lock"), path):
            yield lambda: None
    elif (identity := memory_of(target)) is not None:
        with _holding:
            if identity in _held:
                raise _busy(target)
            _held.add(identity)
        try:
            yield lambda: None
        finally:
            _held.discard(identity)
    else:
        with leased(KeySlot(target), target) as alive:
            yield alive


def _busy(target: Any, who: str = "", remedy: str = "Wait for it, or stop it") -> RuntimeError:
    job = f"another job {who}".rstrip()
    return RuntimeError(f"{job} is writing {without_secrets(str(target))}: two would write the same chunks. {remedy}")


def memory_of(target: Any) -> str | None:
    """Return what identifies a store that lies in this process's memory, or None for any other."""
    while isinstance(inner := getattr(target, "_store", None), object) and inner is not None:
        target = inner
    if isinstance(target, StorePath):
        inner = memory_of(target.store)
        return None if inner is None else f"{inner}/{target.path}"
    if isinstance(target, dict):
        return f"dict-{id(target)}"
    if isinstance(target, MemoryStore):
        return f"dict-{id(target._store_dict)}"
    fs = getattr(target, "fs", None)
    if type(getattr(fs, "sync_fs", fs)).__name__ == "MemoryFileSystem":
        return f"memory://{str(getattr(target, 'path', None) or getattr(target, 'root', '')).strip('/')}"
    if isinstance(target, str) and target.startswith("memory://"):
        return f"memory://{target.removeprefix('memory://').strip('/')}"
    return None


@contextmanager
def locked(file: Path, target: Any) -> Iterator[None]:
    """Hold a lock file, which is gone afterwards; where its folder is not there yet, it is made."""
    missing = [folder for folder in (file.parent, *file.parents) if not folder.exists()]
    file.parent.mkdir(parents=True, exist_ok=True)
    handle = _lock(file, target)
    try:
        yield
    finally:
        handle()
        for folder in missing:  # a refused call leaves none behind
            with suppress(OSError):
                folder.rmdir()


def _lock(file: Path, target: Any) -> Callable[[], None]:
    """Lock a file; return what unlocks it."""
    try:
        import fcntl
    except ImportError:  # Windows
        from filelock import FileLock, Timeout

        lock = FileLock(file, timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise _busy(target) from error
        return lock.release
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise _busy(target) from error
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), file.stat()):
                break
        os.close(handle)  # its holder has deleted it meanwhile

    def unlock() -> None:
        try:
            file.unlink(missing_ok=True)
        finally:
            os.close(handle)

    return unlock


class Lease(NamedTuple):
    """Who writes to a store, and that it lived; as text short enough for the name of a branch."""

    host: str
    """What this machine is called, since it was started, and the container; a digest of it."""
    pid: int
    started: str
    """When the process was started, as its system counts; empty where it does not tell."""
    token: str
    renewed: int
    """Milliseconds since 1970."""

    @classmethod
    def read(cls, text: str) -> Lease | None:
        """Return what a lease says, or None where it is none."""
        parts = text.split(".")
        if len(parts) != 5 or not (parts[1].isdigit() and parts[4].isdigit()):
            return None
        return cls(parts[0], int(parts[1]), parts[2], parts[3], int(parts[4]))

    def __str__(self) -> str:
        return ".".join(map(str, self))

    @property
    def lives(self) -> bool:
        """Whether the job lives, as far as can be told from here."""
        if self.host == _host() and self.pid == os.getpid():
            return self.token in _held
        if self.host == _host() and self.started:
            return _started(self.pid) == self.started
        return abs(_now() - self.renewed) < EXPIRED * 1000


@contextmanager
def leased(slot: Slot, target: Any) -> Iterator[Alive]:
    """Hold the lease of a store, and renew it in a thread of its own."""
    mine = Lease(_host(), os.getpid(), _started(os.getpid()), uuid4().hex[:16], _now())
    _held.add(mine.token)
    ended, lost = threading.Event(), threading.Event()
    current = [str(mine)]

    def holds() -> bool:
        found = Lease.read(slot.read() or "")
        return found is not None and found.token == mine.token

    def renew() -> None:
        while not ended.wait(RENEWED):
            with suppress(Exception):  # a store that fails for a while may be back the next time
                if not holds():
                    lost.set()
                    return
                new = str(mine._replace(renewed=_now()))
                slot.renew(current[0], new)
                current[0] = new

    def alive() -> None:
        if lost.is_set() or not holds():
            raise _busy(target, "has taken this one for dead, and", "What this job has shown is whole")

    thread = threading.Thread(target=renew, name="ginet-lease", daemon=True)
    try:
        while (known := slot.read()) is not None:
            if (other := Lease.read(known)) is not None and other.lives:
                raise _busy(target, f"(process {other.pid} on {_place(other)})", _remedy(slot))
            slot.free(known)
        slot.claim(current[0])
        if not holds():
            raise _busy(target, "", _remedy(slot))
        thread.start()
        yield alive
    finally:
        ended.set()
        try:
            if thread.ident is not None:
                thread.join()
                if not lost.is_set() and holds():
                    slot.free(current[0])
        finally:
            _held.discard(mine.token)


class KeySlot:
    """A lease in an object of the store itself."""

    def __init__(self, target: Any) -> None:
        self.place = at(target)

    def read(self) -> str | None:
        """Return what the object says."""
        found = get(self.place, LEASE)
        return None if found is None else found.decode()

    def claim(self, lease: str) -> None:
        """Put the object on condition that there is none, where the store can do that."""
        where = self.place / LEASE
        content = default_buffer_prototype().buffer.from_bytes(lease.encode())
        fs: Any = getattr(self.place.store, "fs", None)
        if type(fs).__module__.startswith("s3fs"):
            with suppress(FileExistsError):
                root = getattr(self.place.store, "path", "")
                sync(fs._pipe_file(f"{root}/{where.path}", lease.encode(), mode="create"))
            return
        sync(where.set_if_not_exists(content))

    def renew(self, old: str, new: str) -> None:
        """Put the object again."""
        put(self.place, LEASE, new.encode())

    def free(self, lease: str) -> None:
        """Delete the object."""
        delete(self.place, LEASE)


def _now() -> int:
    return int(time.time() * 1000)


@cache
def _host() -> str:
    parts = [socket.gethostname()]
    for read in (lambda: Path("/proc/sys/kernel/random/boot_id").read_text(), lambda: os.readlink("/proc/self/ns/pid")):
        with suppress(OSError):
            parts.append(read().strip())
    return blake2b(" ".join(parts).encode(), digest_size=8).hexdigest()


def _started(pid: int) -> str:
    """Return when a process was started; empty where the system does not tell, or there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _place(lease: Lease) -> str:
    return "this machine" if lease.host == _host() else "another machine"


def _remedy(slot: Slot) -> str:
    what = f"delete {LEASE} in the store" if isinstance(slot, KeySlot) else "delete the branch that begins ginet-lease"
    return f"Wait for it, or stop it. Where it is dead, wait for {EXPIRED:.0f} s, or {what}"
