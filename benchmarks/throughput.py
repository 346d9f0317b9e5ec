"""How fast the network is on this processor, as a share of what the processor's matrix products reach in the same run.

    python benchmarks/throughput.py

Writes ``benchmarks/throughput.md``. Only operations of convolutions are counted, by torch's own counter, so that the
share tells how much of the time is not spent in them at full rate. A round times a matrix product, the residual blocks
alone and the whole network one after the other; of all rounds the median of the shares is told, because a processor's
rate changes with what else its host does.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from attention import machine
from quality import table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from xr_ginet.mapping.heap import glibc
from xr_ginet.network import GINet, GINetConfig, load_checkpoint
from xr_ginet.network.bfloat16 import in_bfloat16, is_faster

MATRIX = 1024
PAPER = "paper's network"


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def operations(function: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def matrix_rate(dtype: torch.dtype) -> float:
    """Return the operations per second of a matrix product, the best of five."""
    a, b = (torch.rand(MATRIX, MATRIX).to(dtype) for _ in range(2))
    return 2 * MATRIX**3 / min(seconds(lambda: a @ b) for _ in range(5))


def row(name: str, side: int, threads: int, rounds: int, dtype: torch.dtype) -> list[str]:
    """Return the rates of one network on blocks of one size."""
    network: nn.Module = GINet(GINetConfig()) if name == PAPER else load_checkpoint(name).network()
    if dtype == torch.bfloat16:
        network, images = in_bfloat16(network), torch.float32
    else:
        network, images = network.to(dtype), dtype
    ms, hs = torch.rand(1, 4, side, side, dtype=images), torch.rand(1, 6, side // 2, side // 2, dtype=images)
    blocks = network.stages[0].correction.blocks
    width = network.config.n_features + 10
    features = torch.rand(1, width, side, side, dtype=images).contiguous(memory_format=torch.channels_last)
    torch.set_num_threads(threads)
    cases = {"blocks": lambda: blocks(features), "network": lambda: network(ms, hs)}
    with torch.inference_mode():
        count = {case: operations(function) for case, function in cases.items()}  # and warms up
        shares: dict[str, list[float]] = {case: [] for case in cases}
        rates, peaks = [], []
        for _ in range(rounds):
            peaks.append(matrix_rate(dtype))
            for case, function in cases.items():
                taken = seconds(function)
                shares[case].append(count[case] / taken / peaks[-1])
            rates.append(side**2 / taken / 1e6)
    return [
        name,
        str(dtype).removeprefix("torch."),
        f"{side}",
        f"{threads}",
        f"{statistics.median(peaks) / 1e9:.0f}",
        f"{statistics.median(rates):.3f}",
        f"{statistics.median(shares['network']):.0%}",
        f"{statistics.median(shares['blocks']):.0%}",
    ]


def at_once(name: str, side: int, cores: int, rounds: int) -> list[str]:
    """Return the rates of as many blocks as cores: one after the other on all cores, and side by side on one each."""
    network = load_checkpoint(name).network()
    ms, hs = torch.rand(1, 4, side, side), torch.rand(1, 6, side // 2, side // 2)

    def block(_: int = 0) -> None:
        with torch.inference_mode():
            network(ms, hs)

    rates: dict[str, list[float]] = {"after": [], "beside": []}
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(rounds + 1):  # the first warms up
            torch.set_num_threads(cores)
            rates["after"].append(cores * side**2 / seconds(lambda: [block() for _ in range(cores)]) / 1e6)
            torch.set_num_threads(1)
            rates["beside"].append(cores * side**2 / seconds(lambda: list(pool.map(block, range(cores)))) / 1e6)
    medians = [statistics.median(rates[way][1:]) for way in ("after", "beside")]
    return [name, f"{side}", *(f"{m:.3f}" for m in medians), f"{medians[1] / medians[0]:.2f}"]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", nargs="*", default=["ginet-xs", "ginet-s", PAPER])
    parser.add_argument("--sides", type=int, nargs="*", default=[256, 560, 1072], help="10 m pixels of a block; even")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("throughput.md"))
    options = parser.parse_args(arguments)
    before = torch.get_num_threads()
    glibc()  # the main thread takes its memory from the main heap already
    rows = []
    for name in options.weights:
        sides = options.sides[:1] if name == PAPER else options.sides  # it takes minutes on larger ones
        for dtype in [torch.float32, torch.bfloat16][: 1 + is_faster()]:
            rows += [row(name, side, n, options.rounds, dtype) for side in sides for n in options.threads]
        rows.append(row(name, options.sides[0], options.threads[0], options.rounds, torch.float64))
    cores = max(options.threads)
    ours = [name for name in options.weights if name != PAPER]
    ways = [at_once(name, side, cores, options.rounds) for name in ours for side in options.sides]
    torch.set_num_threads(before)
    header = ["weights", "precision", "block", "threads", "matrix product, GFLOP/s", "Mpixel/s", "network", "blocks"]
    page = (
        "# How fast the network is on a processor\n\n"
        f"`python benchmarks/throughput.py`. {machine(max(options.threads))}. `network` and `blocks` (the residual "
        "blocks alone): operations of their convolutions per second, as a share of the rate of a "
        f"{MATRIX} × {MATRIX} matrix product of that precision in the same round. In bfloat16 (if it is faster here) "
        f"are the residual blocks alone.\n\n{table(header, rows)}\n\n"
        "## Blocks one after the other, or side by side\n\n"
        f"{cores} blocks on {cores} cores, Mpixel/s: one at a time with {cores} threads, as our processes work, or "
        "all at once with a thread each, which takes as many times the memory; only one of them then has glibc's main "
        "heap (`mapping/heap.py`).\n\n"
        f"{table(['weights', 'block', 'after', 'beside', 'ratio'], ways)}\n"
    )
    options.out.write_text(page)
    print(page)


if __name__ == "__main__":
    main()
