"""Checkpoints: weights with their configuration and history in one safetensors file.

A file is data, never code: safetensors only, and a pickle of the authors' is read by torch's restricted unpickler.
Only packaged names and paths are known here; nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .ginet import GINet, GINetConfig, kernel_size, prime_factors

DEFAULT = "ginet-s"
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
        """Return the network with these weights, on the CPU, in evaluation mode."""
        with safe_open(self.path, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}
        network = GINet(self.config)
        network.load_state_dict(state)
        return network.eval().requires_grad_(False)


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
    path = PACKAGED / f"{DEFAULT if weights == 'default' else weights}.safetensors"
    if not path.is_file():
        path = Path(weights)
    if not path.is_file():
        raise FileNotFoundError(
            f"no weights {str(weights)!r}: neither a file nor one of the packaged {', '.join(available_weights())}. "
            "Type weights='default', or the path of a .safetensors file"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a safetensors file ({error}). Read a checkpoint of the authors' with "
            "xr_ginet.from_authors(path) and store it with xr_ginet.save_checkpoint"
        ) from error
    if "ginet_config" not in metadata:
        raise ValueError(
            f"{path} holds no 'ginet_config' in its metadata: it was not written by xr_ginet. Read a checkpoint of "
            "the authors' with xr_ginet.from_authors(path) and store it with xr_ginet.save_checkpoint"
        )
    config = GINetConfig(**json.loads(metadata["ginet_config"]))
    return Checkpoint(path.resolve(), config, json.loads(metadata.get("card", "{}")))


def save_checkpoint(path: str | Path, network: GINet, card: Mapping[str, Any] | None = None) -> Checkpoint:
    """Write a network's weights, configuration and model card to a safetensors file; return it as a checkpoint."""
    metadata = {
        "ginet_config": json.dumps(dataclasses.asdict(network.config)),
        "card": json.dumps(dict(card or {})),
    }
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in network.state_dict().items()}
    save_file(state, path, metadata=metadata)
    return load_checkpoint(Path(path))


def from_authors(source: Mapping[str, Tensor] | str | Path, config: GINetConfig | None = None) -> GINet:
    """Return a network with the weights of a checkpoint that carries the authors' tensor names.

    Parameters
    ----------
    source : mapping or path
        State dict, or a ``.safetensors``, ``.pt`` or ``.ckpt`` file with one (alone, or under ``state_dict`` or
        ``model_state_dict``). The names may start with ``model.``.
    config : GINetConfig, optional
        What no shape shows: window, patch, assignment, names of the bands. Otherwise 5, 3, ``hard`` and the names of
        Sentinel-2's bands.

    Returns
    -------
    GINet
        On the CPU, in evaluation mode.

    Raises
    ------
    ValueError
        If a tensor is missing, left over or of a wrong shape, or a pickle needs code to be read.
    """
    state = dict(source) if isinstance(source, Mapping) else _read_state(Path(source))
    if state and all(key.startswith("model.") for key in state):
        state = {key.removeprefix("model."): tensor for key, tensor in state.items()}
    inferred = _infer_config(state, config)
    if config is not None and config != inferred:
        raise ValueError(f"the tensors belong to {inferred}, not to the given {config}")
    network = GINet(inferred)
    converted = _convert(state, inferred)
    expected = network.state_dict()
    missing = sorted(expected.keys() - converted.keys())
    left_over = sorted(converted.keys() - expected.keys())
    if missing or left_over:
        raise ValueError(f"the checkpoint does not fit: missing {missing}, left over {left_over}")
    wrong = [
        f"{key} {tuple(converted[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in expected
        if converted[key].shape != expected[key].shape
    ]
    if wrong:
        raise ValueError(f"the checkpoint does not fit: {'; '.join(wrong)}")
    network.load_state_dict(converted)
    return network.eval().requires_grad_(False)


# The authors' names, as a pattern, and ours. Clusters' perceptrons are joined by hand in _convert.
_RENAMES = (
    (r"clustering_cnn\.(\d+)\.", r"guide.classify.\1."),
    (r"downsamp_hs\.(\d+)\.conv_k\.(\d+)\.", r"stages.\1.down.blur.\2."),
    (r"upsamp_hs\.(\d+)\.up\.(\d+)\.", r"stages.\1.up.spread.\2."),
    (r"BPKernel\.(\d+)\.NL_feat_u\.", r"stages.\1.correction.error_keys."),
    (r"BPKernel\.(\d+)\.NL_feat_pan\.", r"stages.\1.correction.guide_keys."),
    (r"BPKernel\.(\d+)\.res_feat_u\.", r"stages.\1.correction.error_features."),
    (r"BPKernel\.(\d+)\.res_feat_pan\.", r"stages.\1.correction.guide_features."),
    (r"BPKernel\.(\d+)\.res_recon\.", r"stages.\1.correction.reconstruct."),
    (r"BPKernel\.(\d+)\.residual\.(\d+)\.conv1\.", r"stages.\1.correction.blocks.\2.conv_a."),
    (r"BPKernel\.(\d+)\.residual\.(\d+)\.conv2\.", r"stages.\1.correction.blocks.\2.conv_b."),
    (r"BPKernel\.(\d+)\.Nonlocal\.geometric_head\.", r"stages.\1.correction.attention.geometric."),
    (r"BPKernel\.(\d+)\.Nonlocal\.spectral_head\.", r"stages.\1.correction.attention.spectral."),
    (r"BPKernel\.(\d+)\.Nonlocal\.mix_head\.", r"stages.\1.correction.attention.mixed."),
    (r"BPKernel\.(\d+)\.Nonlocal\.mlp\.", r"stages.\1.correction.attention.combine."),
    (r"\.spatial_weights\.(phi|theta)\.", r".\1."),
    (r"\.g\.weight$", r".value.weight"),
)


def _convert(state: Mapping[str, Tensor], config: GINetConfig) -> dict[str, Tensor]:
    """Return the authors' tensors under our names; what has no name of ours keeps its own."""
    converted: dict[str, Tensor] = {}
    perceptrons: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key.startswith("spectral_inter.mlps."):
            perceptrons[key] = tensor
            continue
        name = key
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        converted[name] = tensor
    for layer, ours in (("0", "guide.hidden"), ("2", "guide.output")):
        for kind in ("weight", "bias"):
            keys = [f"spectral_inter.mlps.{c}.{layer}.{kind}" for c in range(config.n_clusters)]
            if all(key in perceptrons for key in keys):
                joined = torch.cat([perceptrons.pop(key) for key in keys])
                converted[f"{ours}.{kind}"] = joined[..., None, None] if kind == "weight" else joined
    if config.guide == "external":  # the authors' code creates the clustering and its perceptrons, unused
        return {key: tensor for key, tensor in converted.items() if not key.startswith("guide.")}
    return converted | perceptrons


def _infer_config(state: Mapping[str, Tensor], config: GINetConfig | None) -> GINetConfig:
    """Return the configuration that the shapes show, with what they cannot show taken from ``config``."""
    try:
        bands, n_features = state["spectral_inter.mlps.0.2.weight"].shape
        guide_bands = state["spectral_inter.mlps.0.0.weight"].shape[1]
    except KeyError as error:
        raise ValueError(
            f"no tensor {error} in the checkpoint: it does not carry the authors' names; it holds "
            f"{', '.join(sorted(state)[:3]) or 'nothing'} …"
        ) from error
    factor = 1
    for index in range(len(_indices(state, r"downsamp_hs\.0\.conv_k\.(\d+)\."))):
        kernel = state[f"downsamp_hs.0.conv_k.{index}.weight"].shape[-1]
        prime = 2 if kernel == 3 else kernel - 2
        if prime_factors(prime) != (prime,) or kernel_size(prime) != kernel:
            raise ValueError(f"downsamp_hs.0.conv_k.{index}.weight is {kernel} wide, which is no prime ratio's kernel")
        factor *= prime
    base = config or GINetConfig()
    names = {2: ("B01", "B09"), 6: GINetConfig().bands}
    if len(base.bands) != bands:
        base = dataclasses.replace(base, bands=names.get(bands, tuple(f"band_{i}" for i in range(bands))))
    if len(base.guide_bands) != guide_bands:
        raise ValueError(
            f"the checkpoint's guide has {guide_bands} bands; name them with config=GINetConfig(guide_bands=…)"
        )
    return dataclasses.replace(
        base,
        factor=factor,
        n_features=n_features,
        n_stages=len(_indices(state, r"BPKernel\.(\d+)\.")),
        n_clusters=len(_indices(state, r"spectral_inter\.mlps\.(\d+)\.")),
        n_blocks=len(_indices(state, r"BPKernel\.0\.residual\.(\d+)\.")),
    )


def _indices(state: Mapping[str, Tensor], pattern: str) -> set[int]:
    return {int(match.group(1)) for key in state if (match := re.match(pattern, key))}


def _read_state(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, without executing any of it."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds objects besides tensors, and reading them would execute code. Where you trust the file, "
            "re-save its tensors: safetensors.torch.save_file(torch.load(path, weights_only=False)['state_dict'], "
            "'tensors.safetensors')"
        ) from error
    for key in ("state_dict", "model_state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    tensors = isinstance(content, Mapping) and all(isinstance(value, Tensor) for value in content.values())
    if not tensors:
        raise ValueError(f"{path} holds no state dict, alone or under 'state_dict' or 'model_state_dict'")
    return dict(content)
