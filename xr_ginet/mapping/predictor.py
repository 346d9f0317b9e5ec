"""From checkpoint to a picklable function of numpy blocks.

A `Predictor` is a few strings: what to load, on which device, in which precision. The network is built once per
process, when the first block arrives, and shared by all tasks of that process; tasks carry no weights. One block runs
at a time per process, with all of the threads that the process may use: memory stays that of one block, and threads
are not oversubscribed. On processors a large block is worked on in parts, which overlap by what the network sees: the
result is the same, and memory does not grow with the block. On a CUDA device the blocks of other threads are copied
there and back meanwhile, and a block that its memory does not hold is worked on in halves.
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
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
from dask.system import CPU_COUNT
from numpy.typing import NDArray

from .devices import arithmetic, choose_device, copying, to_host
from .heap import one_at_a_time
from .missing import FILL_RADIUS, fill_missing, is_missing, mask, output_mask
from .overlap import PART, Window, in_parts, part_side, parts

if TYPE_CHECKING:
    import torch

    from ..network import Checkpoint, GINet, GINetConfig

Consistency = Literal["none", "exact"]
Precision = Literal["auto", "float32", "float64", "mixed", "bfloat16"]

_log = logging.getLogger(__name__)

OVERFLOW = "Has the network overflowed? Type precision='float32'; if that does not help, use other weights"
LEAST = 64
"""Fine pixels on a side, without the overlap, from which convolutions round each pixel alike wherever it lies: for less
the network works on more than is asked for, so that chunks change no bit of a float32 result on processors."""

GUIDE_RADIUS = 3
"""Fine pixels that the learned guide sees around each: three 3×3 convolutions."""

_too_large: dict[Predictor, int] = {}
"""Pixels of the smallest block that did not fit a device's memory."""


class View(NamedTuple):
    """What a part of a block is made of along one axis, in fine pixels."""

    read: slice
    """Of the block: what the network sees, and what fills the gaps in it."""
    seen: slice
    """Of what is read: what the network sees."""
    part: slice
    """Of what is seen: what is asked for."""


@dataclass(frozen=True)
class Predictor:
    """The network of a checkpoint as a function of blocks.

    Raises
    ------
    ValueError
        If the precision is unknown, the device is not there, or the checkpoint's weights are not finite.
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
    radius: int | None = None
    """Fine pixels as far as the network can see, by which parts of a block overlap; None: blocks stay whole."""

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
        _check_weights(str(checkpoint.path), checkpoint.sha256)
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
            checkpoint.config.receptive_radius,
        )

    @property
    def dtype(self) -> np.dtype:
        """Return the dtype of the output."""
        return np.dtype("float64" if self.precision == "float64" else "float32")

    @property
    def least(self) -> int:
        """Return the side in fine pixels that a part counts as at least, where its depth lets no chunk show."""
        sees_all = self.depth is None or self.radius is None or self.depth >= self.radius
        return LEAST if sees_all else 0

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

        Raises
        ------
        ValueError
            If the network's output is not finite where nothing is missing.
        """
        asked = part or (slice(0, fine.shape[-2]), slice(0, fine.shape[-1]))
        out = np.empty((*coarse.shape[:-2], *(axis.stop - axis.start for axis in asked)), self.dtype)
        whole = self.radius is None or self.device.startswith("cuda")
        side = None if whole else part_side(_multiple(self.radius or 0, self.factor), largest_part(self.precision))
        for image in np.ndindex(fine.shape[:-3]):
            for piece in parts(*asked, side=side):
                place = (slice(p.start - a.start, p.stop - a.start) for p, a in zip(piece, asked, strict=True))
                views = (self._view(*axes) for axes in zip(piece, asked, fine.shape[-2:], strict=True))
                out[(*image, slice(None), *place)] = self._part(fine[image], coarse[image], *views)
        return out

    def _view(self, part: slice, asked: slice, size: int) -> View:
        """Return what a part of the pixels asked for along an axis is made of."""
        f = self.factor
        depth, radius = (size if d is None else _multiple(d, f) for d in (self.depth, self.radius))
        window, near = (
            Window.around(p, size, factor=f, depth=d, least=self.least) for p, d in ((asked, depth), (part, radius))
        )
        seen = slice(max(window.start, near.start), min(window.stop, near.stop))
        read = Window.around(seen, size, factor=f, depth=FILL_RADIUS * f)
        return View(slice(read.start, read.stop), read.trim, slice(part.start - seen.start, part.stop - seen.start))

    def _part(self, fine: NDArray, coarse: NDArray, y: View, x: View) -> NDArray:
        """Return a part of one image's result."""
        f = self.factor
        fine = fine[:, y.read, x.read]
        coarse = coarse[:, _coarser(y.read, f), _coarser(x.read, f)]
        missing = output_mask(fine, coarse, f)[:, y.seen, x.seen][:, y.part, x.part]
        if missing.all():
            return np.full(missing.shape, np.nan, self.dtype)
        fine = fill_missing(fine, FILL_RADIUS * f)[:, y.seen, x.seen]
        coarse = fill_missing(coarse, FILL_RADIUS)[:, _coarser(y.seen, f), _coarser(x.seen, f)]
        return mask(self._run(self._predict, fine, coarse)[:, y.part, x.part], missing, OVERFLOW)

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
        depth = _multiple(GUIDE_RADIUS, self.factor) + FILL_RADIUS * self.factor
        return in_parts(self._guide, fine, factors=(1,), depth=depth)

    def _guide(self, fine: NDArray) -> NDArray:
        missing = np.asarray(is_missing(fine).any(axis=-3, keepdims=True))
        filled = fill_missing(fine, FILL_RADIUS * self.factor)
        return mask(self._run(lambda network, ms: network.guide(ms), filled), missing, OVERFLOW)

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
        margin = _multiple(network.config.receptive_radius, factor)
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


def _multiple(size: int, factor: int) -> int:
    """Return the least multiple of a factor that is not smaller."""
    return -(-size // factor) * factor


def _coarser(pixels: slice, factor: int) -> slice:
    return slice(pixels.start // factor, pixels.stop // factor)


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


def largest_part(precision: Precision) -> int:
    """Return the side in fine pixels of what the network works on at once on processors."""
    return PART // 2 if precision == "float64" else PART


def worked_on(
    config: GINetConfig, height: int, width: int, precision: Precision = "float32", device: str = "cpu"
) -> tuple[int, int]:
    """Return how many rows and columns of a block the network works on at once at most, in fine pixels."""
    if device.startswith("cuda"):
        return height, width
    radius = _multiple(config.receptive_radius, config.factor)
    most = part_side(radius, largest_part(precision)) + 2 * (radius + config.factor)
    return min(height, most), min(width, most)


def block_memory(
    config: GINetConfig, height: int, width: int, precision: Precision = "float32", device: str = "cpu"
) -> int:
    """Return an upper bound of the bytes that blocks of ``height × width`` fine pixels take, one by one.

    Besides their input and output. On processors, which work on large blocks in parts, it does not grow with the block
    beyond those of `PART`.

    On CUDA devices they are the device's, in ``mixed`` precision four feature maps of 16 bits, their channels padded,
    ten planes per band, and what convolutions work with (measured: ``benchmarks/gpu/measured.md``); else the process's.
    Per pixel: four feature maps of a residual block with the convolution's own copies, six for what the allocator keeps
    of earlier blocks (it varies from run to run), and planes per band for input, estimate, guide and mask. In bfloat16
    two rounded feature maps. In float64, for which there are no other convolutions, nine planes for each channel that
    a convolution reads, those of residual blocks kept thrice. Per pixel of a strip of attention in torch: the window's
    logits, twice while they are stacked, and allocator slack; the compiled form takes less.
    """
    from ..network.attention import STRIP_PIXELS
    from ..network.mixed import MULTIPLE

    if precision == "mixed":
        channels = -(-(config.n_features + 10) // MULTIPLE) * MULTIPLE
        return (4 * 2 * channels + 10 * 4 * len(config.bands)) * height * width + 2**26
    height, width = worked_on(config, height, width, precision, device)
    strip = min(height * width, STRIP_PIXELS)
    features = config.n_features + 10
    planes = 10 * features + 10 * len(config.bands)
    if precision == "bfloat16":
        planes += 2 * features
    if precision == "float64":
        planes += 9 * (3 * features + sum(config.cluster_features))
    return (planes * height * width + 5 * config.window_size**2 * strip) * (8 if precision == "float64" else 4)


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


@lru_cache(maxsize=64)
def _check_weights(path: str, sha256: str) -> None:
    """Raise where the weights in a file cannot be used; they are read once for each hash."""
    from ..network import load_checkpoint

    load_checkpoint(path).network()


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
