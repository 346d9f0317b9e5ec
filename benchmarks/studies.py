"""What a choice is worth, and how weights do on places that they have not seen: small networks trained alike.

    python benchmarks/scenes.py
    python benchmarks/studies.py --steps 2000

Writes ``benchmarks/studies.md``. Every run is a network like `ginet-xs` trained from nothing on the patches of
`benchmarks/train/ginet-xs.toml`, but for the 10 m bands, which all have their own blur; it is kept in ``--folder``, so
that the command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from evaluation import LOSSY, TEST, TRAIN, VALIDATION, predict, read_scene, wald_pair
from numpy.typing import NDArray
from quality import BORDER, as_cube, overall, table
from scipy.ndimage import convolve, uniform_filter

from xr_ginet.network import Checkpoint, available_weights, load_checkpoint
from xr_ginet.simulation import simulate
from xr_ginet.training.fit import FitOptions
from xr_ginet.training.metrics import rmse
from xr_ginet.training.run import Run, train

HERE = Path(__file__).parent
PLACES = "T30TYP dsen2 iceland ssc ssss T29UPU T33UUP T35VLC T35VNH T35WPN usa T35VPK".split()
SIMULATED_SIDE = 512
CLUSTERS = {
    "soft mixture, from k-means": {"assignment": "soft", "clusters": "kmeans"},
    "soft mixture, from random weights (as shipped)": {"assignment": "soft", "clusters": "random"},
    "annealed to hard, from k-means": {"assignment": "hard", "clusters": "kmeans"},
    "hard, frozen at random (the authors')": {"assignment": "hard", "clusters": "random", "learn_clusters": False},
}


def trained(
    base: Run,
    folder: Path,
    name: str,
    scenes: Sequence[str],
    clusters: dict[str, object],
    others: Sequence[dict[str, object]] = (),
) -> Checkpoint:
    """Return a run's weights, from its folder where it was finished already."""
    path = folder / name / f"{name}.safetensors"
    if path.exists():
        return load_checkpoint(path)
    repeats = {Path(entry["path"]).stem: entry["repeat"] for entry in base.train} | {"ucnn_usa": 6}
    cubes = Path(base.train[0]["path"]).parent
    run = replace(
        base,
        name=name,
        train=(*({"path": str(cubes / f"{s}.zarr"), "repeat": repeats.get(s, 12)} for s in scenes), *others),
        validation=(),
        network=replace(base.network, assignment=clusters["assignment"]),
        clusters=clusters["clusters"],
        fit=replace(base.fit, learn_clusters=clusters.get("learn_clusters", True)),
    )
    return train(run, folder / name)


def pretraining_rows(base: Run, folder: Path, scenes: Path) -> Iterable[list[str]]:
    """Yield what training first on simulated scenes is worth, against nothing and against longer training."""
    names = (*VALIDATION, *TEST)
    steps, random = base.fit.steps, CLUSTERS["soft mixture, from random weights (as shipped)"]
    simulated = folder / "simulated"
    entries = []
    for seed in range(4):
        path = simulated / f"scene-{seed}.zarr"
        if not path.exists():
            scene = simulate((SIMULATED_SIDE, SIMULATED_SIDE), seed=100 + seed, season=0.3 + 0.15 * seed)
            as_cube(scene.fine, scene.coarse).ginet.to_zarr(path)
        entries.append({"path": str(path), "repeat": 4})
    longer = replace(base, fit=replace(base.fit, steps=2 * steps))
    first = trained(base, folder, "simulated-only", (), random, entries)
    rows = {
        f"real, {steps} steps": trained(base, folder, "clusters-1", TRAIN, random),
        f"real, {2 * steps} steps": trained(longer, folder, "real-longer", TRAIN, random),
        f"simulated, {steps} steps": first,
        f"simulated, then real, {steps} steps each": trained(
            replace(base, start=str(first.path)), folder, "simulated-first", TRAIN, random
        ),
    }
    baseline = errors(next(iter(rows.values())), scenes, names)
    for label, checkpoint in rows.items():
        found = errors(checkpoint, scenes, names)
        ratio = np.mean([a / b for a, b in zip(found, baseline, strict=True)])
        yield [label, *(f"{value:.1f}" for value in found), f"{ratio:.3f}"]


def errors(checkpoint: Checkpoint, scenes: Path, names: Iterable[str]) -> list[float]:
    """Return the RMSE under the instrument's blur of each scene, in digital numbers."""
    network = checkpoint.network()
    pairs = (wald_pair(read_scene(scenes / "scenes", name), "mtf") for name in names)
    return [overall(rmse(predict(network, ms, hs), truth, border=BORDER)) for ms, hs, truth in pairs]


def cluster_rows(base: Run, folder: Path, scenes: Path) -> Iterable[list[str]]:
    names = (*VALIDATION, *TEST)
    first: list[float] = []
    for number, (label, clusters) in enumerate(CLUSTERS.items()):
        found = errors(trained(base, folder, f"clusters-{number}", TRAIN, clusters), scenes, names)
        first = first or found
        ratio = np.mean([a / b for a, b in zip(found, first, strict=True)])
        yield [label, *(f"{value:.1f}" for value in found), f"{ratio:.3f}"]


def place_rows(base: Run, folder: Path, scenes: Path, places: Sequence[str]) -> Iterable[list[str]]:
    peers = json.loads((scenes / "peers_rmse.json").read_text())
    known = [name for name in (*TRAIN, *VALIDATION) if name not in LOSSY]
    clusters = next(iter(CLUSTERS.values()))
    for place in places:
        held = [name for name in known if place in name]
        others = [name for name in (*TRAIN, *VALIDATION) if name not in held]
        found = errors(trained(base, folder, f"without-{place}", others, clusters), scenes, held)
        seen = errors(load_checkpoint("ginet-xs"), scenes, held)
        for name, unseen, shipped in zip(held, found, seen, strict=True):
            supreme = peers[name].get("mtf", {}).get("supreme_exact")
            yield [
                name,
                f"{unseen:.1f}",
                f"{shipped:.1f}" + " (seen)" * (name in TRAIN),
                f"{supreme:.1f}" if supreme else "-",
                f"{unseen / supreme:.2f}" if supreme else "-",
            ]


def curve_rows(base: Run, folder: Path, scenes: Path) -> Iterable[list[str]]:
    """Yield what steps, scenes and width are worth where the goal is furthest, with ``box``."""
    steps, random = base.fit.steps, CLUSTERS["soft mixture, from random weights (as shipped)"]
    base = replace(base, patches=replace(base.patches, degradation="box", gain_jitter=0))
    runs = [(max(1, steps * i // 4), TRAIN, 1) for i in (1, 2, 4, 8)] + [(steps, TRAIN[::2], 1), (steps, TRAIN, 2)]
    for steps, names, width in runs:
        network = replace(base.network, n_features=width * base.network.n_features)
        run = replace(base, network=network, fit=replace(base.fit, steps=steps))
        found = trained(run, folder, f"box-{steps}-{len(names)}-{width}", names, random)
        yield [f"{steps:,}", str(len(names)), str(network.n_features), *(ratio for ratio, _ in ratios(found, scenes))]


def limit_rows(scenes: Path) -> Iterable[list[str]]:
    """Yield how packaged weights do on the scenes that they were trained on, and on the others."""
    for name in available_weights():
        yield [name, *(text for pair in ratios(load_checkpoint(name), scenes) for text in pair)]


def ratios(checkpoint: Checkpoint, scenes: Path) -> list[tuple[str, str]]:
    """Return the mean ratio to the best peer, and of how many scenes, of those for training and of the others."""
    peers = json.loads((scenes / "peers_rmse.json").read_text())
    network, degradation = checkpoint.network(), checkpoint.card["degradation"]
    means = []
    for group in ([n for n in TRAIN if n not in LOSSY], (*VALIDATION, *TEST)):
        found = []
        for scene in group:
            known = peers.get(scene, {}).get(degradation, {})
            if known:
                ms, hs, truth = wald_pair(read_scene(scenes / "scenes", scene), degradation)
                found.append(overall(rmse(predict(network, ms, hs), truth, border=BORDER)) / min(known.values()))
        means.append((f"{np.mean(found):.2f}", str(len(found))))
    return means


def noise(image: NDArray) -> NDArray:
    """Return the standard deviation of the noise of each band: of second differences where the image is smoothest.

    Of a plane with white noise of deviation 1 the mask 1 -2 1 by 1 -2 1 has deviation 6 (Immerkær 1996).
    """
    mask = np.outer([1, -2, 1], [1, -2, 1]) / 6
    found = []
    for band in image:
        square = convolve(band, mask)[1:-1, 1:-1] ** 2
        power = uniform_filter(square, 9)[4:-4:9, 4:-4:9]  # of windows beside one another
        found.append(np.sqrt(np.sort(power.ravel())[: max(1, power.size // 10)].mean()))
    return np.array(found)


def floor_rows(scenes: Path) -> Iterable[list[str]]:
    """Yield the noise of each judged scene's truth beside what the packaged weights are wrong by."""
    names = [name for name in available_weights() if load_checkpoint(name).card["degradation"] == "mtf"]
    for scene in (*VALIDATION, *TEST):
        ms, hs, truth = wald_pair(read_scene(scenes / "scenes", scene), "mtf")
        images = (predict(load_checkpoint(name).network(), ms, hs) for name in names)
        errors = [overall(rmse(image, truth, border=BORDER)) for image in images]
        yield [scene, f"{overall(noise(truth)):.1f}", *(f"{e:.1f}" for e in errors)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="with scenes/ and peers_rmse.json")
    parser.add_argument("--folder", type=Path, default=Path("build/studies"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--only", choices=("clusters", "pretraining", "places", "curves", "limits"))
    parser.add_argument("--places", nargs="*", default=PLACES, help="to leave out, one after the other")
    parser.add_argument("--out", type=Path, default=HERE / "studies.md")
    options = parser.parse_args(arguments)
    shipped = Run.from_toml(HERE / "train" / "ginet-xs.toml")
    base = replace(
        shipped,
        start=None,
        network=load_checkpoint("ginet-xs").config,
        patches=replace(shipped.patches, fine_gain=None),
        # Averaged over fewer steps than usual, as the runs are short.
        fit=FitOptions(
            steps=options.steps, learning_rate=2e-3, warm_up=100, averaging=0.98, accelerator="cpu", threads=1
        ),
    )
    some = f" --places {' '.join(options.places)}" if options.places != PLACES else ""
    parts = [
        "# Studies",
        f"`python benchmarks/studies.py --steps {options.steps}{some}`: `ginet-xs`, trained shortly, RMSE in digital "
        "numbers under `mtf`. Rows of one table compare with one another, not with longer training.",
    ]
    if options.only in (None, "clusters"):
        rows = list(cluster_rows(base, options.folder, options.data))
        header = ["clusters", *VALIDATION, *TEST, "mean ratio to the first"]
        parts += ["## What learned clusters are worth", table(header, rows)]
    if options.only in (None, "pretraining"):
        parts += [
            "## What training on simulated scenes is worth",
            f"All start from random clusters. Four simulated scenes of {SIMULATED_SIDE} × {SIMULATED_SIDE} pixels.",
            table(
                ["training", *VALIDATION, *TEST, "mean ratio to the first"],
                pretraining_rows(base, options.folder, options.data),
            ),
        ]
    if options.only in (None, "places"):
        rows = list(place_rows(base, options.folder, options.data, options.places))
        ratios = [float(row[-1]) for row in rows if row[-1] != "-"]
        header = ["scene", "its place left out", "ginet-xs as shipped", "SupReME, told the blur", "ratio, left out"]
        parts += [
            "## Leave one place out",
            "Each place's scenes are judged by a network that was trained on all other places.",
            table(header, [*rows, ["mean ratio", "", "", "", f"{np.mean(ratios):.2f}" if ratios else "-"]]),
        ]
    if options.only in (None, "curves"):
        parts += [
            "## Learning curves",
            "With `box`, where the goal (0.80 of the best peer) is furthest: mean ratio to the best peer, all from "
            "random clusters.",
            table(
                ["steps of 8 patches", "scenes", "width", "trained on", "not trained on"],
                curve_rows(base, options.folder, options.data),
            ),
        ]
    if options.only in (None, "limits"):
        shipped = [name for name in available_weights() if load_checkpoint(name).card["degradation"] == "mtf"]
        parts += [
            "## What limits the packaged weights",
            "Mean ratio to the best peer, on scenes that were trained on and on scenes that were not. Where the two "
            "are close, more data of the same kind would help little, and capacity and time would more.",
            table(["weights", "trained on", "scenes", "not trained on", "scenes"], limit_rows(options.data)),
            "The noise in the truth itself, which nothing can foresee, beside the RMSE of the weights: estimated from "
            "second differences in the smoothest tenth of each scene, where fine texture (forest, snow) counts as "
            "noise too.",
            table(["scene", "noise", *shipped], floor_rows(options.data)),
        ]
    options.out.write_text("\n\n".join(parts) + "\n")
    print(options.out.read_text())


if __name__ == "__main__":
    main()
