"""How far a gap reaches: what missing pixels change in the valid pixels around them, at full scale on a real scene.

    python benchmarks/gaps.py

Writes ``benchmarks/gaps.md``. The same scene is super-resolved whole and with gaps at random places; differences are
taken where both are valid, by distance to the nearest missing pixel at 10 m.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import xarray as xr
from evaluation import predict, read_scene
from numpy.typing import NDArray
from quality import as_cube, table
from scipy.ndimage import distance_transform_cdt

from xr_ginet.network import available_weights, load_checkpoint
from xr_ginet.sentinel2.bands import BANDS_10M, BANDS_20M

RINGS = ((1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 32), (33, 64))
"""Distances in 10 m pixels, first and last."""


def gaps(shape: tuple[int, int], radius: int, n: int, seed: int) -> NDArray:
    """Return where discs of a radius, 0 for single pixels, lie at 20 m."""
    rng = np.random.default_rng(seed)
    rows, columns = np.indices(shape)
    places = rng.integers(radius + 1, np.array(shape) - radius - 1, (n, 2))
    return np.any([(rows - r) ** 2 + (columns - c) ** 2 <= radius**2 for r, c in places], axis=0)


def with_gaps(cube: xr.Dataset, missing: NDArray, bands: tuple[str, ...]) -> xr.Dataset:
    """Return a cube with some of its bands missing in places given at 20 m."""
    fine = missing.repeat(2, 0).repeat(2, 1)
    return cube.assign({b: cube[b].where(~(fine if b in BANDS_10M else missing)) for b in bands})


def differences(
    cube: xr.Dataset, whole: NDArray, missing: NDArray, bands: tuple[str, ...], weights: str
) -> list[float]:
    """Return the RMS difference in digital numbers by distance, over the bands that are there."""
    result = with_gaps(cube, missing, bands).ginet.superresolve(weights=weights, precision="float32")
    change = result[list(BANDS_20M)].to_dataarray().values - whole
    distance = distance_transform_cdt(~missing.repeat(2, 0).repeat(2, 1), metric="chessboard")
    rings = ((distance >= first) & (distance <= last) for first, last in RINGS)
    return [float(np.sqrt(np.nanmean(change[:, ring] ** 2)) * 1e4) if ring.any() else np.nan for ring in rings]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=Path, default=Path("../shared/data/scenes"))
    parser.add_argument("--scene", default="ucnn_usa")
    parser.add_argument("--size", type=int, default=384, help="pixels at 10 m, from the upper left")
    parser.add_argument("--weights", nargs="*", default=[n for n in available_weights() if not n.endswith("box")])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("gaps.md"))
    options = parser.parse_args(arguments)
    scene = read_scene(options.scenes, options.scene)
    fine, coarse = (
        scene.fine[:, : options.size, : options.size],
        scene.coarse[:, : options.size // 2, : options.size // 2],
    )
    cube = as_cube(fine, coarse)
    rows = []
    for weights in options.weights:
        whole = predict(load_checkpoint(weights).network(), fine, coarse)
        for label, radius, n, bands in (
            ("single 20 m pixels of all bands", 0, 8, (*BANDS_10M, *BANDS_20M)),
            ("single 20 m pixels of B11", 0, 8, ("B11",)),
            ("clouds of 400 m across", 10, 3, (*BANDS_10M, *BANDS_20M)),
        ):
            found = differences(cube, whole, gaps(coarse.shape[-2:], radius, n, 1), bands, weights)
            rows.append([weights, label, *(f"{value:.2g}" for value in found)])
    header = ["weights", "missing", *(f"{a} to {b}" if a < b else f"{a}" for a, b in RINGS)]
    page = (
        "# How far a gap reaches\n\n"
        f"RMS difference in digital numbers (reflectance × 10,000) between `{options.scene}` super-resolved whole and "
        "with gaps, by distance to the nearest missing pixel in 10 m pixels. Missing pixels are filled with the mean "
        "of the valid ones within 80 m before the network. Made by `python benchmarks/gaps.py`.\n\n"
        f"{table(header, rows)}\n"
    )
    options.out.write_text(page)
    print(page)


if __name__ == "__main__":
    main()
