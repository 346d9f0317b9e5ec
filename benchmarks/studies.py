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
from quality import BORDER, overall, table

from xr_ginet.network import Checkpoint, load_checkpoint
from xr_ginet.training.fit import FitOptions
from xr_ginet.training.metrics import rmse
from xr_ginet.training.run import Run, train

HERE = Path(__file__).parent
PLACES = "T30TYP dsen2 iceland ssc ssss T29UPU T33UUP T35VLC T35VNH T35WPN usa T35VPK".split()
CLUSTERS = {
    "soft mixture, from k-means": {"assignment": "soft", "clusters": "kmeans"},
    "soft mixture, from random weights (as shipped)": {"assignment": "soft", "clusters": "random"},
    "annealed to hard, from k-means": {"assignment": "hard", "clusters": "kmeans"},
    "hard, frozen at random (the authors')": {"assignment": "hard", "clusters": "random", "learn_clusters": False},
}


def trained(base: Run, folder: Path, name: str, scenes: Sequence[str], clusters: dict[str, object]) -> Checkpoint:
    """Return a run's weights, from its folder where it was finished already."""
    path = folder / name / f"{name}.safetensors"
    if path.exists():
        return load_checkpoint(path)
    repeats = {Path(entry["path"]).stem: entry["repeat"] for entry in base.train} | {"ucnn_usa": 6}
    cubes = Path(base.train[0]["path"]).parent
    run = replace(
        base,
        name=name,
        train=tuple({"path": str(cubes / f"{s}.zarr"), "repeat": repeats.get(s, 12)} for s in scenes),
        validation=(),
        network=replace(base.network, assignment=clusters["assignment"]),
        clusters=clusters["clusters"],
        fit=replace(base.fit, learn_clusters=clusters.get("learn_clusters", True)),
    )
    return train(run, folder / name)


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


def place_rows(base: Run, folder: Path, scenes: Path) -> Iterable[list[str]]:
    peers = json.loads((scenes / "peers_rmse.json").read_text())
    known = [name for name in (*TRAIN, *VALIDATION) if name not in LOSSY]
    clusters = next(iter(CLUSTERS.values()))
    for place in PLACES:
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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="with scenes/ and peers_rmse.json")
    parser.add_argument("--folder", type=Path, default=Path("build/studies"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--only", choices=("clusters", "places"))
    parser.add_argument("--out", type=Path, default=HERE / "studies.md")
    options = parser.parse_args(arguments)
    shipped = Run.from_toml(HERE / "train" / "ginet-xs.toml")
    base = replace(
        shipped,
        start=None,
        network=load_checkpoint("ginet-xs").config,
        patches=replace(shipped.patches, fine_gain=None),
        fit=FitOptions(steps=options.steps, learning_rate=1.5e-3, accelerator="cpu", threads=1),
    )
    parts = [
        "# Studies",
        f"`python benchmarks/studies.py --steps {options.steps}`: `ginet-xs`, trained shortly, RMSE in digital numbers "
        "under `mtf`. Rows of one table compare with one another, not with longer training.",
    ]
    if options.only != "places":
        rows = list(cluster_rows(base, options.folder, options.data))
        header = ["clusters", *VALIDATION, *TEST, "mean ratio to the first"]
        parts += ["## What learned clusters are worth", table(header, rows)]
    if options.only != "clusters":
        rows = list(place_rows(base, options.folder, options.data))
        ratios = [float(row[-1]) for row in rows if row[-1] != "-"]
        header = ["scene", "its place left out", "ginet-xs as shipped", "SupReME, told the blur", "ratio, left out"]
        parts += [
            "## Leave one place out",
            "Each place's scenes are judged by a network that was trained on all other places.",
            table(header, [*rows, ["mean ratio", "", "", "", f"{np.mean(ratios):.2f}" if ratios else "-"]]),
        ]
    options.out.write_text("\n\n".join(parts) + "\n")
    print(options.out.read_text())


if __name__ == "__main__":
    main()
