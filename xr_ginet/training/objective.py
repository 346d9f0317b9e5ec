"""Where training starts and what it minimises.

Plain functions of a network and tensors; nothing here reads data or takes a step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..network.ginet import GINet, Stage


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


@torch.no_grad()
def start_near_bicubic(network: GINet) -> None:
    """Change a fresh network's weights so that its output is near bicubic upsampling and all of its layers are alive.

    Projected errors are small numbers: their features are scaled up to the size of activations, and the corrections
    that come of them down.
    """
    for stage in cast(Iterable[Stage], network.stages):
        for spread in cast(Iterable[nn.ConvTranspose2d], stage.up.spread):  # linear interpolation
            width = spread.kernel_size[0]
            taps = 1 - (torch.arange(width) - width // 2).abs() / (width // 2 + 1)
            taps = taps * spread.stride[0] / taps.sum()
            spread.weight.copy_(taps[:, None] * taps)
        stage.correction.error_features.weight *= 5
        stage.correction.error_keys.weight *= 5
        stage.correction.reconstruct.weight *= 0.1
    if network.config.guide == "learned":
        cast(Tensor, network.guide.output.bias).add_(0.2)


@torch.no_grad()
def start_from_clusters(network: GINet, spectra: Tensor, *, seed: int = 0) -> None:
    """Change the weights that assign clusters so that they assign as k-means does.

    Some features pass the reflectances on, and the logits are ``(2 c · x − |c|²) / σ²`` with the centres ``c`` and the
    mean squared distance σ² of a spectrum to its centre; all other features start without influence, and learn.

    Parameters
    ----------
    network : GINet
        With a learned guide; its two hidden layers must be at least as wide as the guide has bands.
    spectra : (n, guide band)
        Reflectance of training pixels, not negative.
    seed : int
        Of scikit-learn's k-means.

    Raises
    ------
    ValueError
        If the network has no learned guide, its layers are too narrow, or there are fewer spectra than clusters.
    """
    from sklearn.cluster import KMeans

    config = network.config
    bands = len(config.guide_bands)
    if config.guide != "learned" or min(config.cluster_features) < bands:
        raise ValueError(
            f"clusters start from k-means in a learned guide with hidden layers of at least {bands} features; this one "
            f"is {config.guide!r} with {config.cluster_features}"
        )
    if len(spectra) < config.n_clusters:
        raise ValueError(f"{len(spectra)} spectra for {config.n_clusters} clusters: more are needed")
    means = KMeans(config.n_clusters, n_init=4, random_state=seed).fit(spectra.double().numpy())
    centres = torch.from_numpy(means.cluster_centers_)
    spread = max(means.inertia_ / len(spectra), 1e-8)
    first, _, second, _, last = cast(Iterable[nn.Conv2d], network.guide.classify)
    for layer in (first, second):
        layer.weight[:bands] = 0
        layer.weight[range(bands), range(bands), 1, 1] = 1  # the centre tap passes band i on as feature i
        cast(Tensor, layer.bias)[:bands] = 0
    last.weight.zero_()
    last.weight[:, :bands, 1, 1] = (2 * centres / spread).to(last.weight)
    cast(Tensor, last.bias).copy_(-(centres**2).sum(1) / spread)
