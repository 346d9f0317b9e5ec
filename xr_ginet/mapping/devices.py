"""What processors and CUDA devices need around arithmetic: memory that is used again, copies beside it, precision."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING

from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

MALLOPT = {-4: 0, -1: 2**31 - 1, -2: 2**26}
"""M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD of glibc: no mappings, and a heap that does not shrink by itself."""

_threads = threading.local()


def choose_device(device: str) -> str:
    """Return a torch device: ``"auto"`` is CUDA where there is one, else the CPU."""
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


@contextmanager
def copying(device: str) -> Iterator[None]:
    """Let what is copied to and from a CUDA device pass by the block that is worked on there."""
    import torch

    if not device.startswith("cuda"):
        yield
        return
    streams = _threads.__dict__.setdefault("streams", {})
    stream = streams.get(device) or streams.setdefault(device, torch.cuda.Stream(device))
    with torch.cuda.stream(stream):
        yield
        stream.synchronize()


def to_host(result: torch.Tensor) -> NDArray:
    """Return an array, from a CUDA device by way of memory that it reaches by itself and that is used again."""
    import torch

    if not result.is_cuda:
        return result.numpy()
    return torch.empty(result.shape, dtype=result.dtype, pin_memory=True).copy_(result).numpy().copy()


@contextmanager
def arithmetic(device: str) -> Iterator[None]:
    """Let torch work fast and exactly: large tensors from the heap on processors, all 32 bits on CUDA devices.

    torch's own default there rounds the factors of convolutions to 19 bits. At the end the device is done.
    """
    import torch

    if not device.startswith("cuda"):
        give_back = heap()
        yield
        give_back()
        return
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), torch.cuda.device(device):
        yield
        torch.cuda.current_stream().synchronize()


@lru_cache(maxsize=1)
def heap() -> Callable[[], object]:
    """Let large tensors come from the heap, and return the function that gives its free pages back to the system.

    By default glibc maps each of them anew, and the kernel zeroes it page by page: on blocks of 560² pixels that took
    as long as the network's arithmetic. Elsewhere than with glibc nothing is done.
    """
    try:
        libc = ctypes.CDLL(None)
        for parameter, value in MALLOPT.items():
            libc.mallopt(parameter, value)
        trim = libc.malloc_trim
    except (OSError, TypeError, AttributeError):
        return lambda: None
    return lambda: trim(0)
