"""From checkpoint to a picklable function of numpy blocks.

A `Predictor` is a few strings: what to load, on which device, in which precision. The network is built once per
process, when the first block arrives, and shared by all tasks of that process; tasks carry no weights. One block runs
at a time per process, with all of the threads that the process may use: memory stays that of one block, and threads
are not oversubscribed. On a CUDA device the blocks of other threads are copied there and back meanwhile, and a block
that its memory does not hold is worked on in parts.
"""

from __future__ import annotations

import logging
import multiprocessing
import operator
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from dask.system import CPU_COUNT
from numpy.typing import NDArray

from .devices import arithmetic, choose_device, copying, to_host
from .heap import one_at_a_time
from .missing import FILL_RADIUS, fill_missing, output_mask
from .overlap import Window

if TYPE_CHECKING:
    import torch

    from ..network import Checkpoint, GINet, GINetConfig

Consistency = Literal["none", "exact"]
Precision = Literal["auto", "float32", "float64", "mixed", "bfloat16"]

_log = logging.getLogger(__name__)

_too_large: dict[Predictor, int] = {}
"""Pixels of the smallest block that did not fit a device's memory."""


@dataclass(frozen=True)
class Predictor:
    """The network of a checkpoint as a function of blocks.

    Raises
    ------
    ValueError
        If the precision is unknown, or the device is not there.
    """

    path: str
    """The checkpoint's file: on a cluster where every worker can read it, or sent to the workers before, with
    ``client.register_plugin(distributed.diagnostics.plugin.UploadFile(path, load=False))``."""
    sha256: str
    """Hash of the file, checked by whoever loads it."""
    factor: int
    """Resolution ratio of the network."""
    device: str = "cpu"
    """A torch device."""
    precision: Precision = "float32"
    """Of the arithmetic and of the output; ``mixed``: float32, but float16 in most convolutions, on CUDA devices;
    ``bfloat16``: float32, but bfloat16 in the residual blocks, on processors."""
    consistency: Consistency = "none"
    """``exact``: the mean of each block of the output is then made to equal its coarse pixel."""
    self_ensemble: bool = False
    """Average over the eight symmetries of the square, at eight times the cost."""
    depth: int | None = None
    """Fine pixels around the part of a block that is asked for which the network sees; None: all of them. What lies
    further away only fills gaps."""
    multiplied: Literal["float32", "bfloat16"] = "float32"
    """How ``bfloat16`` multiplies what it has rounded: the faster way where the graph was built, and then everywhere,
    so that it does not matter which worker of a cluster has a block."""

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        *,
        device: str = "auto",
        precision: Precision = "auto",
        consistency: Consistency = "none",
        self_ensemble: bool = False,
        depth: int | None = None,
        elsewhere: bool = False,
    ) -> Predictor:
        """Return the predictor of a checkpoint.

        ``device="auto"`` is CUDA where there is one, else the CPU; ``precision="auto"`` is mixed on CUDA devices, on
        processors bfloat16 where `network.bfloat16.is_faster` says so, else float32. All of it is decided now, here,
        whoever computes; whether a device is there is found out now, unless it will run ``elsewhere``.
        """
        import torch

        from ..network.bfloat16 import is_faster

        if precision not in (names := get_args(Precision)):
            raise ValueError(f"precision={precision!r}: must be one of {', '.join(names)}")
        if consistency not in ("none", "exact"):
            raise ValueError(f"consistency={consistency!r}: must be 'none' or 'exact'")
        device = choose_device(device)
        if precision == "auto":
            precision = _fastest(device)
        if precision == "mixed" and not device.startswith("cuda"):
            raise ValueError(
                f"precision='mixed' with device={device!r}: its float16 pays on CUDA devices. Type "
                "precision='bfloat16', or 'auto'"
            )
        if precision == "bfloat16" and device != "cpu":
            raise ValueError(
                f"precision='bfloat16' with device={device!r}: it is for processors. Type 'mixed', or 'auto'"
            )
        try:
            torch.ones(1, device="cpu" if elsewhere else device).cpu()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise ValueError(
                f"device={device!r}, but torch cannot use it here ({str(error).splitlines()[0]}). Type device='cpu' or "
                "device='auto'"
            ) from error
        return cls(
            str(checkpoint.path),
            checkpoint.sha256,
            checkpoint.config.factor,
            device,
            precision,
            consistency,
            self_ensemble,
            depth,
            "bfloat16" if precision == "bfloat16" and is_faster() else "float32",
        )

    @property
    def dtype(self) -> np.dtype:
        """Return the dtype of the output."""
        return np.dtype("float64" if self.precision == "float64" else "float32")

    def __call__(self, fine: NDArray, coarse: NDArray, part: tuple[slice, slice] | None = None) -> NDArray:
        """Return the coarse bands of one block, or of a part of it, at the fine resolution.

        Parameters
        ----------
        fine : (..., fine band, h, w)
            Reflectance; NaN is missing.
        coarse : (..., band, h / factor, w / factor)
            Likewise.
        part : (slice, slice), optional
            Fine rows and columns of the block that are asked for, with start and stop; all by default.

        Returns
        -------
        (..., band, h, w)
            NaN where the coarse pixel or any fine band is missing.
        """
        height, width = fine.shape[-2:]
        rows, columns = part or (slice(0, height), slice(0, width))
        missing = output_mask(fine, coarse, self.factor)[..., rows, columns]
        if missing.all():
            return np.full(missing.shape, np.nan, self.dtype)
        fine = fill_missing(fine, FILL_RADIUS * self.factor)
        coarse = fill_missing(coarse, FILL_RADIUS)
        f, depth = self.factor, max(height, width) if self.depth is None else self.depth
        y, x = Window.around(rows, height, factor=f, depth=depth), Window.around(columns, width, factor=f, depth=depth)
        result = self._run(
            self._predict,
            fine[..., y.start : y.stop, x.start : x.stop],
            coarse[..., y.start // f : y.stop // f, x.start // f : x.stop // f],
        )[..., y.trim, x.trim].copy()  # for what is around it to be used again
        result[missing] = np.nan
        return result

    def _predict(self, network: GINet, ms: torch.Tensor, hs: torch.Tensor) -> torch.Tensor:
        """Return the network's output for one image, by all symmetries and consistent where that was asked for."""
        if self.self_ensemble:
            turned = (_turn_back(network(_turn(ms, i), _turn(hs, i)), i) for i in range(8))
            result = reduce(operator.iadd, turned).div_(8)
        else:
            result = network(ms, hs)
        if self.consistency == "exact":
            import torch.nn.functional as F

            lacking = hs - F.avg_pool2d(result, self.factor)
            result += F.interpolate(lacking, scale_factor=self.factor, mode="nearest")
        return result

    def guide(self, fine: NDArray) -> NDArray:
        """Return the geometry guide of one block: ``(..., fine band, h, w) -> (..., band, h, w)``."""
        missing = (~np.isfinite(fine)).any(axis=-3, keepdims=True)
        result = self._run(lambda network, ms: network.guide(ms), fill_missing(fine, FILL_RADIUS * self.factor))
        return np.where(missing, np.asarray(np.nan, result.dtype), result)

    def _run(self, function: Callable[..., torch.Tensor], *blocks: NDArray) -> NDArray:
        """Return ``function(network, *tensors)`` of each image along the leading axes."""
        import torch

        lead = blocks[0].shape[:-3]
        with torch.inference_mode():
            with copying(self.device):
                images = [self._tensor(block) for block in blocks]
            on_processor = not self.device.startswith("cuda")
            here = _where_it_is(self.path), threads_here()  # asked in the task's own thread, which knows its worker
            result = one_at_a_time(self._compute, function, images, *here, large=on_processor)
            with copying(self.device):
                return to_host(result).reshape(*lead, *result.shape[1:])

    def _compute(
        self, function: Callable[..., torch.Tensor], images: list[torch.Tensor], path: str, threads: int
    ) -> torch.Tensor:
        """Return ``function(network, *images)``, image by image along the first axis."""
        import torch

        if torch.get_num_threads() != threads:  # torch keeps a number for each thread
            torch.set_num_threads(threads)
        with torch.inference_mode(), arithmetic(self.device):
            network = _network(path, self.sha256, self.device, self.precision, self.multiplied)
            results = [
                self._within_memory(function, network, *(image[i : i + 1] for image in images))
                for i in range(len(images[0]))
            ]
            return results[0] if len(results) == 1 else torch.cat(results)

    def _tensor(self, block: NDArray) -> torch.Tensor:
        """Return a block ``(..., band, h, w)`` as a batch of images on the device."""
        import torch

        block = block.reshape(-1, *block.shape[-3:])
        return torch.from_numpy(np.ascontiguousarray(block, self.dtype)).to(self.device)

    def _within_memory(
        self, function: Callable[..., torch.Tensor], network: GINet, fine: torch.Tensor, *coarse: torch.Tensor
    ) -> torch.Tensor:
        """Return ``function(network, fine, *coarse)``, by overlapping halves where a device's memory is too small."""
        import torch

        size = fine.shape[-2] * fine.shape[-1]
        if size < _too_large.get(self, size + 1):
            try:
                return function(network, fine, *coarse)
            except torch.OutOfMemoryError as error:
                _too_large[self] = size
                reason = str(error).splitlines()[0]
            torch.cuda.empty_cache()
        else:
            reason = "a smaller block did not fit"
        axis = -2 if fine.shape[-2] >= fine.shape[-1] else -1
        length, factor = fine.shape[axis], self.factor
        middle = length // (2 * factor) * factor
        margin = -(-network.config.receptive_radius // factor) * factor
        if middle + margin >= length - factor:
            raise RuntimeError(
                f"a block of {' × '.join(map(str, fine.shape[-2:]))} pixels does not fit the memory of "
                f"{self.device!r} ({reason}). Other programs may be using it; or type device='cpu'"
            )
        halves = []
        for start, stop in ((0, middle), (middle, length)):
            low, high = max(start - margin, 0), min(stop + margin, length)
            parts = [fine.narrow(axis, low, high - low)]
            parts += [image.narrow(axis, low // factor, (high - low) // factor) for image in coarse]
            half = self._within_memory(function, network, *parts)
            halves.append(half.narrow(axis, start - low, stop - start))
        return torch.cat(halves, dim=axis)


def _fastest(device: str) -> Precision:
    """Return the fastest precision of a device whose error is below that of the network."""
    from ..network.bfloat16 import is_faster

    if device.startswith("cuda"):
        return "mixed"
    return "bfloat16" if device == "cpu" and is_faster() else "float32"


def _turn(image: torch.Tensor, symmetry: int) -> torch.Tensor:
    """Return one of the eight symmetries of the square: quarter turns, and a mirror from 4 on."""
    return (image.flip(-1) if symmetry >= 4 else image).rot90(symmetry % 4, (-2, -1))


def _turn_back(image: torch.Tensor, symmetry: int) -> torch.Tensor:
    turned = image.rot90(-(symmetry % 4), (-2, -1))
    return turned.flip(-1) if symmetry >= 4 else turned


def block_memory(config: GINetConfig, height: int, width: int, precision: Precision = "float32") -> int:
    """Return an upper bound of the bytes that blocks of ``height × width`` fine pixels take, one by one.

    On CUDA devices they are the device's, in ``mixed`` precision four feature maps of 16 bits, their channels padded,
    ten planes per band, and what convolutions work with (measured: ``benchmarks/gpu/measured.md``); else the process's.
    Per pixel: four feature maps of a residual block with the convolution's own copies, six for what the allocator keeps
    of earlier blocks (it varies from run to run), and planes per band for input, estimate, guide and mask. Per pixel of
    a strip of attention in torch: the window's logits, twice while they are stacked, and allocator slack; the compiled
    form takes less.
    """
    from ..network.attention import STRIP_PIXELS
    from ..network.mixed import MULTIPLE

    if precision == "mixed":
        channels = -(-(config.n_features + 10) // MULTIPLE) * MULTIPLE
        return (4 * 2 * channels + 10 * 4 * len(config.bands)) * height * width + 2**26
    strip = min(height * width, STRIP_PIXELS)
    planes = (
        10 * (config.n_features + 10) + 10 * len(config.bands)
    ) * height * width + 5 * config.window_size**2 * strip
    return planes * (8 if precision == "float64" else 4)


def threads_here() -> int:
    """Return how many threads a network has, in the process and thread of a task.

    A worker of `distributed` has as many cores as threads, but its nanny, if it has one, sets OMP_NUM_THREADS to 1; the
    processes of a pool, Dask's or another, share the cores between them. Another OMP_NUM_THREADS is somebody's choice
    and stays, as do fewer threads by torch.set_num_threads in a worker.
    """
    import torch

    chosen = torch.get_num_threads()
    if os.environ.get("OMP_NUM_THREADS", "1") != "1":
        return chosen
    if worker := _worker():
        told = chosen == 1 and worker.nanny is not None
        return min(worker.state.nthreads, CPU_COUNT if told else chosen)
    return chosen if multiprocessing.parent_process() is None else 1


def _worker() -> Any:
    """Return the worker of `distributed` that runs this task, or None."""
    if "distributed" not in sys.modules:
        return None
    try:
        return sys.modules["distributed"].get_worker()
    except ValueError:
        return None


def _where_it_is(path: str) -> str:
    """Return the path, or that of a file of its name which `distributed`'s UploadFile has put beside this worker."""
    if Path(path).is_file() or (worker := _worker()) is None:
        return path
    uploaded = Path(worker.local_directory) / Path(path).name
    return str(uploaded) if uploaded.is_file() else path


@lru_cache(maxsize=4)
def _network(path: str, sha256: str, device: str, precision: Precision, multiplied: str) -> GINet:
    """Return the network of a checkpoint; at most four per process are kept."""
    import torch

    from ..network import load_checkpoint
    from ..network.bfloat16 import in_bfloat16, is_faster
    from ..network.mixed import mix

    checkpoint = load_checkpoint(path)
    if checkpoint.sha256 != sha256:
        raise RuntimeError(
            f"{path} changed since the graph was built: its sha256 was {sha256}, now {checkpoint.sha256}"
        )
    if precision == "mixed":
        return mix(checkpoint.network().to(device, torch.float32))
    if precision == "bfloat16":
        if multiplied == "bfloat16" and not is_faster():
            _log.warning("this processor multiplies bfloat16 slowly; precision='float32' would be faster here")
        return in_bfloat16(checkpoint.network(), getattr(torch, multiplied))
    return checkpoint.network().to(device, getattr(torch, precision))
