"""What 8 bits in the residual blocks cost and gain on processors: ``precision="int8"``.

    python benchmarks/eight_bits.py [--store]

Writes ``benchmarks/eight_bits.md``. Ranges are those of activations on the scenes that the weights were trained on, as
they are and at reduced scale; ``--store`` writes them into the model cards, where ``superresolve(precision="int8")``
finds them. Errors are those of ``benchmarks/quality.py``, on scenes that neither saw. Time is that of one block, with
all threads.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from attention import machine
from evaluation import LOSSY, TEST, TRAIN, VALIDATION, predict, read_scene, wald_pair
from quality import BORDER, overall, table
from torch import Tensor

from xr_ginet.mapping.heap import glibc
from xr_ginet.network import Checkpoint, GINet, load_checkpoint, save_checkpoint
from xr_ginet.network.eight_bits import activation_ranges, in_eight_bits
from xr_ginet.training.metrics import rmse


def images(scenes: Path, checkpoint: Checkpoint, names: Iterable[str], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the inputs of scenes at both scales, ``size`` pixels at 20 m at most."""
    for name in names:
        scene = read_scene(scenes, name)
        for fine, coarse in ((scene.fine, scene.coarse), wald_pair(scene, checkpoint.card["degradation"])[:2]):
            height, width = (min(size, n) for n in coarse.shape[1:])
            yield (
                torch.from_numpy(fine[None, :, : 2 * height, : 2 * width]),
                torch.from_numpy(coarse[None, :, :height, :width]),
            )


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
    parser.add_argument("--weights", nargs="*", default=["ginet-s", "ginet-s-box"])
    parser.add_argument("--learned", nargs="*", default=[name for name in TRAIN if name not in LOSSY])
    parser.add_argument("--judged", nargs="*", default=[*VALIDATION, *TEST])
    parser.add_argument("--size", type=int, default=256, help="pixels at 20 m of what ranges are taken from")
    parser.add_argument("--side", type=int, default=1056, help="pixels at 10 m of the block that is timed")
    parser.add_argument("--store", action="store_true", help="write the ranges into the packaged files")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("eight_bits.md"))
    options = parser.parse_args(arguments)
    errors, times = [], []
    for name in options.weights:
        checkpoint = load_checkpoint(name)
        plain = checkpoint.network()
        ranges = activation_ranges(plain, images(options.scenes, checkpoint, options.learned, options.size))
        rounded = in_eight_bits(checkpoint.network(), ranges)
        for scene in options.judged:
            ms, hs, truth = wald_pair(read_scene(options.scenes, scene), checkpoint.card["degradation"])
            results = [predict(network, ms, hs) for network in (plain, rounded)]
            before, after = (overall(rmse(result, truth, border=BORDER)) for result in results)
            change = f"{100 * (after / before - 1):+.2f}%"
            apart = results[1] - results[0]
            largest, typical = np.abs(apart).max() * 1e4, np.sqrt((apart**2).mean()) * 1e4
            errors.append([name, scene, f"{before:.1f}", f"{after:.1f}", change, f"{typical:.1f}", f"{largest:.0f}"])
        one, other = seconds_per_megapixel([plain, rounded], options.side)
        times.append([name, f"{one:.2f}", f"{other:.2f}", f"{one / other:.2f}"])
        if options.store:
            told = np.vectorize(lambda value: float(f"{value:.3g}"))(ranges.numpy()).tolist()
            save_checkpoint(checkpoint.path, plain, checkpoint.card | {"ranges": told})
    page = [
        "# 8 bits on processors",
        f"Made by `python benchmarks/eight_bits.py`. {machine(torch.get_num_threads())}.",
        "RMSE at reduced scale and differences in digital numbers, on scenes that the ranges were not taken from.",
        table(["weights", "scene", "float32", "int8", "change", "RMS difference", "largest difference"], errors),
        f"Seconds per megapixel of a block of {options.side}² pixels, the network alone.",
        table(["weights", "float32", "int8", "times faster"], times),
    ]
    options.out.write_text("\n\n".join(page) + "\n")
    print(options.out.read_text())


if __name__ == "__main__":
    main()
