"""What a Dask cluster makes of a job: efficiency of workers, time to the first chunk, memory; and other schedulers.

    python benchmarks/cluster.py

Writes ``benchmarks/cluster.md``. Workers are processes of one thread on this machine, so that two of them share its
memory bandwidth and its cache, as two machines would not. Simulated ones sleep for as long as the network takes for a
block on one thread, and do everything else: what is told then is what a scheduler and a store make of them. All that
they do beside sleeping they do on the processors of this machine.
"""

from __future__ import annotations

import argparse
import platform
import threading
import time
import timeit
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import dask
import dask.array as da
import numpy as np
import psutil
import torch
import xarray as xr
from distributed import Client, LocalCluster
from numpy.typing import NDArray
from quality import table

import xr_ginet
from xr_ginet.mapping.heap import one_at_a_time
from xr_ginet.mapping.pipeline import resolve_depth
from xr_ginet.mapping.predictor import Predictor
from xr_ginet.network import load_checkpoint
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
    """Return when the first pixels of a super-resolved band are in a store, or None if a computation ended without."""
    while True:
        last = ended.is_set()  # before the look, so that it is not missed by a thread that waits for its turn
        if any(store.glob("B05/c/0/*/*")):
            return time.monotonic()
        if last:
            return None
        time.sleep(0.02)


def seconds_per_block(weights: str, chunk: int) -> float:
    """Return how long the network takes for a block, on one thread."""
    depth = resolve_depth("auto", load_checkpoint(weights))
    run = Predictor.of(load_checkpoint(weights), device="cpu", depth=depth)
    side = chunk + 2 * depth
    fine, coarse = np.ones((4, side, side), "float32"), np.ones((6, side // 2, side // 2), "float32")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = min(timeit.repeat(lambda: run(fine, coarse), number=1, repeat=4))
    torch.set_num_threads(before)
    return seconds


def sleep_instead(seconds: float) -> None:
    """Let this process's networks sleep, and return zeros."""

    def call(self: Predictor, fine: NDArray, coarse: NDArray, part: tuple[slice, slice]) -> NDArray:
        one_at_a_time(time.sleep, seconds)
        return np.zeros((*coarse.shape[:-2], *(p.stop - p.start for p in part)), self.dtype)

    Predictor.__call__ = call  # type: ignore[method-assign]


def throughput(
    workers: int, options: argparse.Namespace, folder: Path, *, side: int, asleep: float = 0
) -> tuple[float, float, float]:
    """Return megapixels per second of some dates, and the seconds to the first chunk and to the first date."""
    cube = cube_of(side, options.chunk, options.dates).ginet.superresolve(weights=options.weights, depth="auto")
    ends: list[float] = []
    ended = threading.Event()
    with (
        ThreadPoolExecutor(1) as watcher,
        LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        client.run(torch.set_num_threads, 1)
        if asleep:
            client.run(sleep_instead, asleep)
        else:
            client.run(seconds_per_block, options.weights, 64)  # warms up
        cube.isel(time=slice(1), y=slice(options.chunk), x=slice(options.chunk)).ginet.to_zarr(
            folder / f"warm-{workers}-{bool(asleep)}.zarr", resume=True
        )
        store = folder / f"{workers}-{bool(asleep)}.zarr"
        first = watcher.submit(first_chunk, store, ended)
        began = time.monotonic()
        cube.ginet.to_zarr(store, resume=True, tell=lambda outcome: ends.append(time.monotonic() - began))
        ended.set()
    return options.dates * side**2 / ends[-1] / 1e6, first.result() - began, ends[0]


def rows_of(found: dict[int, tuple[float, float, float]], alone: float, kind: str = "") -> Iterator[list[str]]:
    """Yield the table's rows; efficiency is relative to the megapixels per second of one worker ``alone``."""
    for workers, (speed, chunk, date) in found.items():
        efficiency = speed / alone / workers
        yield [f"{workers}{kind}", f"{speed:.3f}", f"{efficiency:.2f}", f"{chunk:.1f}", f"{date:.1f}"]


def peak_while(function: Callable[[], object]) -> int:
    """Return the most bytes that this process and those that it starts hold while a function runs."""
    peak, this = 0, psutil.Process()
    with ThreadPoolExecutor(1) as watched:
        running = watched.submit(function)
        while not wait([running], 0.1).done:
            held = 0
            for process in [this, *this.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    held += process.memory_info().rss
            peak = max(peak, held)
    running.result()  # raises what the function raised
    return peak


def scheduler_row(name: str, options: argparse.Namespace, folder: Path) -> list[str]:
    """Return what one of Dask's schedulers makes of all cores of this machine."""
    cores = psutil.cpu_count()
    cube = cube_of(options.schedulers_side, options.chunk, 1).ginet.superresolve(weights=options.weights, depth="auto")
    corner = cube.isel(y=slice(options.chunk), x=slice(options.chunk))
    spent = 0.0

    def run() -> None:
        nonlocal spent
        corner.ginet.to_zarr(folder / f"{name} warm.zarr")  # processes of a pool are new each time: they start in both
        began = time.monotonic()
        cube.ginet.to_zarr(folder / f"{name}.zarr")
        spent = time.monotonic() - began

    with ExitStack() as stack:
        if name in ("threads", "processes"):
            stack.enter_context(dask.config.set(scheduler=name))
        else:
            workers = 1 if name == "one worker" else cores
            shape = {"n_workers": workers, "threads_per_worker": cores // workers, "dashboard_address": ":0"}
            stack.enter_context(Client(stack.enter_context(LocalCluster(**shape))))
        peak = peak_while(run)
    return [name, f"{options.schedulers_side**2 / spent / 1e6:.3f}", f"{peak / 2**30:.2f}"]


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
    parser.add_argument("--side", type=int, default=4096, help="pixels of a date at 10 m")
    parser.add_argument("--chunk", type=int, default=1024, help="that of xr-ginet superresolve")
    parser.add_argument("--dates", type=int, default=1)
    parser.add_argument("--weights", default="ginet-s")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--simulated", type=int, nargs="*", default=[4, 9])
    parser.add_argument("--simulated-side", type=int, default=6144)
    parser.add_argument("--blocks", type=int, default=10_000)
    parser.add_argument("--schedulers", nargs="*", default=["threads", "processes", "one worker", "a worker per core"])
    parser.add_argument("--schedulers-side", type=int, default=3072)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("cluster.md"))
    options = parser.parse_args(arguments)
    asleep = seconds_per_block(options.weights, options.chunk)
    with TemporaryDirectory() as folder:
        found = {n: throughput(n, options, Path(folder), side=options.side) for n in options.workers}
        simulated = {
            n: throughput(n, options, Path(folder), side=options.simulated_side, asleep=asleep)
            for n in options.simulated
        }
        schedulers = [scheduler_row(name, options, Path(folder)) for name in options.schedulers]
    first, (speed, *_) = next(iter(found.items()))
    rows = [
        *rows_of(found, speed / first),
        *rows_of(simulated, options.chunk**2 / asleep / 1e6, ", simulated"),
    ]
    tasks, memory = scheduler_memory(options.blocks, options.chunk)
    parts = [
        "# On a cluster",
        f"`python benchmarks/cluster.py`: dates × pixels: {options.dates} × {options.side}², in chunks of "
        f"{options.chunk}, `{options.weights}`, from a lazy cube into Zarr, date by date, on {platform.machine()} with "
        f"{psutil.cpu_count()} cores. Simulated workers sleep for the {asleep:.2f} s that the network takes for a "
        f"block, and have dates of {options.simulated_side}² pixels; their efficiency is relative to sleep alone.",
        table(["workers", "megapixels per second", "efficiency", "s to the first chunk", "s to the first date"], rows),
        f"{options.blocks:,} blocks of one band in one graph are {tasks:,} tasks; client and scheduler take "
        f"{memory / 1e6:.0f} MB to hold them. `to_zarr(resume=True)` and `xr-ginet submit` hand the scheduler one date "
        "at a time: 121 blocks of 1024² pixels for a tile.",
        "## Under each of Dask's schedulers",
        f"{options.schedulers_side}² pixels in chunks of {options.chunk}, on all cores. A process runs one block at a "
        "time, with as many threads as it has cores: all of them under Dask's threads, one in a process of a pool "
        "(which starts anew for each computation), those of the worker under `distributed`. Memory is that of all "
        "processes together.",
        table(["scheduler", "megapixels per second", "peak memory, GiB"], schedulers),
    ]
    options.out.write_text("\n\n".join(parts) + "\n")
    print(options.out.read_text())


if __name__ == "__main__":
    main()
