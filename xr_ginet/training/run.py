"""A training run from a TOML file: which network, which cubes, how patches are drawn and weights fitted.

name = "mine"
start = "ginet-s"                  # or [network] with the fields of GINetConfig, and clusters = "kmeans"

[patches]                          # fields of PatchOptions
degradation = "mtf"

[fit]                              # fields of FitOptions
steps = 2000

[[train]]                          # a two-grid cube in Zarr, or what open_stac takes
path = "fields.zarr"
repeat = 2                         # so many times per pass

[[train]]
catalog = "https://earth-search.example/v1"
bbox = [0.05, 43.65, 0.15, 43.72]
datetime = "2024-06"

[[validation]]
path = "elsewhere.zarr"
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import xarray as xr

from .. import tables
from ..network import Checkpoint, GINet, GINetConfig, load_checkpoint, save_checkpoint
from ..paths import expanded
from ..sentinel2.addresses import public_url
from ..sentinel2.arrays import open_cube
from ..sentinel2.grids import TWENTY
from ..tables import build
from .fit import FitOptions, fit
from .objective import start_from_clusters, start_near_bicubic
from .patches import PAIRS, Patches, PatchOptions

Table = Mapping[str, Any]

SPECTRA_PATCHES = 256
"""Patches from whose pixels k-means starts."""

SPECTRA_STRIDE = 5
"""Every so many pixels of them, on both axes."""


@dataclass(frozen=True)
class Run:
    """What a TOML file says."""

    name: str
    """Of the weights: ``<name>.safetensors``."""
    train: tuple[Table, ...]
    """Cubes to learn from."""
    validation: tuple[Table, ...] = ()
    """Cubes to watch."""
    start: str | None = None
    """Weights to start from, by name or path; else a new network."""
    network: GINetConfig = dataclasses.field(default_factory=lambda: GINetConfig(assignment="soft"))
    """Of a new network."""
    clusters: Literal["random", "kmeans"] = "kmeans"
    """How a new network's clusters start."""
    patches: PatchOptions = dataclasses.field(default_factory=PatchOptions)
    fit: FitOptions = dataclasses.field(default_factory=FitOptions)

    @classmethod
    def from_toml(cls, path: str | Path) -> Run:
        """Return the run that a file describes.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If it is no TOML, has an unknown key, lacks one, or a value is out of range.
        """
        return tables.read(path, cls._of_table)

    @classmethod
    def _of_table(cls, table: dict[str, Any], path: Path) -> Run:
        sections: dict[str, type] = {"network": GINetConfig, "patches": PatchOptions, "fit": FitOptions}
        if "start" in table and table.keys() & {"network", "clusters"}:
            raise ValueError(f"{path} has start, whose network is what it is, and [network] or clusters too: drop one")
        for name in ("train", "validation"):
            table[name] = tuple(_with_path(entry, path.parent, name) for entry in table.get(name, ()))
        if not table["train"]:
            raise ValueError(f"{path} names no cube to learn from: add [[train]] with path= or catalog=")
        bands = PAIRS.get(table.get("patches", {}).get("resolution", 20), TWENTY)
        own = {"assignment": "soft", "bands": bands.coarse, "factor": bands.factor}
        table["network"] = own | table.get("network", {})
        built: dict[str, Any] = {
            name: build(kind, table.get(name, {}), f"{path} [{name}]") for name, kind in sections.items()
        }
        return build(cls, table | built, str(path))


def _with_path(entry: Table, folder: Path, section: str) -> Table:
    """Return an entry whose relative path starts at the file's folder."""
    if ("path" in entry) == ("catalog" in entry):
        raise ValueError(f"[[{section}]] {dict(entry)}: path= of a Zarr cube or catalog= of a STAC API is needed")
    if "path" not in entry or "://" in entry["path"]:
        return entry
    return {**entry, "path": str(folder / expanded(entry["path"]))}


def open_cubes(entries: tuple[Table, ...]) -> list[xr.Dataset]:
    """Return the cubes of a section, lazily, each as often as it says."""
    cubes = []
    for entry in entries:
        options = {key: value for key, value in entry.items() if key != "repeat"}
        if "path" in options:
            cube = open_cube(options.pop("path"), **options)
        else:
            from ..sentinel2.catalog import open_stac

            cube = open_stac(options.pop("catalog"), **options)
        cubes += [cube] * int(entry.get("repeat", 1))
    return cubes


def new_network(run: Run, patches: Patches) -> GINet:
    """Return the network that a run starts with; with k-means clusters, patches are read for them."""
    if run.start:
        return load_checkpoint(run.start).network()
    torch.manual_seed(run.fit.seed)
    network = GINet(run.network)
    start_near_bicubic(network)
    if run.clusters == "kmeans":
        samples = [sample for _, sample in zip(range(SPECTRA_PATCHES), patches, strict=False)]
        pixels = torch.cat([s.ms[:, ::SPECTRA_STRIDE, ::SPECTRA_STRIDE].flatten(1) for s in samples], dim=1)
        start_from_clusters(network, pixels.T, seed=run.fit.seed)
        patches.set_epoch(0)
    return network


def train(run: Run, folder: str | Path, *, progress: bool = False, command: str = "") -> Checkpoint:
    """Train as a run says, now; return the checkpoint ``folder/<name>.safetensors``.

    Parameters
    ----------
    run : Run
    folder : str or Path
        Where logs, pictures, the state to resume from and the weights go. A run that was interrupted goes on from its
        state there, to the same weights as if it had not been.
    progress : bool
        Show a progress bar.
    command : str
        What was typed, for the model card.

    Raises
    ------
    ValueError
        As `Patches` and `fit` do.
    """
    folder = Path(expanded(folder))
    folder.mkdir(parents=True, exist_ok=True)
    patches = Patches(open_cubes(run.train), run.patches)
    network = new_network(run, patches)
    watched = Patches(open_cubes(run.validation), _plain(run.patches)) if run.validation else None
    fitted = fit(network, patches, run.fit, validation=watched, folder=folder, progress=progress)
    start = load_checkpoint(run.start) if run.start else None
    card = {
        "task": f"Sentinel-2 {run.patches.resolution} m to 10 m",
        "start": {"name": start.name, "sha256": start.sha256} if start else None,
        "degradation": run.patches.degradation,
        "data": {"train": _names(run.train), "validation": _names(run.validation)},
        "rmse_validation": fitted.rmse,
        "run": dataclasses.asdict(replace(run, train=(), validation=())),
        "seed": run.fit.seed,
        "command": command,
    }
    return save_checkpoint(folder / f"{run.name}.safetensors", fitted.result(), card)


def _plain(options: PatchOptions) -> PatchOptions:
    return replace(options, augment=False, gain_jitter=0.0, fine_gain=None, shift=False)


def _names(entries: tuple[Table, ...]) -> list[str]:
    """Return what cubes are called, without the folders of this machine."""
    return [
        Path(entry["path"]).stem if "path" in entry else f"{public_url(entry['catalog'])} {entry.get('bbox', '')}"
        for entry in entries
    ]
