"""Compare our training patches with xbatcher's on one Zarr store: speed, memory, reads, how long a trainer waits.

    python benchmarks/loader.py

Writes ``benchmarks/loader.md``. Both sides yield the same pairs (`pairs` of each are compared as sets before anything
is timed): the patches of a regular grid, degraded by the same function with block means, which need no neighbours.
xbatcher has one generator per resolution, zipped: of a two-grid Dataset it makes every combination of the two grids'
windows. Each case runs in a fresh process; peaks are read from Linux's /proc.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import xarray as xr
from attention import in_fresh_process, machine, memory
from quality import as_cube, table
from torch.utils.data import DataLoader, IterableDataset
from zarr.abc.store import Store
from zarr.storage import LocalStore, WrapperStore

from xr_ginet.network import GINet, GINetConfig
from xr_ginet.sentinel2.bands import BANDS_10M, BANDS_20M
from xr_ginet.simulation import simulate
from xr_ginet.training.degradation import degrade
from xr_ginet.training.fit import FitOptions, Fitting
from xr_ginet.training.objective import relative_error
from xr_ginet.training.patches import Patches, PatchOptions, Sample

SIZE = 48  # of a patch at 20 m, in pixels
BATCH = 8


class Counting(WrapperStore[Store]):
    """A store that counts how often each chunk of a band is read."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.reads: Counter[str] = Counter()

    async def get(self, key: str, *args: Any, **kwargs: Any) -> Any:
        if re.match(r"B\w\w/c/", key):
            self.reads[key] += 1
        return await super().get(key, *args, **kwargs)


def write_store(path: Path, side: int, chunk: int) -> None:
    """Write a simulated two-grid cube of two dates, ``side`` pixels wide at 20 m."""
    scenes = [simulate((2 * side, 2 * side), seed=seed) for seed in (1, 2)]
    dates = np.array(["2024-06-01", "2024-06-11"], "datetime64[ns]")
    cube = xr.concat([as_cube(s.fine, s.coarse) for s in scenes], xr.DataArray(dates, dims="time", name="time"))
    chunks = {"time": 1, "y": 2 * chunk, "x": 2 * chunk, "y_20m": chunk, "x_20m": chunk}
    cube.chunk(chunks).ginet.to_zarr(path)


def ours(cube: xr.Dataset) -> IterableDataset:
    return Patches([cube], PatchOptions(size=SIZE, degradation="box", augment=False))


class Xbatcher(IterableDataset):
    """The same pairs from two of xbatcher's generators."""

    def __init__(self, cube: xr.Dataset) -> None:
        self.cube = cube

    def __iter__(self) -> Iterator[Sample]:
        import xbatcher

        fine, coarse = (
            xbatcher.BatchGenerator(self.cube[list(bands)], {"time": 1, f"y{grid}": size, f"x{grid}": size})
            for bands, grid, size in ((BANDS_10M, "", 2 * SIZE), (BANDS_20M, "_20m", SIZE))
        )
        for left, right in zip(fine, coarse, strict=True):
            ms, truth = (np.stack([b.values[0] for b in part.data_vars.values()]) for part in (left, right))
            ms, hs = degrade(ms, BANDS_10M, degradation="box"), degrade(truth, BANDS_20M, degradation="box")
            yield Sample(*(torch.from_numpy(image) for image in (ms, hs, truth)))


SIDES: dict[str, Callable[[xr.Dataset], IterableDataset]] = {"ours": ours, "xbatcher": Xbatcher}


def pairs(side: str, path: Path) -> Counter[bytes]:
    """Return the pairs of a pass, each as its bytes."""
    return Counter(b"".join(i.numpy().tobytes() for i in s) for s in SIDES[side](xr.open_zarr(path)))


def measure(side: str, path: Path, steps: int) -> dict[str, float]:
    """Return patches per second, peak memory, reads per chunk, and the share of time that a trainer waits."""
    torch.set_num_threads(1)
    fitting = Fitting(GINet(GINetConfig(n_features=6, n_stages=1, assignment="soft")), FitOptions())
    optimizer = torch.optim.AdamW(fitting.network.parameters())
    store = Counting(LocalStore(path, read_only=True))
    dataset = SIDES[side](xr.open_zarr(store))
    Path("/proc/self/clear_refs").write_text("5")
    before, start = memory("VmRSS"), time.perf_counter()
    count = sum(len(batch[0]) for batch in DataLoader(dataset, BATCH))
    seconds, peak, reads = time.perf_counter() - start, memory("VmHWM") - before, store.reads.copy()

    waited, start = 0.0, time.perf_counter()
    batches = iter(DataLoader(dataset, BATCH))
    for _ in range(steps):
        asked = time.perf_counter()
        batch = Sample(*next(batches))
        waited += time.perf_counter() - asked
        relative_error(fitting.network(batch.ms, batch.hs), batch.truth, batch.hs).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {
        "rate": count / seconds,
        "peak": peak,
        "reads": sum(reads.values()) / len(reads),
        "waits": waited / (time.perf_counter() - start),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=768, help="pixels of the store at 20 m")
    parser.add_argument("--chunk", type=int, default=192, help="pixels of its chunks at 20 m, a multiple of 48")
    parser.add_argument("--steps", type=int, default=24, help="of the trainer that waits")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("loader.md"))
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps(measure(options.measure[0], Path(options.measure[1]), options.steps)))
        return
    rows = []
    with TemporaryDirectory() as folder:
        path = Path(folder) / "cube.zarr"
        write_store(path, options.side, options.chunk)
        found = [pairs(side, path) for side in SIDES]
        if found[0] != found[1]:
            raise AssertionError("the two sides do not yield the same pairs")
        for side in SIDES:
            m = in_fresh_process(__file__, "--measure", side, path, "--steps", options.steps)
            rows.append(
                [side, f"{m['rate']:.0f}", f"{m['peak'] / 2**20:.0f}", f"{m['reads']:.1f}", f"{100 * m['waits']:.0f} %"]
            )
    parts = [
        "# Training patches",
        f"`python benchmarks/loader.py --side {options.side} --chunk {options.chunk} --steps {options.steps}`: "
        f"{sum(found[0].values())} pairs of {SIZE} pixels at 20 m, the same from both sides. {machine(1)}.",
        table(["", "patches per second", "peak MiB", "reads per chunk", "time that a trainer waits"], rows),
    ]
    options.out.write_text("\n\n".join(parts) + "\n")
    print(options.out.read_text())


if __name__ == "__main__":
    main()
