"""A whole tile, from COGs to a Zarr store, streamed: time and peak memory, and a sixteenth of it for comparison.

    python benchmarks/tile.py

Writes ``benchmarks/tile.md``. The tile is a simulated scene, repeated until it has 10,980 pixels on each side, in COGs
as a catalogue has them. Each run is a process of its own, with Dask's threads and all cores; its peak memory is read
from Linux's /proc, and holds the interpreter and all libraries.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from attention import machine, memory


def write_tile(folder: Path, side: int, scene_side: int) -> Path:
    """Write a simulated scene, repeated to ``side`` pixels at 10 m, as COGs; return where its item is."""
    from xr_ginet.simulation import simulate, write_cogs
    from xr_ginet.simulation.cogs import digital_numbers

    scene = simulate((scene_side, scene_side), seed=3)
    repeats = -(-side // scene_side)
    fine, coarse = (
        np.tile(digital_numbers(bands), (1, repeats, repeats))[:, :n, :n]
        for bands, n in ((scene.fine, side), (scene.coarse, side // 2))
    )
    place = {"transform": scene.transform, "crs": scene.crs, "datetime": "2024-06-01T10:56:21Z"}
    item = write_cogs(fine, coarse, folder, item_id=f"S2A-{side}", **place)
    path = folder / f"{side}.json"
    path.write_text(json.dumps(item))
    return path


def measure(item: Path, network: str, chunk: int) -> dict[str, float]:
    """Super-resolve one tile in this process; return seconds and the peak of its memory in bytes."""
    import xr_ginet

    Path("/proc/self/clear_refs").write_text("5")  # a process starts with its parent's peak
    start = time.perf_counter()
    cube = xr_ginet.open_stac([json.loads(item.read_text())], chunks=chunk)
    weights, _, precision = network.partition(":")
    result = cube.ginet.superresolve(weights=weights, precision=precision or "float32", depth="auto")
    result.ginet.to_zarr(item.with_name(f"{item.stem}-{weights}-{precision}.zarr"), dtype="uint16", mode="w")
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak": memory("VmHWM")}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="*", default=[2744, 10980], help="pixels at 10 m; even")
    parser.add_argument("--scene", type=int, default=1830, help="pixels of the scene that is repeated")
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument(
        "--weights", nargs="*", default=["ginet-xs", "ginet-s", "ginet-s:bfloat16"], help="with precision"
    )
    parser.add_argument("--folder", type=Path, help="where the COGs and cubes go; a temporary one by default")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("tile.md"))
    parser.add_argument("--write", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.write:
        write_tile(Path(options.write[0]), int(options.write[1]), options.scene)
        return
    if options.measure:
        print(json.dumps(measure(Path(options.measure[0]), options.measure[1], options.chunk)))
        return
    import torch
    from quality import table

    def run(*command: str) -> str:
        common = ["--scene", str(options.scene), "--chunk", str(options.chunk)]
        done = subprocess.run(
            [sys.executable, __file__, *common, *command], check=True, stdout=subprocess.PIPE, text=True
        )
        return done.stdout

    rows = []
    with TemporaryDirectory(dir=options.folder) as name:
        for side in options.sides:
            run("--write", name, str(side))
            for weights in options.weights:
                found = json.loads(run("--measure", f"{name}/{side}.json", weights).splitlines()[-1])
                megapixels = side**2 / 1e6
                rows.append(
                    [
                        weights,
                        f"{side:,} × {side:,}",
                        f"{found['seconds']:.0f}",
                        f"{found['seconds'] / megapixels:.2f}",
                        f"{found['peak'] / 2**30:.2f}",
                    ]
                )
                print(*rows[-1], flush=True)
    page = (
        "# A whole tile, from COGs to Zarr\n\n"
        f"`python benchmarks/tile.py --sides {' '.join(map(str, options.sides))}`: "
        f'chunks of {options.chunk}, `depth="auto"`, stored as uint16. '
        f"{machine(torch.get_num_threads())}.\n\n"
        f"{table(['weights', 'pixels', 's', 's per megapixel', 'peak memory, GiB'], rows)}\n"
    )
    options.out.write_text(page)
    print(page)


if __name__ == "__main__":
    main()
