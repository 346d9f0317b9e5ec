"""How accurate the packaged weights are: RMSE at reduced scale on real scenes, and at a simulated true 10 m.

    python benchmarks/quality.py --scenes ../shared/data

Writes ``benchmarks/quality.md``, in about five minutes; without ``--adapt`` in one. The peers' figures come from
``peers_rmse.json`` beside the scenes, measured under the same protocol; bicubic is measured here as well, so that the
two sources can be compared.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from evaluation import TEST, VALIDATION, predict, read_scene, wald_pair
from numpy.typing import NDArray

import xr_ginet
from xr_ginet.network import GINet, available_weights, load_checkpoint
from xr_ginet.sentinel2.bands import BANDS_10M, BANDS_20M
from xr_ginet.simulation import simulate
from xr_ginet.training.metrics import rmse
from xr_ginet.training.patches import PatchOptions

PEERS = {"atprk": "ATPRK", "fuse": "FUSE", "supreme_exact": "SupReME, told the blur", "supreme_box": "SupReME, box"}
BORDER = 8  # coarse pixels left out on each side


def overall(per_band: NDArray) -> float:
    """Return the RMSE over all bands, in digital numbers."""
    return float(np.sqrt((per_band**2).mean()) * 1e4)


def bicubic(hs: NDArray) -> NDArray:
    return F.interpolate(torch.from_numpy(hs)[None], scale_factor=2, mode="bicubic")[0].numpy()


def as_cube(ms: NDArray, hs: NDArray) -> xr.Dataset:
    """Return a reduced scene as a two-grid cube in one chunk."""
    parts = []
    for bands, images, pixel in ((BANDS_10M, ms, 10), (BANDS_20M, hs, 20)):
        height, width = images.shape[-2:]
        coords = {"y": -pixel * (np.arange(height) + 0.5), "x": pixel * (np.arange(width) + 0.5)}
        parts.append(xr.Dataset({b: (("y", "x"), i) for b, i in zip(bands, images, strict=True)}, coords))
    return xr_ginet.pair(*parts).chunk()


def improved(ms: NDArray, hs: NDArray, name: str) -> Iterable[NDArray]:
    """Yield the output averaged over eight symmetries, and that of weights adapted to the scene, which see no truth."""
    cube = as_cube(ms, hs)
    with TemporaryDirectory() as folder:
        adapted = cube.ginet.adapt(Path(folder) / "adapted.safetensors", weights=name, options=PatchOptions(size=24))
        for options in ({"weights": name, "self_ensemble": True}, {"weights": adapted}):
            yield cube.ginet.superresolve(**options)[list(BANDS_20M)].to_array().values


def scene_rows(scenes: Path, networks: dict[str, GINet], degradation: str, *, adapt: bool) -> Iterable[list[str]]:
    """Yield one row per scene that the weights were not trained on."""
    peers = json.loads((scenes / "peers_rmse.json").read_text())
    for name in (*VALIDATION, *TEST):
        ms, hs, truth = wald_pair(read_scene(scenes / "scenes", name), degradation)
        known = peers.get(name, {}).get(degradation, {})
        errors = [overall(rmse(bicubic(hs), truth, border=BORDER))]
        for weights, network in networks.items():
            images = [predict(network, ms, hs), *(improved(ms, hs, weights) if adapt else ())]
            errors += [overall(rmse(image, truth, border=BORDER)) for image in images]
        role = "test" if name in TEST else "validation"
        yield [name, role, *(f"{e:.1f}" for e in errors), *(f"{known[p]:.1f}" if p in known else "-" for p in PEERS)]


def simulated_rows(networks: dict[str, GINet]) -> Iterable[list[str]]:
    """Yield the RMSE of each method per band against the simulated scene's true 10 m."""
    scene = simulate((512, 512), seed=11)
    truth = scene.reference[-len(BANDS_20M) :]
    results = {"bicubic": bicubic(scene.coarse)}
    results |= {name: predict(network, scene.fine, scene.coarse) for name, network in networks.items()}
    for name, image in results.items():
        error = rmse(image, truth, border=2 * BORDER)
        yield [name, *(f"{e * 1e4:.1f}" for e in error), f"{overall(error):.1f}"]


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=Path, default=Path("../shared/data"))
    parser.add_argument("--adapt", action="store_true", help="also with eight symmetries, and adapted to each scene")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("quality.md"))
    args = parser.parse_args()
    checkpoints = {name: load_checkpoint(name) for name in available_weights()}
    networks = {name: checkpoint.network() for name, checkpoint in checkpoints.items()}
    variants = ["", ", 8 symmetries", ", adapted"] if args.adapt else [""]
    header = ["scene", "role", "bicubic", *(name + v for name in networks for v in variants), *PEERS.values()]
    parts = [
        "# How accurate the packaged weights are",
        "RMSE in digital numbers (reflectance × 10,000) over the six 20 m bands, 8 pixels (20 m) of border left out. "
        f"Made by `python benchmarks/quality.py{' --adapt' * args.adapt}` with torch {torch.__version__} on "
        f"{platform.machine()}. No scene of the first two tables was trained on; the validation scenes were watched "
        "during training, the test scene was not.",
        *(
            f"- `{name}`: {sum(p.numel() for p in networks[name].parameters()):,} parameters, trained for "
            f"`{c.card.get('degradation')}`, sha256 `{c.sha256[:12]}`, `{c.card.get('command')}`"
            for name, c in checkpoints.items()
        ),
        "## Reduced scale, the instrument's blur (`mtf`)",
        "Adapted means fine-tuned on the scene's own inputs, degraded once more: 100 steps, none of which sees truth."
        * args.adapt,
        table(header, scene_rows(args.scenes, networks, "mtf", adapt=args.adapt)),
        "## Reduced scale, 2 × 2 means (`box`)",
        "The packaged weights are trained for the instrument's blur, which is softer: under block means they sharpen "
        "too much. The table is here to say so.",
        table(
            ["scene", "role", "bicubic", *networks, *PEERS.values()],
            scene_rows(args.scenes, networks, "box", adapt=False),
        ),
        "## Full scale, simulated scene with its true 10 m bands",
        table(["method", *BANDS_20M, "all"], simulated_rows(networks)),
    ]
    args.out.write_text("\n\n".join(part for part in parts if part) + "\n")
    print(args.out.read_text())


if __name__ == "__main__":
    main()
