"""How many steps of training a processor takes per second, with attention in torch and compiled; how long it waits.

    python benchmarks/training.py

Writes ``benchmarks/training.md``. Steps are those of `xr_ginet.training.fit.fit`: patches of 48 pixels from a Zarr
store of simulated scenes, eight per step. Each case runs in fresh processes, the two forms of attention in turns; of
their median steps the shortest is told. That both forms compute the same gradient is asserted in tests/test_network.py,
not here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
import xarray as xr
from attention import in_fresh_process, machine
from loader import write_store
from quality import table

from xr_ginet.network import load_checkpoint
from xr_ginet.network.attention import WindowAttention
from xr_ginet.network.bfloat16 import is_faster
from xr_ginet.training import fit as fitting
from xr_ginet.training.patches import Patches, PatchOptions

PRECISIONS = ["32-true", "bf16-mixed"]


def measure(weights: str, precision: Any, form: str, path: Path, steps: int) -> dict[str, float]:
    """Return the median seconds of a step, and how much of the time the trainer waits for data."""
    began: list[float] = []
    waited: list[float] = []

    class Timed(fitting.Stream):
        def __iter__(self) -> Iterator[Any]:
            samples = super().__iter__()
            while True:
                asked = time.perf_counter()
                sample = next(samples)
                waited.append(time.perf_counter() - asked)
                yield sample

    step = fitting.Fitting.training_step

    def timed(self: fitting.Fitting, *arguments: Any) -> Any:
        began.append(time.perf_counter())
        return step(self, *arguments)

    network, patches = load_checkpoint(weights).network(), Patches([xr.open_zarr(path)], PatchOptions(size=48))
    options = fitting.FitOptions(steps=steps + 2, batch_size=8, precision=precision, accelerator="cpu")
    with ExitStack() as stack:
        stack.enter_context(patch.object(fitting, "Stream", Timed))
        stack.enter_context(patch.object(fitting.Fitting, "training_step", timed))
        if form == "torch":
            stack.enter_context(patch.object(WindowAttention, "_may_compile_gradient", return_value=False))
        fitting.fit(network, patches, options)
    taken = [b - a for a, b in itertools.pairwise(began[1:])]  # the first step compiles
    return {
        "seconds": statistics.median(taken),
        "waits": sum(waited[16 : 8 * (steps + 2)]) / (began[-1] - began[1]),
    }


def row(weights: str, precision: str, path: Path, steps: int, rounds: int) -> list[str]:
    """Return what both forms took, each in processes of its own."""
    best: dict[str, dict[str, float]] = {}
    for _ in range(rounds):
        for form in ("torch", "compiled"):
            found = in_fresh_process(__file__, "--measure", weights, precision, form, path, "--steps", steps)
            best[form] = min(best.get(form, found), found, key=lambda m: m["seconds"])
    old, new = best["torch"], best["compiled"]
    return [
        weights,
        precision,
        f"{1 / old['seconds']:.2f}",
        f"{1 / new['seconds']:.2f}",
        f"{old['seconds'] / new['seconds']:.2f}",
        f"{new['waits']:.1%}",
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", nargs="*", default=["ginet-xs", "ginet-s", "ginet"])
    parser.add_argument("--precisions", nargs="*", default=PRECISIONS[: 1 + is_faster()])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--side", type=int, default=768, help="pixels of the store at 20 m")
    parser.add_argument("--chunk", type=int, default=192, help="pixels of its chunks at 20 m, a multiple of 48")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("training.md"))
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        weights, precision, form, path = options.measure
        print(json.dumps(measure(weights, precision, form, Path(path), options.steps)))
        return
    with TemporaryDirectory() as folder:
        path = Path(folder) / "cube.zarr"
        write_store(path, options.side, options.chunk)
        rows = [
            row(weights, precision, path, max(options.steps // (10 if weights == "ginet" else 1), 2), options.rounds)
            for weights in options.weights
            for precision in options.precisions
        ]
    header = [
        "weights",
        "precision",
        "steps per second, attention in torch",
        "compiled",
        "times faster",
        "time that the trainer waits",
    ]
    page = (
        "# Training on a processor\n\n"
        f"`python benchmarks/training.py`: eight patches of 48 pixels per step. {machine(torch.get_num_threads())}.\n\n"
        f"{table(header, rows)}\n"
    )
    options.out.write_text(page)
    print(page)


if __name__ == "__main__":
    main()
