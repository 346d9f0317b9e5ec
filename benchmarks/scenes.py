"""Write the real scenes as two-grid Zarr cubes, which `xr-ginet train` and `xr-ginet evaluate` read.

    python benchmarks/scenes.py --scenes ../shared/data/scenes --out build/scenes

The scenes are `.npz` files with ``b10 (4, y, x)`` and ``b20 (6, y / 2, x / 2)`` as uint16 digital numbers
(reflectance × 10,000, no offset). They are not part of this repository.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import xarray as xr

import xr_ginet
from xr_ginet.sentinel2.bands import BANDS_10M, BANDS_20M


def scene_cube(path: Path) -> xr.Dataset:
    """Return a scene as a two-grid cube in one chunk, even at 20 m, on a grid of its own."""
    parts = []
    with np.load(path) as file:
        height, width = (n // 2 * 2 for n in file["b20"].shape[-2:])
        for bands, key, pixel in ((BANDS_10M, "b10", 10), (BANDS_20M, "b20", 20)):
            rows, columns = (n * 20 // pixel for n in (height, width))
            images = file[key][:, :rows, :columns].astype("float32") / 10_000
            coords = {"y": -pixel * (np.arange(rows) + 0.5), "x": pixel * (np.arange(columns) + 0.5)}
            parts.append(xr.Dataset({b: (("y", "x"), i) for b, i in zip(bands, images, strict=True)}, coords))
    return xr_ginet.pair(*parts).chunk()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=Path, default=Path("../shared/data/scenes"))
    parser.add_argument("--out", type=Path, default=Path("build/scenes"))
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for path in sorted(options.scenes.glob("*.npz")):
        with np.load(path) as file:
            complete = len(file["b20"]) == len(BANDS_20M) if "b20" in file else False
        if complete:
            scene_cube(path).ginet.to_zarr(options.out / f"{path.stem}.zarr", mode="w")
            print(options.out / f"{path.stem}.zarr")


if __name__ == "__main__":
    main()
