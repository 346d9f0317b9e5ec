"""How accurate the packaged weights are: RMSE at reduced scale on real scenes, and at a simulated true 10 m.

    python benchmarks/quality.py --scenes ../shared/data

Writes ``benchmarks/quality.md``, in ten minutes; with ``--adapt`` in three quarters of an hour on one core. The
peers' figures come from ``peers_rmse.json`` beside the scenes, measured under the same protocol; bicubic is measured
here as well, so that the two sources can be compared.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import timeit
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import xarray as xr
from evaluation import TEST, VALIDATION, predict, read_scene, wald_pair
from numpy.typing import NDArray
from supreme import supreme

import xr_ginet
from xr_ginet.mapping import classical
from xr_ginet.mapping.pipeline import Method
from xr_ginet.network import Checkpoint, GINet, available_weights, load_checkpoint
from xr_ginet.network.bfloat16 import is_faster
from xr_ginet.sentinel2.bands import BANDS, BANDS_10M, BANDS_20M
from xr_ginet.simulation import simulate
from xr_ginet.training.metrics import rmse
from xr_ginet.training.patches import PatchOptions

CLASSICAL: dict[Method, str] = {"bicubic": "bicubic", "glp_hpm": "our GLP-HPM", "regression": "weights=None"}
PEERS = {"atprk": "ATPRK", "fuse": "FUSE", "supreme_exact": "SupReME, told the blur", "supreme_box": "SupReME, box"}
BORDER = 8  # coarse pixels left out on each side
ADAPTATION: dict[str, dict[str, float]] = {"mtf": {}, "box": {"share": 0.25, "learning_rate": 5e-4}}
BLUR = {"mtf": 0.0, "box": 0.45}  # the inputs are block means themselves
ADAPTED = 1_000_000
"""Parameters above which weights are not adapted here: that is for a GPU."""


def overall(per_band: NDArray) -> float:
    """Return the RMSE over all bands, in digital numbers."""
    return float(np.sqrt((per_band**2).mean()) * 1e4)


def as_cube(ms: NDArray, hs: NDArray) -> xr.Dataset:
    """Return a reduced scene as a two-grid cube in one chunk."""
    parts = []
    for bands, images, pixel in ((BANDS_10M, ms, 10), (BANDS_20M, hs, 20)):
        height, width = images.shape[-2:]
        coords = {"y": -pixel * (np.arange(height) + 0.5), "x": pixel * (np.arange(width) + 0.5)}
        parts.append(xr.Dataset({b: (("y", "x"), i) for b, i in zip(bands, images, strict=True)}, coords))
    return xr_ginet.pair(*parts).chunk()


def improved(ms: NDArray, hs: NDArray, name: str, network: GINet) -> Iterable[NDArray | None]:
    """Yield the output averaged over eight symmetries, and that of weights adapted to the scene, which see no truth.

    The latter is None for large networks.
    """
    cube = as_cube(ms, hs)
    yield cube.ginet.superresolve(weights=name, self_ensemble=True)[list(BANDS_20M)].to_array().values
    if sum(p.numel() for p in network.parameters()) > ADAPTED:
        yield None
        return
    with TemporaryDirectory() as folder:
        degradation = load_checkpoint(name).card["degradation"]
        options, path = ADAPTATION[degradation], Path(folder) / "adapted.safetensors"
        patches = PatchOptions(size=24, degradation=degradation, shift=True, blur=BLUR[degradation])
        adapted = cube.ginet.adapt(path, weights=name, options=patches, **options)
        yield cube.ginet.superresolve(weights=adapted)[list(BANDS_20M)].to_array().values


def scene_rows(scenes: Path, networks: dict[str, GINet], degradation: str, *, adapt: bool) -> Iterable[list[str]]:
    """Yield one row per scene that the weights were not trained on."""
    peers = json.loads((scenes / "peers_rmse.json").read_text())
    for name in (*VALIDATION, *TEST):
        ms, hs, truth = wald_pair(read_scene(scenes / "scenes", name), degradation)
        known = peers.get(name, {}).get(degradation, {})
        cube = as_cube(ms, hs)
        plain = (classical(cube, method)[list(BANDS_20M)].to_array().values for method in CLASSICAL)
        errors = [overall(rmse(image, truth, border=BORDER)) for image in plain]
        for weights, network in networks.items():
            images = [predict(network, ms, hs), *(improved(ms, hs, weights, network) if adapt else ())]
            errors += [np.nan if i is None else overall(rmse(i, truth, border=BORDER)) for i in images]
        role = "test" if name in TEST else "validation"
        told = ("-" if np.isnan(e) else f"{e:.1f}" for e in errors)
        yield [name, role, *told, *(f"{known[p]:.1f}" if p in known else "-" for p in PEERS)]


def ratio_row(rows: list[list[str]], n_methods: int) -> list[str]:
    """Return the mean over scenes of each method's error relative to the best peer's."""
    errors = np.array([[np.nan if cell == "-" else float(cell) for cell in row[2:]] for row in rows])
    known = errors[np.isfinite(errors[:, n_methods:]).any(1)]
    ratios = (known / np.nanmin(known[:, n_methods:], axis=1, keepdims=True)).mean(0)
    return ["mean ratio to the best peer", f"{len(known)} scenes", *(f"{r:.2f}" if r == r else "-" for r in ratios)]


def reduced_scale(scenes: Path, checkpoints: dict[str, Checkpoint], degradation: str, *, adapt: bool) -> str:
    """Return the table of the weights that were trained for a degradation."""
    networks = {n: c.network() for n, c in checkpoints.items() if c.card["degradation"] == degradation}
    variants = ["", ", 8 symmetries", ", adapted"] if adapt else [""]
    methods = [*CLASSICAL.values(), *(name + v for name in networks for v in variants)]
    rows = list(scene_rows(scenes, networks, degradation, adapt=adapt))
    return table(["scene", "role", *methods, *PEERS.values()], [*rows, ratio_row(rows, len(methods))])


def cost_rows(networks: dict[str, GINet]) -> Iterable[list[str]]:
    """Yield the CPU seconds that a megapixel at 10 m takes on one thread, by images of 256 × 256."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    image = np.random.default_rng(0).random((4, 256, 256), "float32"), np.ones((6, 128, 128), "float32")
    for name, network in networks.items():
        predict(network, *image)
        seconds = min(timeit.repeat(lambda n=network: predict(n, *image), timer=time.process_time, number=2, repeat=5))
        parameters = sum(p.numel() for p in network.parameters())
        yield [name, f"{parameters:,}", f"{seconds / 2 / 256**2 * 1e6:.1f}"]
    torch.set_num_threads(threads)


def simulated_rows(networks: dict[str, GINet]) -> Iterable[list[str]]:
    """Yield the RMSE of each method per band against the simulated scene's true 10 m."""
    scene = simulate((512, 512), seed=11)
    truth = scene.reference[-len(BANDS_20M) :]
    cube = as_cube(scene.fine, scene.coarse)
    results = {label: classical(cube, method)[list(BANDS_20M)].to_array().values for method, label in CLASSICAL.items()}
    results |= {name: predict(network, scene.fine, scene.coarse) for name, network in networks.items()}
    results["our SupReME, told the blur"] = supreme(scene.fine, scene.coarse, [BANDS[b].mtf_gain for b in BANDS_20M])
    errors = {name: rmse(image, truth, border=2 * BORDER) for name, image in results.items()}
    peer = overall(errors["our SupReME, told the blur"])
    for name, error in errors.items():
        yield [name, *(f"{e * 1e4:.1f}" for e in error), f"{overall(error):.1f}", f"{overall(error) / peer:.2f}"]


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
    parts = [
        "# How accurate the packaged weights are",
        "RMSE in digital numbers (reflectance × 10,000) over the six 20 m bands, 8 pixels (20 m) of border left out. "
        f"Made by `python benchmarks/quality.py{' --adapt' * args.adapt}` with torch {torch.__version__} on "
        f"{platform.machine()}. No scene of the first two tables was trained on; the validation scenes were watched "
        "during training, the test scene was not. Symmetries and adapted weights are by `superresolve`, in the "
        f"precision that it takes here, {'bfloat16' if is_faster() else 'float32'}; what stands alone is in float32.",
        *(
            f"- `{name}`: {sum(p.numel() for p in networks[name].parameters()):,} parameters, trained for "
            f"`{c.card['degradation']}`, sha256 `{c.sha256[:12]}`, `{c.card['command']}`"
            + (f" at commit {c.card['commit']}" if "commit" in c.card else "")
            for name, c in checkpoints.items()
        ),
        "## Reduced scale, the instrument's blur (`mtf`)",
        "Adapted means fine-tuned on the scene's own inputs, degraded once more: 100 steps, none of which sees truth."
        * args.adapt,
        reduced_scale(args.scenes, checkpoints, "mtf", adapt=args.adapt),
        "## Reduced scale, 2 × 2 means (`box`)",
        "The paper's protocol. Block means are sharper than the instrument, so these weights are to compare with: at "
        "full scale they leave blur, as the next table shows."
        + " Adapted here: by a quarter of the way, the bands blurred before, which are block means already."
        * args.adapt,
        reduced_scale(args.scenes, checkpoints, "box", adapt=args.adapt),
        "## Full scale, simulated scene with its true 10 m bands",
        table(["method", *BANDS_20M, "all", "ratio to SupReME"], simulated_rows(networks)),
        "## Cost",
        "FUSE took 2.2 and SupReME 116 s per megapixel on one thread of another machine.",
        table(["weights", "parameters", "CPU s per megapixel at 10 m, one thread"], cost_rows(networks)),
    ]
    args.out.write_text("\n\n".join(part for part in parts if part) + "\n")
    print(args.out.read_text())


if __name__ == "__main__":
    main()
