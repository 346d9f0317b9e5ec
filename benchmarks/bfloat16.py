"""What bfloat16 in the residual blocks costs and gains on processors: ``precision="bfloat16"``.

    python benchmarks/bfloat16.py

Writes ``benchmarks/bfloat16.md``. Errors are those of ``benchmarks/quality.py``, on scenes that were not trained on.
Time is that of one block, with all threads.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from attention import machine
from evaluation import TEST, VALIDATION, predict, read_scene, wald_pair
from quality import BORDER, overall, table

from xr_ginet.mapping.heap import glibc
from xr_ginet.network import GINet, load_checkpoint
from xr_ginet.network.bfloat16 import in_bfloat16, is_faster
from xr_ginet.training.metrics import rmse


def seconds_per_megapixel(networks: list[GINet], side: int, rounds: int = 3) -> list[float]:
    """Return the least time that each network takes for a block, one after the other in turns."""
    glibc()  # as for the networks of `superresolve`
    ms, hs = torch.rand(1, 4, side, side) * 0.4, torch.rand(1, 6, side // 2, side // 2) * 0.4
    least = [np.inf] * len(networks)
    with torch.inference_mode():
        for _ in range(rounds):
            for number, network in enumerate(networks):
                start = time.perf_counter()
                network(ms, hs)
                least[number] = min(least[number], time.perf_counter() - start)
    return [seconds / side**2 * 1e6 for seconds in least]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=Path, default=Path("../shared/data/scenes"))
    parser.add_argument("--weights", nargs="*", default=["ginet", "ginet-s", "ginet-xs"])
    parser.add_argument("--judged", nargs="*", default=[*VALIDATION, *TEST])
    parser.add_argument("--side", type=int, default=544, help="pixels at 10 m of the block that is timed")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("bfloat16.md"))
    options = parser.parse_args(arguments)
    errors, times = [], []
    for name in options.weights:
        plain, rounded = load_checkpoint(name).network(), in_bfloat16(load_checkpoint(name).network())
        for scene in options.judged:
            ms, hs, truth = wald_pair(read_scene(options.scenes, scene), load_checkpoint(name).card["degradation"])
            results = [predict(network, ms, hs) for network in (plain, rounded)]
            before, after = (overall(rmse(result, truth, border=BORDER)) for result in results)
            change = f"{100 * (after / before - 1):+.2f}%"
            apart = results[1] - results[0]
            largest, typical = np.abs(apart).max() * 1e4, np.sqrt((apart**2).mean()) * 1e4
            errors.append([name, scene, f"{before:.2f}", f"{after:.2f}", change, f"{typical:.2f}", f"{largest:.1f}"])
        one, other = seconds_per_megapixel([plain, rounded], options.side)
        times.append([name, f"{one:.2f}", f"{other:.2f}", f"{one / other:.2f}"])
    page = [
        "# bfloat16 on processors",
        f"Made by `python benchmarks/bfloat16.py`. {machine(torch.get_num_threads())}. This processor's "
        f"instructions multiply bfloat16 {'' if is_faster() else 'no '}faster than float32: "
        f"{'blocks are multiplied in it' if is_faster() else 'blocks are rounded alike, and multiplied in float32'}.",
        "RMSE at reduced scale and differences in digital numbers, on scenes that were not trained on.",
        table(["weights", "scene", "float32", "bfloat16", "change", "RMS difference", "largest difference"], errors),
        f"Seconds per megapixel of a block of {options.side}² pixels, the network alone.",
        table(["weights", "float32", "bfloat16", "times faster"], times),
    ]
    options.out.write_text("\n\n".join(page) + "\n")
    print(options.out.read_text())


if __name__ == "__main__":
    main()
