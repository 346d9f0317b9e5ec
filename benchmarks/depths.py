"""How much overlap the packaged weights need: the error of a seam by depth, on real scenes.

    python benchmarks/depths.py [--store]

Writes ``benchmarks/depths.md``. Real scenes are cut in two along both axes, at several places; one part is
super-resolved with so many pixels of the other as the depth says, and compared with the scene super-resolved whole.
``--store`` writes the smallest depth whose error stays below 1e-5 reflectance into the weights' model cards, where
``superresolve(depth="auto")`` finds it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from evaluation import predict, read_scene
from numpy.typing import NDArray
from quality import table

from xr_ginet.mapping.pipeline import resolve_depth
from xr_ginet.network import GINet, available_weights, load_checkpoint, save_checkpoint

LIMIT = 1e-5
"""Reflectance: a tenth of a digital number."""


def seam_error(network: GINet, fine: NDArray, coarse: NDArray, whole: NDArray, cut: int, depth: int) -> float:
    """Return the largest difference in the rows below ``cut`` where only ``depth`` rows above it are known."""
    start = cut - depth
    part = predict(network, fine[:, start:], coarse[:, start // 2 :])
    return float(np.abs(part[:, depth:] - whole[:, cut:]).max())


def errors(network: GINet, scenes: list[tuple[NDArray, NDArray]], depths: list[int]) -> list[float]:
    """Return the largest error over scenes, axes and places, by depth."""
    worst = np.zeros(len(depths))
    for fine, coarse in scenes:
        for turned in (False, True):
            ms, hs = (np.ascontiguousarray(i.swapaxes(1, 2)) if turned else i for i in (fine, coarse))
            whole = predict(network, ms, hs)
            for cut in (n // 2 * 2 for n in np.linspace(max(depths), ms.shape[1] - 32, 3).astype(int)):
                found = [seam_error(network, ms, hs, whole, cut, depth) for depth in depths]
                worst = np.maximum(worst, found)
    return worst.tolist()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=Path, default=Path("../shared/data/scenes"))
    parser.add_argument("--size", type=int, default=200, help="pixels at 10 m of each scene")
    parser.add_argument("--weights", nargs="*", default=list(available_weights()))
    parser.add_argument("--store", action="store_true", help="write the depths into the packaged files")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("depths.md"))
    options = parser.parse_args(arguments)
    scenes = []
    for name in ("ucnn_usa", "ucnn_vietnam", "rastertools_T30TYP"):
        scene = read_scene(options.scenes, name)
        scenes.append(
            (scene.fine[:, : options.size, : options.size], scene.coarse[:, : options.size // 2, : options.size // 2])
        )
    depths = list(range(4, 44, 4))
    rows = []
    for name in options.weights:
        checkpoint = load_checkpoint(name)
        found = errors(checkpoint.network(), scenes, depths)
        enough = next(d for d, _ in zip(depths, found, strict=True) if max(found[depths.index(d) :]) < LIMIT)
        rows.append([name, *(f"{e:.1g}" for e in found), str(enough), str(resolve_depth("exact", checkpoint))])
        if options.store:
            save_checkpoint(checkpoint.path, checkpoint.network(), checkpoint.card | {"depth": enough})
    header = ["weights", *map(str, depths), f"below {LIMIT:g} from", "exact"]
    page = (
        "# How much overlap is needed\n\n"
        "Largest error beside a seam, in reflectance, by the depth of the overlap in 10 m pixels, over three real "
        "scenes. The 8 pixels from which gaps are filled are read on top. "
        f"Made by `python benchmarks/depths.py`.\n\n{table(header, rows)}\n"
    )
    options.out.write_text(page)
    print(page)


if __name__ == "__main__":
    main()
