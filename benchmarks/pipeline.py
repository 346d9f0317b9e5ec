"""What everything around the network costs: the graph, its tasks, and reading, cutting and writing while it runs.

    python benchmarks/pipeline.py

Writes ``benchmarks/pipeline.md``. Graphs are of full tiles of a catalogue's item repeated over dates, built and
counted, not computed. The share of the network is measured in this process, from COGs to a Zarr store, with the
weights that are the default; peak memory of single blocks against the promised is a test (tests/test_architecture.py).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
import xarray as xr
from attention import machine
from quality import table

import xr_ginet
from xr_ginet.mapping.predictor import Predictor
from xr_ginet.simulation import simulate, write_cogs


def items(folder: Path, side: int, dates: int) -> list[dict]:
    """Return the items of a simulated scene on so many dates, five days apart, with the same rasters."""
    scene = simulate((side, side), seed=3)
    place = {"transform": scene.transform, "crs": scene.crs, "datetime": "2022-01-01T10:56:21Z"}
    item = write_cogs(scene.fine, scene.coarse, folder, item_id="S2A", **place)
    days = (f"{2022 + i // 60}-{i % 60 // 5 + 1:02d}-{i % 5 * 5 + 1:02d}T10:56:21Z" for i in range(dates))
    return [item | {"id": day, "properties": item["properties"] | {"datetime": day}} for day in days]


def graph_row(found: list[dict], chunk: int) -> list[str]:
    """Return how long the graph of items takes to build, and how large it is."""
    start = time.perf_counter()
    cube = xr_ginet.open_stac(found, chunks=chunk)
    opened = time.perf_counter()
    result = cube.ginet.superresolve(depth="auto")
    built = time.perf_counter()
    blocks, tasks = result["B05"].data.npartitions, len(result["B05"].data.__dask_graph__())
    return [
        f"{cube.sizes['time']}",
        f"{blocks:,}",
        f"{opened - start:.2f}",
        f"{built - opened:.2f}",
        f"{tasks:,}",
        f"{tasks / blocks:.0f}",
    ]


@contextmanager
def timed_network() -> Iterator[list[tuple[float, float]]]:
    """Collect when each block enters the network and leaves it."""
    times: list[tuple[float, float]] = []
    run = Predictor._compute

    def timed(self: Predictor, *arguments: Any) -> torch.Tensor:
        start = time.perf_counter()
        result = run(self, *arguments)
        times.append((start, time.perf_counter()))
        return result

    with patch.object(Predictor, "_compute", timed):
        yield times


def share_row(folder: Path, found: list[dict], weights: str, depth: str, chunk: int) -> list[str]:
    """Return how much of the time from COGs to Zarr is spent in the network, whose blocks come one at a time."""
    with timed_network() as times:
        start = time.perf_counter()
        result: xr.Dataset = xr_ginet.open_stac(found, chunks=chunk).ginet.superresolve(weights=weights, depth=depth)
        result.ginet.to_zarr(folder / f"{weights}-{depth}.zarr", dtype="uint16")
        wall = time.perf_counter() - start
    first, network = times[0][0] - start, sum(stop - start for start, stop in times)
    megapixels = result.sizes["y"] * result.sizes["x"] / 1e6
    return [
        weights,
        f"{depth} ({result.attrs['ginet_depth']})",
        f"{wall:.1f}",
        f"{first:.1f}",
        f"{network:.1f}",
        f"{1 - network / (wall - first):.1%}",
        f"{wall / megapixels:.2f}",
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=2048, help="pixels at 10 m of the simulated scene")
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--dates", type=int, nargs="*", default=[1, 10, 100, 300])
    parser.add_argument("--weights", nargs="*", default=["ginet-s", "ginet-xs"])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("pipeline.md"))
    options = parser.parse_args(arguments)
    with TemporaryDirectory() as name:
        folder = Path(name)
        found = items(folder, options.side, max(options.dates))
        graphs = [graph_row(found[:n], options.chunk) for n in options.dates]
        fine, coarse = slice(64), slice(32)
        corner = xr_ginet.open_stac(found[:1], chunks=64).isel(y=fine, x=fine, y_20m=coarse, x_20m=coarse)
        for weights in options.weights:
            corner.ginet.superresolve(weights=weights).compute()  # compilers take time once
        shares = [
            share_row(folder, found[:1], weights, depth, options.chunk)
            for weights in options.weights
            for depth in ("exact", "auto")
        ]
    header = ["weights", "depth", "all, s", "before the first block, s", "network, s", "around it", "s per megapixel"]
    page = (
        "# What everything around the network costs\n\n"
        f"`python benchmarks/pipeline.py`: {options.side} × {options.side} pixels, chunks of {options.chunk}. "
        f"{machine(torch.get_num_threads())}.\n\n"
        "## The graph\n\nFrom items to the super-resolved cube, lazily.\n\n"
        f"{table(['dates', 'blocks', 'open_stac, s', 'superresolve, s', 'tasks', 'tasks per block'], graphs)}\n\n"
        "## From COGs to Zarr, one date\n\nBefore the first block: building the graph, reading what that block needs. "
        "Around the network, from then on: reading, cutting, filling, masking, compressing, writing, where it is not "
        "hidden behind the network.\n\n"
        f"{table(header, shares)}\n"
    )
    options.out.write_text(page)
    print(page)


if __name__ == "__main__":
    main()
