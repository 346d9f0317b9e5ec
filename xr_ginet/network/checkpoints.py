"""Checkpoints: weights with their configuration and history in one safetensors file.

A file is data, never code: safetensors only. Packaged names and paths are known here; nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..paths import expanded
from .ginet import GINet, GINetConfig

DEFAULT, DEFAULT_ON_GPU = "ginet-s", "ginet"
METADATA_KEY = "ginet"
PACKAGED = Path(__file__).parent.parent / "weights"


@dataclass(frozen=True)
class Checkpoint:
    """Weights on disk, with what they say of themselves. Constructing one reads the header only."""

    path: Path
    """The safetensors file."""
    config: GINetConfig
    """The network that the weights belong to."""
    card: dict[str, Any]
    """Model card: data, degradation, metrics, seed, command; whatever the maker wrote."""

    @property
    def name(self) -> str:
        """Return the file's name without its ending."""
        return self.path.stem

    @cached_property
    def sha256(self) -> str:
        """Return the hash of the file's bytes, in hexadecimal."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def network(self) -> GINet:
        """Return the network with these weights, on the CPU, in evaluation mode.

        Raises
        ------
        ValueError
            If the file's tensors are not those of the configuration, no floating point numbers, or not finite.
        """
        with torch.device("meta"):  # takes no memory
            network = GINet(self.config)
        needed = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        with safe_open(self.path, framework="pt") as file:
            held = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            if held != needed:
                wrong = sorted(n for n in held.keys() | needed.keys() if held.get(n) != needed.get(n))
                raise ValueError(
                    f"{self.path} does not hold the network that it describes: {wrong[0]} is {held.get(wrong[0])}, "
                    f"needed is {needed.get(wrong[0])}, and {len(wrong) - 1} more differ"
                )
            state = {name: file.get_tensor(name) for name in file.keys()}
        check_weights(state, str(self.path))
        network.to_empty(device="cpu").load_state_dict(state)
        return network.eval().requires_grad_(False)


def check_weights(state: Mapping[str, torch.Tensor], source: str) -> None:
    """Raise where a tensor does not hold finite floating point numbers: the network would give NaN, or nonsense."""
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{source}: {name} is {tensor.dtype}; floating point weights are needed. Store it anew")
        wrong = int((~torch.isfinite(tensor.to(torch.float32))).sum())
        if wrong:
            raise ValueError(
                f"{source}: {wrong} of {tensor.numel()} numbers of {name} are NaN or infinite in float32. Did its "
                "training diverge? Use other weights"
            )


def available_weights() -> list[str]:
    """Return the names of the packaged checkpoints."""
    return sorted(path.stem for path in PACKAGED.glob("*.safetensors"))


def load_checkpoint(weights: str | Path = "default") -> Checkpoint:
    """Return a checkpoint by the name of a packaged one or by path. Reads the header only.

    Raises
    ------
    FileNotFoundError
        If ``weights`` is neither a packaged name nor a file.
    ValueError
        If the file is not a safetensors file or holds no GINet configuration.
    """
    packaged = PACKAGED / f"{DEFAULT if weights == 'default' else weights}.safetensors"
    path = packaged if packaged.is_file() else Path(expanded(weights))
    if not path.is_file():
        raise FileNotFoundError(
            f"no weights {str(weights)!r}: neither a file nor one of the packaged {', '.join(available_weights())}. "
            "Type weights='default', or the path of a .safetensors file"
        )
    return read_checkpoint(path)


def read_checkpoint(path: Path) -> Checkpoint:
    """Return the checkpoint in a file: see `load_checkpoint`."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a safetensors file ({error}). Read a checkpoint of the authors' with "
            "xr_ginet.from_authors(path) and store it with xr_ginet.save_checkpoint"
        ) from error
    if METADATA_KEY not in metadata:
        raise ValueError(
            f"{path} holds no {METADATA_KEY!r} in its metadata: it was not written by xr_ginet. Read a checkpoint of "
            "the authors' with xr_ginet.from_authors(path) and store it with xr_ginet.save_checkpoint"
        )
    try:
        content = json.loads(metadata[METADATA_KEY])
        stored, card = dict(content["config"]), dict(content["card"])
    except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not tell its configuration and card: {error!r}") from error
    if unknown := stored.keys() - {field.name for field in dataclasses.fields(GINetConfig)}:
        raise ValueError(f"{path} was written by a newer xr_ginet: it sets {sorted(unknown)}. pip install -U xr-ginet")
    try:
        config = GINetConfig(**stored)
    except TypeError as error:
        raise ValueError(f"{path} has a configuration that is none: {error}") from error
    return Checkpoint(path.resolve(), config, card)


def save_checkpoint(path: str | Path, network: GINet, card: Mapping[str, Any] | None = None) -> Checkpoint:
    """Write a network's weights, configuration and model card to a safetensors file; return it as a checkpoint."""
    # One key: safetensors writes several in an order that changes from process to process, and the hash with it.
    content = {"config": dataclasses.asdict(network.config), "card": dict(card or {})}
    metadata = {METADATA_KEY: json.dumps(content)}
    path = expanded(path)
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in network.state_dict().items()}
    save_file(state, path, metadata=metadata)
    return read_checkpoint(Path(path))
