"""A torch dataset of training patches drawn from lazy cubes, one Dask chunk at a time.

A pass visits the chunks of all cubes in random order, reads each once while the previous ones are being used,
degrades it (Wald's protocol) and cuts it into patches, which leave through a bounded shuffle buffer. Which patches
there are and in what order is decided by the seed and the epoch alone, before anything is read: so a pass can be
repeated, split between processes without duplicates, and taken up in its middle, reading only chunks that still
matter.

xbatcher walks one dataset in windows, in order: two resolutions are two generators zipped, and each window is a
selection of its own, so a chunk is read again for every window in it unless the cube is in memory.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import dask
import numpy as np
import torch
import torch.distributed
import xarray as xr
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation, gaussian_filter
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from ..sentinel2.bands import BANDS, SCL
from ..sentinel2.grids import COARSE_DIMS, FINE_DIMS, SIXTY, TWENTY, Bands, Grid, check_nesting
from ..sentinel2.scl import CLOUDY
from .degradation import TAPS_PER_FACTOR, Degradation, box_mean, mtf_mean

GAIN_RANGE = (0.05, 0.9)
"""MTF gains between which jitter stays."""

PAIRS: dict[int, Bands] = {20: TWENTY, 60: SIXTY}
"""By the resolution of the bands to restore."""


class Unit(NamedTuple):
    """One chunk of one cube: what is read at once."""

    cube: int
    time: int | None
    rows: slice
    """Of coarse pixels; they start at a multiple of the factor."""
    columns: slice


class Patch(NamedTuple):
    """One patch of one unit, before anything is read."""

    unit: int
    y: int
    x: int
    """First pixel within the unit, coarse."""
    symmetry: int
    """0 to 7: quarter turns, and a mirror from 4 on."""
    gains: tuple[float, ...]
    """Of the bands: of the fine, then of the coarse ones."""


class Progress(NamedTuple):
    """How far a pass has come."""

    round: int = 0
    """How often the share has been gone through."""
    position: int = 0
    """Patches of this round that are done, those left out included."""
    yielded: int = 0
    """Samples of the whole pass."""


class Sample(NamedTuple):
    """A training pair at reduced scale."""

    ms: Tensor
    """``(4, size, size)``: the 10 m bands at the coarse bands' resolution."""
    hs: Tensor
    """``(band, size / factor, size / factor)``: the coarse bands, coarser by the factor again."""
    truth: Tensor
    """``(band, size, size)``: the coarse bands as measured."""


@dataclass(frozen=True)
class PatchOptions:
    """What a pass over the cubes yields."""

    resolution: Literal[20, 60] = 20
    """Of the bands that are restored, in metres: the six of 20 m by a factor of 2, or B01 and B09 by one of 6."""
    size: int = 48
    """Side of a patch in pixels of that resolution, a multiple of the factor."""
    degradation: Degradation = "mtf"
    """How both inputs are made coarser."""
    buffer: int = 512
    """Patches that wait to be shuffled; they and ``prefetch`` chunks are what is held in memory."""
    prefetch: int = 2
    """Chunks read ahead."""
    augment: bool = True
    """Turn and mirror each patch, and scale its reflectance by random gains."""
    gain_spread: float = 0.25
    """Standard deviation of the gain's logarithm."""
    band_gain_spread: float = 0.0
    """Likewise of a further gain of each band's own, the same in a 20 m band's input and truth."""
    gain_jitter: float = 0.0
    """Standard deviation of each band's MTF gain around its own, drawn per chunk and pass; for ``mtf`` only."""
    fine_gain: tuple[float, float] | None = None
    """Range from which the MTF gain of the 10 m bands is drawn, one per chunk and pass; for ``mtf`` only. None: their
    own, 0.25, with which they come out blurrier than the truth; with 0.45 they are as sharp as the truth, as the 10 m
    bands are at full scale."""
    blur: float = 0.0
    """Standard deviation, in their pixels, of a Gaussian that blurs the bands to restore before anything else. For a
    cube of block means, 0.45: at the Nyquist frequency they keep 0.54 of what there is, where the bands themselves
    keep 0.33."""
    shift: bool = False
    """Whether the coarser pixels start at any pixel of a chunk that leaves room for as many patches, drawn per pass, so
    that few images give many pairs. Without it they start where the chunk does."""
    samples: int | None = None
    """Samples that each process (rank or dataloader worker) yields per pass, so that ranks stay in step: a share with
    fewer is gone through again, differently shuffled and augmented; one with more is cut short. None: each patch once,
    so processes may yield unequal numbers, and distributed training would wait for ever."""
    seed: int = 0
    """Of all that is random."""


class Patches(IterableDataset):
    """Paired patches of one or many two-grid cubes.

    Parameters
    ----------
    cubes : sequence of Dataset
        Cubes of the 10 m bands and the bands to restore, lazy or not: reflectance, optionally ``SCL`` with dims
        ``[time,] y_20m, x_20m``. Chunks of the 10 m bands in y and x must be twice (six times) those of the 20 m
        (60 m) bands, and those multiples of 2 (6).
    options : PatchOptions
        Sizes, degradation, shuffling.

    Notes
    -----
    A pass is one iteration; `set_epoch` gives the next one another order. Patches with a missing or cloudy pixel are
    left out. Under torch's distributed training and with dataloader workers each process gets its own share of the
    chunks.

    Raises
    ------
    ValueError
        If a cube lacks a band, its grids or chunks do not nest, the size is no multiple of the factor, there is no such
        resolution, ``samples`` is not positive, ``blur`` is negative, or ``gain_jitter`` or ``fine_gain`` is set for
        another degradation than ``mtf``; while iterating, if ``samples`` are asked of a process whose share has no
        patch free of missing and cloudy pixels.
    """

    def __init__(self, cubes: Sequence[xr.Dataset], options: PatchOptions | None = None) -> None:
        self.options = options or PatchOptions()
        if self.options.resolution not in PAIRS:
            raise ValueError(f"resolution={self.options.resolution!r}: must be 20 or 60, metres")
        self.bands = PAIRS[self.options.resolution]
        """Which bands, and the factor between them."""
        if self.options.size < 1 or self.options.size % self.bands.factor:
            raise ValueError(
                f"size={self.options.size}: must be a positive multiple of {self.bands.factor} pixels at "
                f"{self.options.resolution} m"
            )
        if self.options.samples is not None and self.options.samples < 1:
            raise ValueError(f"samples={self.options.samples}: must be at least 1, or None for each patch once")
        if not 0 <= self.options.blur < math.inf:
            raise ValueError(f"blur={self.options.blur}: must be a number of pixels, not negative")
        for name in ("gain_jitter", "fine_gain"):
            if (value := getattr(self.options, name)) and self.options.degradation != "mtf":
                raise ValueError(
                    f"{name}={value} with degradation={self.options.degradation!r}: only the blur of 'mtf' has gains. "
                    f"Leave {name} out"
                )
        self.cubes = list(cubes)
        self.units = [unit for index, cube in enumerate(self.cubes) for unit in _units(index, cube, self.bands)]
        if not any(self._grid_size(unit)[0] * self._grid_size(unit)[1] for unit in self.units):
            raise ValueError(
                f"no chunk is as large as a patch of {self.options.size} pixels at {self.options.resolution} m. Chunk "
                "the cubes coarser, or type a smaller size="
            )
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # workers that persist see it change
        self._progress = self._resume = Progress()

    @property
    def epoch(self) -> int:
        """Return the number of the pass."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass, from its beginning."""
        self._epoch.fill_(epoch)
        self._resume = Progress()

    def state_dict(self) -> dict[str, int]:
        """Return where the latest iteration stands; in this process, so without dataloader workers."""
        return {"epoch": self.epoch, **self._progress._asdict()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration go on where ``state`` was taken."""
        self._epoch.fill_(state["epoch"])
        self._resume = Progress(*(state.get(field, 0) for field in Progress._fields))

    def __iter__(self) -> Iterator[Sample]:
        at, self._resume = self._resume, Progress()
        if at != Progress() and get_worker_info() is not None:
            raise ValueError("a pass is taken up without dataloader workers, which count for themselves: num_workers=0")
        share, shares = _share()
        enough = self.options.samples
        while enough is None or at.yielded < enough:
            for sample in self._round(share, shares, at):
                at = Progress(at.round, at.position + 1, at.yielded + (sample is not None))
                self._progress = at
                if sample is not None:
                    yield sample
                    if at.yielded == enough:
                        break
            if enough is None:
                break
            if not at.yielded:
                raise ValueError(
                    f"samples={enough}, but share {share} of {shares} has no patch of {self.options.size} pixels at "
                    f"{self.options.resolution} m free of missing and cloudy pixels. Type smaller chunks or fewer "
                    "processes"
                )
            at = Progress(at.round + 1, 0, at.yielded)
        self._progress = Progress()

    def _round(self, share: int, shares: int, at: Progress) -> Iterator[Sample | None]:
        """Yield the samples of a share from ``at`` on, None for each that is left out."""
        epoch = self.epoch
        order, reads = self._plan(share, shares, at.round)
        wanted = set(order[at.position :])
        reads = [(unit, left) for unit, patches in reads if (left := [p for p in patches if p in wanted])]
        held: dict[Patch, Sample | None] = {}
        with ThreadPoolExecutor(max(1, self.options.prefetch)) as pool:
            ahead: deque[tuple[list[Patch], Future[Any]]] = deque()
            waiting = iter(reads)

            def read_ahead() -> None:
                for unit, patches in itertools.islice(waiting, max(1, self.options.prefetch) - len(ahead)):
                    ahead.append((patches, pool.submit(self._read, patches, self._mtf_gains(epoch, unit))))

            try:
                for patch in order[at.position :]:
                    while patch not in held:
                        read_ahead()
                        patches, future = ahead.popleft()
                        unit = future.result()
                        read_ahead()
                        held.update({p: self._cut(unit, p) for p in patches})
                    yield held.pop(patch)
            finally:
                for _, future in ahead:
                    future.cancel()

    def _plan(self, share: int, shares: int, round: int = 0) -> tuple[list[Patch], list[tuple[int, list[Patch]]]]:
        """Return the patches of a round in order, and its chunks in the order of reading, each with its patches."""
        common = np.random.default_rng((self.options.seed, self.epoch))
        mine = common.permutation(len(self.units))[share::shares]
        rng = np.random.default_rng((self.options.seed, self.epoch, share, round))
        order: list[Patch] = []
        buffer: list[Patch] = []
        reads = []
        for unit in mine:
            patches = self._patches(int(unit), rng)
            reads.append((int(unit), patches))
            buffer.extend(patches)
            while len(buffer) > self.options.buffer:
                order.append(_take(buffer, rng))
        while buffer:
            order.append(_take(buffer, rng))
        return order, reads

    def _grid_size(self, unit: Unit) -> tuple[int, int]:
        size = self.options.size
        return (unit.rows.stop - unit.rows.start) // size, (unit.columns.stop - unit.columns.start) // size

    def _patches(self, unit: int, rng: np.random.Generator) -> list[Patch]:
        """Return the patches of a chunk: a grid without overlap, shifted at random within what it leaves over."""
        size = self.options.size
        rows, columns = self._grid_size(self.units[unit])
        if not rows * columns:
            return []
        slack = [
            axis.stop - axis.start - n * size
            for axis, n in zip((self.units[unit].rows, self.units[unit].columns), (rows, columns), strict=True)
        ]
        step = 1 if self.options.shift else self.bands.factor
        top, left = (step * int(rng.integers(s // step + 1)) for s in slack)
        patches = []
        for i, j in itertools.product(range(rows), range(columns)):
            symmetry = int(rng.integers(8)) if self.options.augment else 0
            patches.append(Patch(unit, top + i * size, left + j * size, symmetry, self._gains(rng)))
        return patches

    def _gains(self, rng: np.random.Generator) -> tuple[float, ...]:
        """Return what each band is multiplied by."""
        n_bands = len(self.bands.fine + self.bands.coarse)
        if not self.options.augment:
            return (1.0,) * n_bands
        common = rng.normal(0, self.options.gain_spread)
        own = rng.normal(0, self.options.band_gain_spread, n_bands)
        return tuple(np.exp(common + own).tolist())

    def _mtf_gains(self, epoch: int, unit: int) -> list[float]:
        """Return the blur's gain at the Nyquist frequency of each band, for one chunk in one pass."""
        rng = np.random.default_rng((self.options.seed, epoch, unit, 1))  # whoever reads it, and in whatever order
        gains = np.array([BANDS[name].mtf_gain for name in self.bands.fine + self.bands.coarse])
        gains = gains + rng.normal(0, self.options.gain_jitter, gains.size)
        if self.options.fine_gain:
            gains[: len(self.bands.fine)] += rng.uniform(*self.options.fine_gain) - BANDS["B02"].mtf_gain
        return [float(gain) for gain in gains.clip(*GAIN_RANGE)]

    def _read(self, patches: list[Patch], mtf_gains: list[float]) -> tuple[NDArray, NDArray, NDArray, NDArray]:
        """Return the chunk of some patches as ``(ms, hs, truth, valid)``, degraded whole: patches have no borders."""
        factor, (fine_bands, coarse_bands) = self.bands.factor, self.bands[:2]
        unit = self.units[patches[0].unit]
        cube = self.cubes[unit.cube]
        if unit.time is not None:
            cube = cube.isel(time=unit.time)
        rows, columns = (
            slice(axis.start + first % factor, axis.stop - (axis.stop - axis.start - first) % factor)
            for axis, first in ((unit.rows, patches[0].y), (unit.columns, patches[0].x))
        )
        fine = _select(cube[list(fine_bands)], FINE_DIMS, rows, columns, factor)
        coarse = _select(cube[list(coarse_bands)], self.bands.coarse_dims, rows, columns, 1)
        n_classes = self.options.resolution // 20  # pixels of the classification, on each side of a coarse one
        classes = _select(cube[[SCL]], COARSE_DIMS, rows, columns, n_classes) if SCL in cube else xr.Dataset()
        fine, coarse, classes = dask.compute(fine, coarse, classes)
        ms, truth = (
            np.stack([ds[b].transpose(*dims).values for b in bands]).astype("float32")
            for ds, bands, dims in ((fine, fine_bands, FINE_DIMS), (coarse, coarse_bands, self.bands.coarse_dims))
        )
        valid = np.isfinite(truth).all(0) & _blocks(np.isfinite(ms).all(0), factor).all((1, 3))
        if SCL in classes:
            seen = classes[SCL].transpose(*COARSE_DIMS).values
            valid &= _blocks(np.isfinite(seen) & ~np.isin(seen, CLOUDY), n_classes).all((1, 3))
        if not valid.all():  # what the blur mixes with a missing pixel is no good either
            reach = TAPS_PER_FACTOR * factor // 2 + math.ceil(4 * self.options.blur)  # scipy's Gaussians end at 4 σ
            valid = ~binary_dilation(~valid, iterations=reach)
        ms, truth = (np.where(np.isfinite(image), image, np.float32(0)) for image in (ms, truth))
        if self.options.blur:
            truth = gaussian_filter(truth, (0, self.options.blur, self.options.blur))
        ms, hs = (
            mtf_mean(image, factor, gains) if self.options.degradation == "mtf" else box_mean(image, factor)
            for image, gains in ((ms, mtf_gains[: len(fine_bands)]), (truth, mtf_gains[len(fine_bands) :]))
        )
        return ms, hs, truth, valid

    def _cut(self, unit: tuple[NDArray, NDArray, NDArray, NDArray], patch: Patch) -> Sample | None:
        """Return one patch, turned and scaled, or None where a pixel is missing or cloudy."""
        ms, hs, truth, valid = unit
        size, factor = self.options.size, self.bands.factor
        y, x = patch.y // factor, patch.x // factor
        coarser = (..., slice(y, y + size // factor), slice(x, x + size // factor))
        window = (..., slice(factor * y, factor * y + size), slice(factor * x, factor * x + size))
        if not valid[window].all():
            return None
        gains = np.array(patch.gains, "float32")[:, None, None]
        fine, coarse = gains[: len(self.bands.fine)], gains[len(self.bands.fine) :]
        turned = (_turn(image, patch.symmetry) for image in (ms[window], hs[coarser], truth[window]))
        return Sample(*(torch.from_numpy(i * g) for i, g in zip(turned, (fine, coarse, coarse), strict=True)))


def _select(ds: xr.Dataset, dims: tuple[str, str], rows: slice, columns: slice, step: int) -> xr.Dataset:
    """Return the rows and columns of a grid with ``step`` pixels to each of theirs."""
    return ds.isel({d: slice(step * w.start, step * w.stop) for d, w in zip(dims, (rows, columns), strict=True)})


def _blocks(image: NDArray, step: int) -> NDArray:
    """Return ``(y, x)`` as ``(y / step, step, x / step, step)``."""
    return image.reshape(image.shape[0] // step, step, -1, step)


def _units(index: int, cube: xr.Dataset, bands: Bands) -> list[Unit]:
    """Return the chunks of a cube, whose fine and coarse chunks must cover the same ground."""
    names, factor = (*bands.fine, *bands.coarse), bands.factor
    missing = [band for band in names if band not in cube]
    if missing:
        raise ValueError(f"cube {index} lacks {', '.join(missing)}; patches need the bands of 10 m and {10 * factor} m")
    for band in names:
        like = cube[bands.fine[0] if band in bands.fine else bands.coarse[0]]
        if not np.issubdtype(cube[band].dtype, np.floating):
            raise ValueError(f"cube {index}: {band} is {cube[band].dtype}, digital numbers; patches need reflectance")
        if cube[band].chunksizes != like.chunksizes or set(cube[band].chunksizes.get("time", (1,))) != {1}:
            raise ValueError(
                f"cube {index}: {band} has the chunks {dict(cube[band].chunksizes)}; for each to be read once, the "
                "bands of one resolution must be chunked alike, in time one by one: ds.unify_chunks().chunk(time=1)"
            )
    check_nesting(Grid.from_coords(cube), Grid.from_coords(cube, bands.coarse_dims), factor)
    axes = []
    for fine_dim, coarse_dim in zip(FINE_DIMS, bands.coarse_dims, strict=True):
        fine = cube[bands.fine[0]].chunksizes.get(fine_dim, (cube.sizes[fine_dim],))
        coarse = cube[bands.coarse[0]].chunksizes.get(coarse_dim, (cube.sizes[coarse_dim],))
        if fine != tuple(factor * n for n in coarse) or any(n % factor for n in coarse[:-1]):
            whole = max(factor, max(coarse) // factor * factor)
            raise ValueError(
                f"cube {index} has chunks {fine[:3]} in {fine_dim} and {coarse[:3]} in {coarse_dim}: the fine chunks "
                f"must be {factor} times the coarse ones, and those multiples of {factor}, for each to be read once. "
                f"Type ds.chunk({{'{fine_dim}': {factor * whole}, '{coarse_dim}': {whole}}})"
            )
        edges = np.concatenate([[0], np.cumsum(coarse)])
        axes.append([slice(int(a), int(b)) for a, b in itertools.pairwise(edges)])
    times: list[int | None] = list(range(cube.sizes["time"])) if "time" in cube.dims else [None]
    return [Unit(index, time, rows, columns) for time, rows, columns in itertools.product(times, *axes)]


def _share() -> tuple[int, int]:
    """Return which share of the chunks this process reads, and of how many: ranks times dataloader workers."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, ranks = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
    worker = get_worker_info()
    if worker is None:
        return rank, ranks
    return rank * worker.num_workers + worker.id, ranks * worker.num_workers


def _take(buffer: list[Patch], rng: np.random.Generator) -> Patch:
    """Remove and return a random element, in constant time."""
    index = int(rng.integers(len(buffer)))
    buffer[index], buffer[-1] = buffer[-1], buffer[index]
    return buffer.pop()


def _turn(image: NDArray, symmetry: int) -> NDArray:
    """Return one of the eight symmetries of the square, as a copy."""
    mirrored = image[..., ::-1] if symmetry >= 4 else image
    return np.ascontiguousarray(np.rot90(mirrored, symmetry % 4, (-2, -1)))
