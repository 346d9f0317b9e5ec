"""What a Dask cluster makes of a job: efficiency of two workers, time to the first block, memory of the scheduler.

    python benchmarks/cluster.py

Writes ``benchmarks/cluster.md``. Workers are processes of one thread on this machine, so that two of them share its
memory bandwidth and its cache, as two machines would not.
"""

from __future__ import annotations

import argparse
import platform
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import dask.array as da
import numpy as np
import psutil
import torch
import xarray as xr
from distributed import Client, LocalCluster
from quality import table

import xr_ginet
from xr_ginet.sentinel2.bands import BANDS_10M, BANDS_20M


def cube_of(side: int, chunk: int, n_times: int) -> xr.Dataset:
    """Return a lazy cube of random reflectance; ``side`` is at 10 m."""
    times = np.datetime64("2024-05-01", "ns") + np.arange(n_times) * np.timedelta64(5, "D")
    parts = []
    for bands, pixel in ((BANDS_10M, 10), (BANDS_20M, 20)):
        n, c = side * 10 // pixel, chunk * 10 // pixel
        coords = {"time": times, "y": -pixel * (np.arange(n) + 0.5), "x": pixel * (np.arange(n) + 0.5)}
        lazy = da.random.default_rng(0).random((n_times, n, n), chunks=(1, c, c), dtype="float32") * 0.4
        parts.append(xr.Dataset({band: (("time", "y", "x"), lazy) for band in bands}, coords))
    return xr_ginet.pair(*parts)


def first_chunk(store: Path, ended: threading.Event) -> float | None:
    """Return when the first pixels of a super-resolved band are in a store, or None if a computation ended before."""
    while not ended.is_set():
        if any(store.glob("B05/c/0/*/*")):
            return time.monotonic()
        time.sleep(0.02)
    return None


def throughput(workers: int, options: argparse.Namespace, folder: Path) -> tuple[float, float, float]:
    """Return megapixels per second of some dates, and the seconds to the first chunk and to the first date."""
    cube = cube_of(options.side, options.chunk, options.dates).ginet.superresolve(weights=options.weights, depth="auto")
    ends: list[float] = []
    ended = threading.Event()
    with (
        ThreadPoolExecutor(1) as watcher,
        LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        client.run(torch.set_num_threads, 1)
        cube.isel(time=slice(1)).ginet.to_zarr(folder / f"warm-{workers}.zarr", resume=True)
        first = watcher.submit(first_chunk, folder / f"{workers}.zarr", ended)
        began = time.monotonic()
        cube.ginet.to_zarr(
            folder / f"{workers}.zarr", resume=True, tell=lambda outcome: ends.append(time.monotonic() - began)
        )
        ended.set()
    return options.dates * options.side**2 / ends[-1] / 1e6, first.result() - began, ends[0]


def scheduler_memory(blocks: int, chunk: int) -> tuple[int, int]:
    """Return the tasks of a graph of so many blocks, and the bytes that client and scheduler take to hold them."""
    side = round(np.sqrt(blocks)) * chunk
    cube = cube_of(side, chunk, 1).ginet.superresolve(weights="ginet-xs", depth="auto")
    with LocalCluster(n_workers=0, processes=False, dashboard_address=":0") as cluster, Client(cluster) as client:
        before = psutil.Process().memory_info().rss
        waiting = client.compute(cube["B05"].data.sum())
        tasks = -1
        while tasks < blocks or tasks != len(cluster.scheduler.tasks):  # they arrive bit by bit
            tasks = len(cluster.scheduler.tasks)
            time.sleep(2)
        found = len(cluster.scheduler.tasks), psutil.Process().memory_info().rss - before
        waiting.cancel()
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=1024, help="pixels of a date at 10 m")
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--dates", type=int, default=2)
    parser.add_argument("--weights", default="ginet-s")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--blocks", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("cluster.md"))
    options = parser.parse_args(arguments)
    rows = []
    with TemporaryDirectory() as folder:
        found = {workers: throughput(workers, options, Path(folder)) for workers in options.workers}
    first = options.workers[0]
    for workers, (speed, chunk, date) in found.items():
        efficiency = speed / found[first][0] * first / workers
        rows.append([str(workers), f"{speed:.3f}", f"{efficiency:.2f}", f"{chunk:.1f}", f"{date:.1f}"])
    tasks, memory = scheduler_memory(options.blocks, options.chunk)
    parts = [
        "# On a cluster",
        f"`python benchmarks/cluster.py`: {options.dates} dates of {options.side}² pixels in chunks of "
        f"{options.chunk}, `{options.weights}`, from a lazy cube into Zarr, date by date, on {platform.machine()} with "
        f"{psutil.cpu_count()} cores.",
        table(["workers", "megapixels per second", "efficiency", "s to the first chunk", "s to the first date"], rows),
        f"{options.blocks:,} blocks of one band in one graph are {tasks:,} tasks; client and scheduler take "
        f"{memory / 1e6:.0f} MB to hold them. `to_zarr(resume=True)` and `xr-ginet submit` hand the scheduler one date "
        "at a time: 121 blocks of 1024² pixels for a tile.",
    ]
    options.out.write_text("\n\n".join(parts) + "\n")
    print(options.out.read_text())


if __name__ == "__main__":
    main()
