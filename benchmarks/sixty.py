"""B01 and B09 from 60 m to 10 m: a compact network for factor 6 against regression and bicubic, at reduced scale.

    python benchmarks/sixty.py --scenes ../shared/data --steps 1000

Writes ``benchmarks/sixty.md``. Few real scenes hold 60 m bands, and each of their pixels is a thirty-sixth of one at
10 m: so the network is first trained on what can stand in for them, the same scenes' 20 m bands made coarser by three,
and then on the real ones, but for the places that it is judged on.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from evaluation import LOSSY, TRAIN, VALIDATION, predict
from numpy.typing import NDArray
from quality import overall, table

from xr_ginet.mapping import classical
from xr_ginet.mapping.classical import upsample
from xr_ginet.network import GINet, GINetConfig
from xr_ginet.sentinel2.bands import BANDS, BANDS_10M, BANDS_20M, BANDS_60M
from xr_ginet.sentinel2.grids import DIMS, SIXTY
from xr_ginet.training.degradation import degrade, mtf_mean
from xr_ginet.training.fit import FitOptions, fit
from xr_ginet.training.metrics import rmse
from xr_ginet.training.objective import start_near_bicubic
from xr_ginet.training.patches import Patches, PatchOptions

STAND_INS = (("B05", "B8A"), ("B06", "B07"), ("B05", "B11"))
HELD_OUT = ("dsen2", "T35VPK")
FEW = 30  # pixels at 60 m, below which a scene counts less in training


def cube_of(fine: NDArray, coarse: NDArray) -> xr.Dataset:
    """Return a cube of the 10 m bands and two bands at six times their pixels, in one chunk."""
    data, coords = {}, {}
    for size, bands, image in ((10, BANDS_10M, fine), (60, BANDS_60M, coarse)):
        data |= {band: (DIMS[size], plane) for band, plane in zip(bands, image.astype("float32"), strict=True)}
        axes = (-size * (np.arange(image.shape[1]) + 0.5), size * (np.arange(image.shape[2]) + 0.5))
        coords |= dict(zip(DIMS[size], axes, strict=True))
    return xr.Dataset(data, coords).chunk()


def read(path: Path, key: str) -> NDArray | None:
    with np.load(path) as file:
        return file[key].astype("float32") / 10_000 if key in file else None


def real(path: Path) -> xr.Dataset | None:
    """Return a scene with its 60 m bands, or None where it has none."""
    fine, coarse = read(path, "b10"), read(path, "b60")
    if coarse is None:
        return None
    return cube_of(fine[:, : 6 * coarse.shape[1], : 6 * coarse.shape[2]], coarse)


def stand_in(path: Path, bands: tuple[str, str]) -> xr.Dataset:
    """Return a scene with two of its 20 m bands, made coarser by three, as its 60 m bands."""
    fine, twenty = read(path, "b10"), read(path, "b20")
    height, width = (n // 3 * 3 for n in twenty.shape[1:])
    planes = twenty[[BANDS_20M.index(band) for band in bands], :height, :width]
    coarse = mtf_mean(planes, 3, [BANDS[band].mtf_gain for band in bands])
    return cube_of(fine[:, : 6 * coarse.shape[1], : 6 * coarse.shape[2]], coarse)


def repeated(cubes: Iterable[xr.Dataset], options: PatchOptions) -> list[xr.Dataset]:
    """Return cubes that a patch fits into, small ones more than once."""
    cubes = [cube for cube in cubes if min(cube.sizes[dim] for dim in DIMS[60]) >= options.size]
    return [cube for cube in cubes for _ in range(4 if cube.sizes["y_60m"] < FEW else 2)]


def trained(paths: list[Path], steps: int, options: PatchOptions) -> GINet:
    """Return a network trained on stand-ins, then on the real bands of the same scenes."""
    torch.manual_seed(0)
    widths = {"n_features": 10, "n_stages": 2, "n_blocks": 2, "cluster_features": (8, 8), "window_size": 3}
    network = GINet(GINetConfig(bands=BANDS_60M, factor=6, assignment="soft", **widths))
    start_near_bicubic(network)
    first = repeated((stand_in(path, bands) for path in paths for bands in STAND_INS), options)
    then = repeated((cube for path in paths if (cube := real(path)) is not None), options)
    for cubes, rate in ((first, 2e-3), (then, 1e-3)):
        fitting = FitOptions(
            steps=steps, batch_size=24, learning_rate=rate, warm_up=100, averaging=0.98, accelerator="cpu", threads=1
        )
        network = fit(network, Patches(cubes, options), fitting).result()
    return network


def errors(path: Path, networks: Iterable[GINet]) -> list[NDArray]:
    """Return the RMSE per band, in digital numbers, of bicubic, regression and networks, restoring the real 60 m."""
    whole = real(path)
    height, width = (whole.sizes[dim] // 6 * 6 for dim in DIMS[60])
    truth = np.stack([whole[band].values[:height, :width] for band in BANDS_60M])
    fine = np.stack([whole[band].values[: 6 * height, : 6 * width] for band in BANDS_10M])
    ms, hs = degrade(fine, BANDS_10M, factor=6), degrade(truth, BANDS_60M, factor=6)
    regressed = classical(cube_of(ms, hs), "regression", bands=SIXTY)
    images = [upsample(hs, 6), np.stack([regressed[band].values for band in BANDS_60M])]
    images += [predict(network, ms, hs) for network in networks]
    border = 6 if min(height, width) >= FEW else 3
    return [rmse(image, truth, border=border) * 1e4 for image in images]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=Path, default=Path("../shared/data"))
    parser.add_argument("--steps", type=int, default=1000, help="on stand-ins, and again on real bands")
    parser.add_argument("--size", type=int, default=18, help="of patches, in pixels at 60 m")
    parser.add_argument("--held-out", nargs="*", default=HELD_OUT, help="places, left out one after the other")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("sixty.md"))
    args = parser.parse_args(arguments)
    options = PatchOptions(
        resolution=60, size=args.size, shift=True, band_gain_spread=0.08, gain_jitter=0.02, fine_gain=(0.25, 0.45)
    )
    names = [name for name in (*TRAIN, *VALIDATION) if (args.scenes / "scenes" / f"{name}.npz").exists()]
    paths = {name: args.scenes / "scenes" / f"{name}.npz" for name in names}
    rows, ratios = [], []
    for place in args.held_out:
        network = trained([path for name, path in paths.items() if place not in name], args.steps, options)
        for name, path in paths.items():
            if place in name and name not in LOSSY and real(path) is not None:
                found = errors(path, [network])
                ratios.append([overall(e) / overall(found[1]) for e in found])
                rows.append([name, *(f"{value:.1f}" for e in found for value in e)])
    means = [f"{value:.2f}" for ratio in np.mean(ratios, 0) for value in (ratio, np.nan)]
    rows.append(["ratio of both to regression", *(value if value != "nan" else "" for value in means)])
    methods = ("bicubic", "regression", "network")
    parts = [
        "# B01 and B09",
        f"`python benchmarks/sixty.py --steps {args.steps}`: RMSE in digital numbers at 60 m, inputs degraded by six "
        "with the instrument's blur. `superresolve(bands='all')` uses the regression, which is fitted to each cube; "
        f"the network ({args.steps} steps on stand-ins, {args.steps} on real 60 m bands) has not seen the place.",
        table(["scene", *(f"{method}, {band}" for method in methods for band in BANDS_60M)], rows),
        "Where the network does not beat the regression none is packaged. One trained on more 60 m data goes into "
        "`superresolve(bands='all', weights_60m=…)`.",
    ]
    args.out.write_text("\n\n".join(parts) + "\n")
    print(args.out.read_text())


if __name__ == "__main__":
    main()
