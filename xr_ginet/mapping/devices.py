"""What CUDA devices need around arithmetic: copies beside it, precision."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

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
    """Let torch work with all 32 bits on CUDA devices; at the end they are done.

    torch's own default rounds the factors of convolutions to 19 bits.
    """
    import torch

    if not device.startswith("cuda"):
        yield
        return
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), torch.cuda.device(device):
        yield
        torch.cuda.current_stream().synchronize()
