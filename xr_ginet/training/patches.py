"""A torch dataset of training patches drawn from lazy cubes, one Dask chunk at a time.

A pass visits the chunks of all cubes in random order, reads each once while the previous ones are being used,
degrades it (Wald's protocol) and cuts it into patches, which leave through a bounded shuffle buffer. Which patches
there are and in what order is decided by the seed and the epoch alone, before anything is read: so a pass can be
repeated, split between processes without duplicates, and taken up in its middle, reading only chunks that still
matter.

xbatcher walks one array in windows; it neither pairs two resolutions nor reads a chunk once for all of its windows.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import dask
import numpy as np
import torch
import torch.distributed
import xarray as xr
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from ..sentinel2.bands import BANDS_10M, BANDS_20M
from ..sentinel2.grids import COARSE_DIMS, FINE_DIMS, Grid, check_nesting
from .degradation import TAPS_PER_FACTOR, Degradation, degrade

FACTOR = 2
CLOUDY = (0, 1, 3, 8, 9, 10)
"""Classes of SCL that a patch must not hold: no data, saturated, cloud shadow, clouds, cirrus."""


class Unit(NamedTuple):
    """One chunk of one cube: what is read at once."""

    cube: int
    time: int | None
    rows: slice
    """At 20 m; even bounds."""
    columns: slice


class Patch(NamedTuple):
    """One patch of one unit, before anything is read."""

    unit: int
    y: int
    x: int
    """First pixel within the unit, at 20 m."""
    symmetry: int
    """0 to 7: quarter turns, and a mirror from 4 on."""
    gain: float


class Sample(NamedTuple):
    """A training pair at reduced scale."""

    ms: Tensor
    """``(4, size, size)``: the 10 m bands at 20 m."""
    hs: Tensor
    """``(6, size / 2, size / 2)``: the 20 m bands at 40 m."""
    truth: Tensor
    """``(6, size, size)``: the 20 m bands as measured."""


@dataclass(frozen=True)
class PatchOptions:
    """What a pass over the cubes yields."""

    size: int = 48
    """Side of a patch in 20 m pixels, a multiple of 2."""
    degradation: Degradation = "mtf"
    """How both inputs are made coarser."""
    buffer: int = 512
    """Patches that wait to be shuffled; they and ``prefetch`` chunks are what is held in memory."""
    prefetch: int = 2
    """Chunks read ahead."""
    augment: bool = True
    """Turn and mirror each patch, and scale its reflectance by a random gain."""
    gain_spread: float = 0.25
    """Standard deviation of the gain's logarithm."""
    seed: int = 0
    """Of all that is random."""


class Patches(IterableDataset):
    """Paired patches of one or many two-grid cubes.

    Parameters
    ----------
    cubes : sequence of Dataset
        Two-grid cubes, lazy or not: ten bands of reflectance, optionally ``SCL`` with dims ``[time,] y_20m, x_20m``.
        Chunks of the 10 m bands in y and x must be twice those of the 20 m bands, with even sizes.
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
        If a cube lacks a band, its grids or chunks do not nest, or the size is odd.
    """

    def __init__(self, cubes: Sequence[xr.Dataset], options: PatchOptions | None = None) -> None:
        self.options = options or PatchOptions()
        if self.options.size < 2 or self.options.size % FACTOR:
            raise ValueError(f"size={self.options.size}: must be a positive multiple of {FACTOR} pixels at 20 m")
        self.cubes = list(cubes)
        self.units = [unit for index, cube in enumerate(self.cubes) for unit in _units(index, cube)]
        if not any(self._grid_size(unit)[0] * self._grid_size(unit)[1] for unit in self.units):
            raise ValueError(
                f"no chunk is as large as a patch of {self.options.size} pixels at 20 m. Chunk the cubes coarser"
            )
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # workers that persist see it change
        self._position = 0
        self._resume = 0

    @property
    def epoch(self) -> int:
        """Return the number of the pass."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass, from its beginning."""
        self._epoch.fill_(epoch)
        self._resume = 0

    def state_dict(self) -> dict[str, int]:
        """Return where the latest iteration stands; in this process, so without dataloader workers."""
        return {"epoch": self.epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration go on where ``state`` was taken."""
        self._epoch.fill_(state["epoch"])
        self._resume = state["position"]

    def __iter__(self) -> Iterator[Sample]:
        share, shares = _share()
        done, self._resume = self._resume, 0
        if done and get_worker_info() is not None:
            raise ValueError("a pass is taken up without dataloader workers, which count for themselves: num_workers=0")
        order, reads = self._plan(share, shares)
        wanted = set(order[done:])
        reads = [(unit, left) for unit, patches in reads if (left := [p for p in patches if p in wanted])]
        held: dict[Patch, Sample | None] = {}
        with ThreadPoolExecutor(max(1, self.options.prefetch)) as pool:
            ahead: deque[tuple[list[Patch], Future[Any]]] = deque()
            waiting = iter(reads)

            def read_ahead() -> None:
                for unit, patches in itertools.islice(waiting, max(1, self.options.prefetch) - len(ahead)):
                    ahead.append((patches, pool.submit(self._read, self.units[unit])))

            try:
                for position, patch in enumerate(order[done:], start=done + 1):
                    while patch not in held:
                        read_ahead()
                        patches, future = ahead.popleft()
                        unit = future.result()
                        read_ahead()
                        held.update({p: self._cut(unit, p) for p in patches})
                    sample = held.pop(patch)
                    self._position = position
                    if sample is not None:
                        yield sample
            finally:
                for _, future in ahead:
                    future.cancel()
        self._position = 0

    def _plan(self, share: int, shares: int) -> tuple[list[Patch], list[tuple[int, list[Patch]]]]:
        """Return the patches of a pass in order, and its chunks in the order of reading, each with its patches."""
        common = np.random.default_rng((self.options.seed, self.epoch))
        mine = common.permutation(len(self.units))[share::shares]
        rng = np.random.default_rng((self.options.seed, self.epoch, share))
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
        top, left = (FACTOR * int(rng.integers(s // FACTOR + 1)) for s in slack)
        patches = []
        for i, j in itertools.product(range(rows), range(columns)):
            symmetry = int(rng.integers(8)) if self.options.augment else 0
            gain = float(np.exp(rng.normal(0, self.options.gain_spread))) if self.options.augment else 1.0
            patches.append(Patch(unit, top + i * size, left + j * size, symmetry, gain))
        return patches

    def _read(self, unit: Unit) -> tuple[NDArray, NDArray, NDArray, NDArray]:
        """Return a chunk as ``(ms, hs, truth, valid)``, degraded whole so that patches have no borders of their own."""
        cube = self.cubes[unit.cube]
        if unit.time is not None:
            cube = cube.isel(time=unit.time)
        fine = cube[list(BANDS_10M)].isel(y=_scaled(unit.rows, FACTOR), x=_scaled(unit.columns, FACTOR))
        coarse = cube[[*BANDS_20M, *(["SCL"] if "SCL" in cube else [])]].isel(y_20m=unit.rows, x_20m=unit.columns)
        fine, coarse = dask.compute(fine, coarse)
        ms, truth = (
            np.stack([ds[b].transpose(*dims).values for b in bands]).astype("float32")
            for ds, bands, dims in ((fine, BANDS_10M, FINE_DIMS), (coarse, BANDS_20M, COARSE_DIMS))
        )
        height, width = truth.shape[-2:]
        valid = np.isfinite(truth).all(0) & np.isfinite(ms.reshape(-1, height, 2, width, 2)).all((0, 2, 4))
        if "SCL" in coarse:
            classes = coarse["SCL"].transpose(*COARSE_DIMS).values
            valid &= np.isfinite(classes) & ~np.isin(classes, CLOUDY)
        if not valid.all():  # what the blur mixes with a missing pixel is no good either
            valid = ~binary_dilation(~valid, iterations=TAPS_PER_FACTOR)
        kind = self.options.degradation
        ms, hs = (
            degrade(np.where(np.isfinite(image), image, 0), bands, degradation=kind)
            for image, bands in ((ms, BANDS_10M), (truth, BANDS_20M))
        )
        return ms, hs, truth, valid

    def _cut(self, unit: tuple[NDArray, NDArray, NDArray, NDArray], patch: Patch) -> Sample | None:
        """Return one patch, turned and scaled, or None where a pixel is missing or cloudy."""
        ms, hs, truth, valid = unit
        size, half = self.options.size, self.options.size // FACTOR
        window = (..., slice(patch.y, patch.y + size), slice(patch.x, patch.x + size))
        if not valid[window[1:]].all():
            return None
        y, x = patch.y // FACTOR, patch.x // FACTOR
        images = ms[window], hs[:, y : y + half, x : x + half], truth[window]
        return Sample(*(torch.from_numpy(_turn(image, patch.symmetry) * np.float32(patch.gain)) for image in images))


def _units(index: int, cube: xr.Dataset) -> list[Unit]:
    """Return the chunks of a cube, whose 10 m and 20 m chunks must cover the same ground."""
    missing = [band for band in (*BANDS_10M, *BANDS_20M) if band not in cube]
    if missing:
        raise ValueError(f"cube {index} lacks {', '.join(missing)}; patches need the ten bands at 10 m and 20 m")
    for band in (*BANDS_10M, *BANDS_20M):
        like = cube["B02" if band in BANDS_10M else "B05"]
        if not np.issubdtype(cube[band].dtype, np.floating):
            raise ValueError(f"cube {index}: {band} is {cube[band].dtype}, digital numbers; patches need reflectance")
        if cube[band].chunksizes != like.chunksizes or set(cube[band].chunksizes.get("time", (1,))) != {1}:
            raise ValueError(
                f"cube {index}: {band} has the chunks {dict(cube[band].chunksizes)}; for each to be read once, the "
                "bands of one resolution must be chunked alike, in time one by one: ds.unify_chunks().chunk(time=1)"
            )
    check_nesting(Grid.from_coords(cube), Grid.from_coords(cube, COARSE_DIMS), FACTOR)
    axes = []
    for fine_dim, coarse_dim in zip(FINE_DIMS, COARSE_DIMS, strict=True):
        fine = cube["B02"].chunksizes.get(fine_dim, (cube.sizes[fine_dim],))
        coarse = cube["B05"].chunksizes.get(coarse_dim, (cube.sizes[coarse_dim],))
        if fine != tuple(FACTOR * n for n in coarse) or any(n % FACTOR for n in coarse[:-1]):
            even = max(coarse) // FACTOR * FACTOR
            raise ValueError(
                f"cube {index} has chunks {fine[:3]} in {fine_dim} and {coarse[:3]} in {coarse_dim}: 10 m chunks must "
                f"be twice the 20 m ones, and those even, for each to be read once. Type "
                f"ds.chunk({{'{fine_dim}': {FACTOR * even}, '{coarse_dim}': {even}}})"
            )
        edges = np.concatenate([[0], np.cumsum(coarse)]) // FACTOR * FACTOR
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


def _scaled(window: slice, factor: int) -> slice:
    return slice(window.start * factor, window.stop * factor)


def _turn(image: NDArray, symmetry: int) -> NDArray:
    """Return one of the eight symmetries of the square, as a copy."""
    mirrored = image[..., ::-1] if symmetry >= 4 else image
    return np.ascontiguousarray(np.rot90(mirrored, symmetry % 4, (-2, -1)))
