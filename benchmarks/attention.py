"""Compare our attention and our whole network with the literal implementation: time and peak memory.

    python benchmarks/attention.py --size 512 --full --runs 2

Prints a Markdown table and writes it to ``benchmarks/results.md``. Each case runs in fresh processes: one that builds
the module and its inputs, runs it on a corner of them and stops, one that goes on to run it on all of them; peak memory
is the difference of their peaks, so it counts what the computation needs and not the interpreter, torch, compilers or
the weights. That both sides compute the same function is asserted in tests/test_network.py, not here. Peaks are read
from Linux's /proc. Networks are measured in bfloat16 too where that is what ``precision="auto"`` is.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

CASES: dict[str, dict[str, int]] = {
    "attention": {},
    "attention in torch": {},
    "compact network": {"stages": 4, "features": 22},
    "paper's network": {"stages": 6, "features": 128},
}


def measure(case: str, side: str, size: int, runs: int) -> dict[str, Any]:
    """Return the median seconds of ``runs`` forward passes, and what they add to this process's peak, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")  # a process starts with its parent's peak
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import torch
    from literal_ginet import LiteralAttention, LiteralGINet

    from xr_ginet.network import GINet, GINetConfig, attention
    from xr_ginet.network.attention import WindowAttention
    from xr_ginet.network.bfloat16 import in_bfloat16

    torch.manual_seed(0)
    widths = CASES[case]
    module: torch.nn.Module
    if case == "attention in torch":  # as with gradients, and on GPUs
        attention.may_compile = lambda x: False
    if case.startswith("attention"):
        inputs = torch.rand(1, 5, size, size), torch.rand(1, 3, size, size)
        ours = side == "ours"
        module = WindowAttention(5, 3, window_size=5, patch_size=3) if ours else LiteralAttention(5, 3, 3, 5)
    else:
        inputs = torch.rand(1, 4, size, size), torch.rand(1, 6, size // 2, size // 2)
        if side != "literal":
            module = GINet(GINetConfig(n_stages=widths["stages"], n_features=widths["features"]))
            module = in_bfloat16(module) if side == "ours, bfloat16" else module
        else:
            module = LiteralGINet(**widths)
    seconds = []
    with torch.inference_mode():
        module(*(image[..., :16, :16] if image.shape[-1] == size else image[..., :8, :8] for image in inputs))
        idle = memory("VmHWM")
        for _ in range(runs + 1):  # the first one warms up
            start = time.perf_counter()
            module(*inputs)
            seconds.append(time.perf_counter() - start)
    peak = memory("VmHWM") - idle
    return {"seconds": statistics.median(seconds[1:]), "peak": peak, "threads": torch.get_num_threads()}


def memory(field: str) -> int:
    """Return what Linux says of this process in bytes: ``VmRSS`` is resident, ``VmHWM`` the most that was."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def in_fresh_process(script: str, *arguments: object) -> dict[str, Any]:
    """Return what a script prints as JSON in its last line, in a process of its own."""
    command = [sys.executable, script, *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def machine(threads: int) -> str:
    """Return one line that names the processor and the versions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "xr-ginet"))
    return f"{cpu}, {os.cpu_count()} cores, {threads} threads; Python {platform.python_version()}, {versions}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=256, help="side of the square image in fine pixels; even")
    parser.add_argument("--runs", type=int, default=5, help="timed forward passes, of which the median counts")
    parser.add_argument("--full", action="store_true", help="also the paper's network (seconds to minutes a pass)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.md"))
    parser.add_argument("--measure", nargs=2, metavar=("CASE", "SIDE"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        case, side = options.measure
        print(json.dumps(measure(case, side, options.size, options.runs)))
        return
    from xr_ginet.network.bfloat16 import is_faster

    rows, threads = [], 0
    for case in list(CASES)[: None if options.full else -1]:
        ours = ["ours", "ours, bfloat16"] if CASES[case] and is_faster() else ["ours"]
        seconds, peak = {}, {}
        for side in (*ours, "literal"):
            size = "--size", options.size, "--runs", options.runs
            found = in_fresh_process(__file__, "--measure", case, side, *size)
            seconds[side], peak[side], threads = found["seconds"], found["peak"], found["threads"]
        rows += [
            f"| {case}{side.removeprefix('ours')} | {seconds[side]:.3f} | {seconds['literal']:.3f} "
            f"| {seconds['literal'] / seconds[side]:.1f} | {peak[side] / 2**20:.0f} | {peak['literal'] / 2**20:.0f} "
            f"| {peak['literal'] / peak[side]:.1f} |"
            for side in ours
        ]
    lines = [
        "# The network against a literal implementation",
        "",
        f"`python benchmarks/attention.py --size {options.size}{' --full' * options.full} --runs {options.runs}`: "
        f"{options.size} x {options.size} pixels, median of {options.runs} runs; float32 where nothing else is told. "
        f"{machine(threads)}.",
        "",
        "| case | ours, s | literal, s | times faster | ours, peak MiB | literal, peak MiB | times smaller |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]
    options.out.write_text("\n".join(lines) + "\n")
    print(options.out.read_text())


if __name__ == "__main__":
    main()
