"""What a cube in a store was made with, for what is added to it to be made alike.

What nobody chose is decided by the machine: a processor takes another precision, a CUDA device other weights. In one
cube it must be the same for all dates, so that a job that goes on takes it from its store.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..paths import expanded
from ..sentinel2.addresses import without_secrets
from .devices import choose_device
from .predictor import Precision

if TYPE_CHECKING:
    from ..network import Checkpoint

_log = logging.getLogger(__name__)


class Choice(NamedTuple):
    """What is chosen of a network, or left to the machine: ``"default"``, None, ``"auto"``, ``"auto"``."""

    weights: str | Path | Checkpoint | None
    depth: int | str | None
    device: str
    precision: Precision


def like_the_store(store: Any, choice: Choice) -> Choice:
    """Return a choice with what was left open as the cube in a store has it; as it is where there is no such cube.

    Parameters
    ----------
    store : str, Path, zarr store or icechunk.Repository
    choice : Choice

    Raises
    ------
    ValueError
        If the store's weights or precision cannot be had here.
    """
    attrs, shown = _attributes(store), without_secrets(str(store))
    if "ginet_weights" not in attrs:
        return choice
    taken: dict[str, Any] = {}
    if isinstance(choice.weights, str) and choice.weights == "default":
        taken["weights"] = _weights(attrs, shown)
    if attrs["ginet_weights"] == "none" or choice.weights is None:  # without a network there is nothing else to choose
        taken |= {"precision": attrs["ginet_precision"]} if choice.precision == "auto" else {}
    else:
        if choice.depth is None:
            taken["depth"] = int(attrs["ginet_depth"])
        if choice.precision == "auto":
            taken["precision"] = attrs["ginet_precision"]
            if (device := _device(attrs, choice.device, shown)) != choice.device:
                taken["device"] = device
    if taken:
        _log.info("%s: %s, as in the store", shown, ", ".join(f"{key}={value!r}" for key, value in taken.items()))
    return choice._replace(**taken)


def _attributes(store: Any) -> Mapping[str, Any]:
    """Return the attributes of a cube in a store, or nothing where there is none."""
    import zarr

    from ..transactions import readable

    try:
        return dict(zarr.open_group(expanded(readable(store)), mode="r").attrs)
    except (FileNotFoundError, NotADirectoryError):
        return {}


def _weights(attrs: Mapping[str, Any], shown: str) -> str | None:
    """Return the name of the packaged weights of a store, by their hash; None of what was made without."""
    from ..network import available_weights, load_checkpoint

    if attrs["ginet_weights"] == "none":
        return None
    sha256 = attrs["ginet_weights_sha256"]
    if found := next((name for name in available_weights() if load_checkpoint(name).sha256 == sha256), None):
        return found
    name = attrs["ginet_weights"]
    raise ValueError(
        f"{shown} was made with the weights {name!r} (sha256 {sha256[:12]}…), not among those of this version: "
        f"{', '.join(available_weights())}. Type weights='…/{name}.safetensors', the path of their file, or name "
        "another store"
    )


def _device(attrs: Mapping[str, Any], device: str, shown: str) -> str:
    """Return the device for the precision of a store."""
    precision, chosen = attrs["ginet_precision"], choose_device(device)
    if precision == "bfloat16" and device == "auto":
        return "cpu"
    if (precision == "bfloat16" and chosen != "cpu") or (precision == "mixed" and not chosen.startswith("cuda")):
        needed = (
            "processors: type device='cpu'" if precision == "bfloat16" else "CUDA devices: go on where there is one"
        )
        raise ValueError(
            f"{shown} was made with precision={precision!r}, and device={chosen!r} computes otherwise. It is for "
            f"{needed}, or name another store"
        )
    return device
