"""Fitting a network's weights to patches.

What training from nothing and adapting to a scene have in common: the loss, the step, the averaged weights. Which
data, which schedule and what is kept of it is the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from ..network import Checkpoint, GINet, load_checkpoint, save_checkpoint
from ..sentinel2.bands import BANDS_10M, BANDS_20M
from .patches import Patches, PatchOptions, Sample

GRADIENT_NORM = 1.0


def relative_error(estimate: Tensor, truth: Tensor, hs: Tensor) -> Tensor:
    """Return the error relative to bicubic upsampling, absolute plus square: 2 for bicubic itself.

    Every patch counts alike, however bright or rich in contrast.

    Parameters
    ----------
    estimate, truth : (N, B, H, W)
    hs : (N, B, H / factor, W / factor)
    """
    factor = truth.shape[-1] // hs.shape[-1]
    baseline = F.interpolate(hs, scale_factor=factor, mode="bicubic") - truth
    error = estimate - truth
    absolute = error.abs().mean((1, 2, 3)) / (baseline.abs().mean((1, 2, 3)) + 1e-3)
    square = (error**2).mean((1, 2, 3)).add(1e-10).sqrt() / ((baseline**2).mean((1, 2, 3)).sqrt() + 2e-3)
    return (absolute + square).mean()


class Fit:
    """A network being fitted: one `step` per batch; `averaged` has the exponential average of its weights."""

    def __init__(self, network: GINet, *, learning_rate: float, averaging: float) -> None:
        self.network = network.train().requires_grad_(True)
        self.average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(averaging))
        self.optimizer = torch.optim.AdamW(network.parameters(), learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
        self.learning_rate = learning_rate

    @property
    def averaged(self) -> GINet:
        """Return the network with averaged weights."""
        return cast(GINet, self.average.module)

    def step(self, batch: Sample, *, rate: float) -> float:
        """Take one step at ``rate`` times the learning rate; return the loss. A step that is not finite is left out."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * rate
        loss = relative_error(self.network(batch.ms, batch.hs), batch.truth, batch.hs)
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), GRADIENT_NORM)
        if torch.isfinite(norm):
            self.optimizer.step()
            self.average.update_parameters(self.network)
        return loss.item()


def adapt(
    ds: xr.Dataset,
    path: str | Path,
    *,
    weights: str | Path | Checkpoint = "default",
    steps: int = 100,
    batch_size: int = 8,
    learning_rate: float = 2e-4,
    options: PatchOptions | None = None,
) -> Checkpoint:
    """Fine-tune weights on a cube at reduced scale, now, and store them as an ordinary checkpoint.

    Parameters
    ----------
    ds : Dataset
        Two-grid cube; read lazily, chunk by chunk, as `Patches` does.
    path : str or Path
        Safetensors file to write.
    weights : str, Path or Checkpoint
        Where to start from.
    steps, batch_size, learning_rate
        With patches of 48 pixels a step of the packaged ``ginet-s`` takes about a second of one core.
    options : PatchOptions, optional
        Patches; without them the degradation is the one that the weights were trained for.

    Returns
    -------
    Checkpoint
        To pass as ``weights=`` or by path.

    Raises
    ------
    ValueError
        If the cube has no patch without missing pixels, the loss is not finite, the weights are for other bands, or as
        `Patches` does.
    FileNotFoundError
        If the folder of ``path`` does not exist.
    """
    start = weights if isinstance(weights, Checkpoint) else load_checkpoint(weights)
    options = options or PatchOptions(degradation=start.card.get("degradation", "mtf"))
    if steps < 1:
        raise ValueError(f"steps={steps}: must be at least 1")
    if (start.config.bands, start.config.guide_bands, start.config.factor) != (BANDS_20M, BANDS_10M, 2):
        raise ValueError(
            f"{start.name} is for {', '.join(start.config.bands)} and factor {start.config.factor}; patches are of the "
            "six 20 m bands"
        )
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"no folder {Path(path).parent} to write the adapted weights to")
    fit = Fit(start.network(), learning_rate=learning_rate, averaging=0.98)
    losses = []
    for step, batch in zip(range(steps), _endless(Patches([ds], options), batch_size), strict=False):
        warm_up = min(1.0, (step + 1) / 20)
        losses.append(fit.step(batch, rate=warm_up * 0.5 * (1 + math.cos(math.pi * step / steps))))
    if not math.isfinite(losses[-1]):
        raise ValueError(
            f"the loss is {losses[-1]} after {steps} steps: nothing was written. Type a smaller learning_rate="
        )
    card = {
        "task": start.card.get("task", "Sentinel-2 20 m to 10 m"),
        "degradation": options.degradation,
        "adapted_from": {"name": start.name, "sha256": start.sha256, "card": start.card},
        "adapted_on": np.atleast_1d(ds.attrs.get("source_items", [])).astype(str).tolist(),
        "steps": steps,
        "seed": options.seed,
        "loss": {"first": losses[0], "last": losses[-1]},
    }
    return save_checkpoint(path, fit.averaged, card)


def _endless(patches: Patches, batch_size: int) -> Iterator[Sample]:
    """Yield batches, pass after pass."""
    epoch = 0
    while True:
        patches.set_epoch(epoch)
        batches = 0
        for batch in DataLoader(patches, batch_size=batch_size):
            yield Sample(*batch)
            batches += 1
        if not batches:
            raise ValueError(
                f"no patch of {patches.options.size} pixels at 20 m is free of missing and cloudy pixels. Type a "
                "smaller size"
            )
        epoch += 1
