"""The one thread that networks run on, and the memory that it uses again.

For a large tensor glibc asks the kernel for fresh pages, which are zeroed one by one, and gives them back after it: on
blocks of 1024² pixels that takes longer than the network's arithmetic. Its main heap keeps them. But only some threads
take their memory from there; a Dask worker's usually take what is above 64 MB from the kernel nevertheless. So networks
run on a thread of our own, one that does.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

MALLOPT = {-4: 0, -1: 2**31 - 1, -2: 2**26, -8: 1}
"""M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD, M_ARENA_MAX of glibc: no mappings, a heap that does not shrink by itself,
and no more heaps than there are."""

IDLE_SECONDS = 1.0
"""After which all free memory goes back to the system."""

_lock = threading.Lock()
_idle: list[threading.Timer] = []
"""The one that will give memory back, after the first call."""


def one_at_a_time(function: Callable[..., Any], *arguments: Any, large: bool = True) -> Any:
    """Return ``function(*arguments)``, called on the one thread of this process that networks run on.

    Where no ``large`` tensors are in the processor's memory, as on CUDA devices, that memory is left as it is.
    """
    with _lock:
        thread = _thread(large)
    return (thread.submit(_call, function, arguments) if large else thread.submit(function, *arguments)).result()


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    for timer in _idle:
        timer.cancel()
    try:
        return function(*arguments)
    finally:
        if libc := glibc():
            _idle[:] = [threading.Timer(IDLE_SECONDS, libc.malloc_trim, (0,))]
            _idle[0].daemon = True
            _idle[0].start()


@lru_cache(maxsize=2)
def _thread(large: bool) -> ThreadPoolExecutor:
    """Return the thread; for large tensors and with glibc one of the main heap, if any of those to be had is."""
    pools = [ThreadPoolExecutor(1, "ginet")]
    most = 8 * (os.cpu_count() or 1) + 1  # heaps of a process; from then on threads share them, the main one first
    while large and glibc() and not pools[-1].submit(_is_on_main_heap).result() and len(pools) < most:
        pools.append(ThreadPoolExecutor(1, "ginet"))  # while the others hold their heaps, so that it gets another one
    for pool in pools[:-1]:
        pool.shutdown()
    return pools[-1]


if hasattr(os, "register_at_fork"):  # Windows has no forks
    os.register_at_fork(after_in_child=_thread.cache_clear)


@lru_cache(maxsize=1)
def glibc() -> Any:
    """Return the C library, told to use its heap, where it is glibc; else None."""
    try:
        libc = ctypes.CDLL(None)
        libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
        libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
        for parameter, value in MALLOPT.items():
            libc.mallopt(parameter, value)
    except (OSError, TypeError, AttributeError):
        return None
    return libc


def _is_on_main_heap() -> bool:
    """Return whether memory that this thread asks for lies below the program's break, where no mapping is."""
    libc = glibc()
    memory = libc.malloc(2**20)
    libc.free(memory)
    return memory is not None and memory < libc.sbrk(0)
