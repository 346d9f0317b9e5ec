"""Checkpoints of the authors' own code, as our network.

Their file may be a pickle; it is read by torch's restricted unpickler, so that nothing in it is executed. Names,
shapes and counts are checked before a tensor is used.
"""

from __future__ import annotations

import argparse
import dataclasses
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..paths import expanded
from .checkpoints import check_weights
from .ginet import GINet, GINetConfig, kernel_size, prime_factors

# Our names, as patterns, and the authors'. The clusters' perceptrons, which we hold side by side, are listed in
# _sources.
_RENAMES = (
    (r"^guide\.classify\.", "clustering_cnn."),
    (r"^stages\.(\d+)\.down\.blur\.", r"downsamp_hs.\1.conv_k."),
    (r"^stages\.(\d+)\.up\.spread\.", r"upsamp_hs.\1.up."),
    (r"^stages\.(\d+)\.correction\.", r"BPKernel.\1."),
    (r"\.error_keys\.", ".NL_feat_u."),
    (r"\.guide_keys\.", ".NL_feat_pan."),
    (r"\.error_features\.", ".res_feat_u."),
    (r"\.guide_features\.", ".res_feat_pan."),
    (r"\.reconstruct\.", ".res_recon."),
    (r"\.blocks\.(\d+)\.conv_a\.", r".residual.\1.conv1."),
    (r"\.blocks\.(\d+)\.conv_b\.", r".residual.\1.conv2."),
    (r"\.attention\.combine\.", ".Nonlocal.mlp."),
    (r"\.attention\.mixed\.", ".Nonlocal.mix_head."),
    (r"\.attention\.(geometric|spectral)\.", r".Nonlocal.\1_head."),
    (r"\.(phi|theta)\.weight$", r".spatial_weights.\1.weight"),
    (r"\.value\.weight$", ".g.weight"),
)


def from_authors(source: Mapping[str, Tensor] | str | Path, config: GINetConfig | None = None) -> GINet:
    """Return a network with the weights of a checkpoint that carries the authors' tensor names.

    Parameters
    ----------
    source : mapping or path
        State dict, or a ``.safetensors``, ``.pt`` or ``.ckpt`` file with one (alone, or under ``state_dict`` or
        ``model_state_dict``). The names may start with ``model.``.
    config : GINetConfig, optional
        What no shape shows: window, patch, assignment, guide, names of the bands. Otherwise 5, 3, ``hard``, learned and
        the names of Sentinel-2's bands. What the shapes do show must be left at its default, or agree.

    Returns
    -------
    GINet
        On the CPU, in evaluation mode.

    Raises
    ------
    ValueError
        If a tensor is missing, left over, of a wrong shape, not of floating point numbers or not finite, or a pickle
        needs code to be read.
    """
    state = dict(source) if isinstance(source, Mapping) else _read_state(Path(expanded(source)))
    try:
        return _network(state, config)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        about = "" if isinstance(source, Mapping) else f"{source}: "
        kind = "" if type(error) is ValueError else f"the checkpoint does not fit: {type(error).__name__}: "
        raise ValueError(f"{about}{kind}{error}") from error


def _network(state: dict[str, Tensor], config: GINetConfig | None) -> GINet:
    """Return a network of a state dict with the authors' names."""
    if state and all(str(key).startswith("model.") for key in state):
        state = {key.removeprefix("model."): tensor for key, tensor in state.items()}
    inferred = _infer_config(state, config)
    sources = _sources(inferred)
    expected = {key: shape for keys in sources.values() for key, shape in keys.items()}
    missing, left_over = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or left_over:
        raise ValueError(f"the checkpoint does not fit: missing {missing}, left over {left_over}")
    wrong = [
        f"{key} {tuple(state[key].shape)} instead of {shape}"
        for key, shape in expected.items()
        if tuple(state[key].shape) != shape
    ]
    if wrong:
        raise ValueError(f"the checkpoint does not fit: {'; '.join(wrong)}")
    check_weights({key: state[key] for key in expected}, "the checkpoint")
    network = GINet(inferred)
    network.load_state_dict(
        {
            name: torch.cat([state[key] for key in sources[name]]).reshape(tensor.shape)
            for name, tensor in network.state_dict().items()
        }
    )
    return network.eval().requires_grad_(False)


def _sources(config: GINetConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return, for each of our tensors, the authors' tensors that it joins along the first axis, with their shapes.

    With an external guide the authors' checkpoints hold the clustering and its perceptrons too, unused.
    """
    with torch.device("meta"):
        ours = GINet(dataclasses.replace(config, guide="learned")).state_dict()
    sources = {}
    for name, tensor in ours.items():
        shape = tuple(tensor.shape)
        if match := re.fullmatch(r"guide\.(hidden|output)\.(weight|bias)", name):
            layer = {"hidden": 0, "output": 2}[match[1]]
            keys = [f"spectral_inter.mlps.{c}.{layer}.{match[2]}" for c in range(config.n_clusters)]
            shape = (shape[0] // config.n_clusters, *shape[1:2])  # a linear layer, where ours is a 1x1 convolution
        else:
            key = name
            for pattern, replacement in _RENAMES:
                key = re.sub(pattern, replacement, key)
            keys = [key]
        sources[name] = dict.fromkeys(keys, shape)
    return sources


def _infer_config(state: Mapping[str, Tensor], config: GINetConfig | None) -> GINetConfig:
    """Return the configuration that the shapes show, with what they cannot show taken from ``config``."""
    if strange := [key for key, tensor in state.items() if not isinstance(key, str) or not _is_whole(tensor)]:
        raise ValueError(f"the checkpoint's tensor {strange[0]!r} holds fewer numbers than its shape says")
    try:
        bands, n_features = state["spectral_inter.mlps.0.2.weight"].shape
        guide_bands = state["spectral_inter.mlps.0.0.weight"].shape[1]
    except KeyError as error:
        raise ValueError(
            f"no tensor {error} in the checkpoint: it does not carry the authors' names; it holds "
            f"{', '.join(sorted(state)[:3]) or 'nothing'} …"
        ) from error
    factor = 1
    for index in sorted(_indices(state, r"downsamp_hs\.0\.conv_k\.(\d+)\.weight$")):
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
    shown: dict[str, Any] = {
        "factor": factor,
        "n_features": n_features,
        "n_stages": len(_indices(state, r"BPKernel\.(\d+)\.")),
        "n_clusters": len(_indices(state, r"spectral_inter\.mlps\.(\d+)\.")),
        "n_blocks": len(_indices(state, r"BPKernel\.0\.residual\.(\d+)\.")),
    }
    given = {name: getattr(base, name) for name in shown if getattr(base, name) != getattr(GINetConfig(), name)}
    if conflicts := {name: value for name, value in given.items() if value != shown[name]}:
        raise ValueError(
            f"config sets {conflicts}, but the tensors show { ({name: shown[name] for name in conflicts}) }"
        )
    return dataclasses.replace(base, **shown)


def _is_whole(tensor: Tensor) -> bool:
    """Return whether a tensor has a number for each place: a stride of 0 makes terabytes of a few bytes."""
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _indices(state: Mapping[str, Tensor], pattern: str) -> set[int]:
    return {int(match.group(1)) for key in state if (match := re.match(pattern, key))}


_HARMLESS: list[Any] = [argparse.Namespace]  # options that training scripts store beside the tensors; data only


def _read_state(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, without executing any of it."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file ({error})") from error
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds objects besides tensors, and reading them would execute code. Where you trust the file, "
            "re-save its tensors: safetensors.torch.save_file(torch.load(path, weights_only=False)['state_dict'], "
            "'tensors.safetensors')"
        ) from error
    except Exception as error:  # whatever torch's unpickler meets in a file of another kind, or in half a one
        raise ValueError(f"{path} is not a checkpoint of torch, or not a whole one ({error!r})") from error
    for key in ("state_dict", "model_state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    tensors = isinstance(content, Mapping) and all(isinstance(value, Tensor) for value in content.values())
    if not tensors:
        raise ValueError(f"{path} holds no state dict, alone or under 'state_dict' or 'model_state_dict'")
    return dict(content)
