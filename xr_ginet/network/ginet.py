"""GINet: a geometry-guided, unfolded back-projection network, as one pure function of two tensors.

The network refines a bicubic estimate of the coarse bands. Each stage projects the estimate down, compares it with the
coarse bands, projects the difference up and turns it into a correction with the help of a guide drawn from the fine
bands. It knows nothing of coordinates, chunks or files.

References
----------
Pereira-Sánchez, Torres, Alcover, Garau, Navarro, Sbert, Duran: "Super-Resolution of Sentinel-2 Images Using a
Geometry-Guided Back-Projection Network with Self-Attention", arXiv 2508.04729.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import WindowAttention

ATTENTION_CHANNELS = 5  # widths of the attention and the guide features; they do not depend on the bands
GUIDE_CHANNELS = 3
GUIDE_FEATURES = 5


LIMITS = {
    "bands": 64,
    "factor": 60,
    "n_stages": 64,
    "n_features": 4096,
    "n_clusters": 256,
    "n_blocks": 64,
    "window_size": 65,
    "patch_size": 65,
}
"""Far above what makes sense: a file must not ask for all the memory or time that there is."""


def _is_within(value: object, least: int, name: str) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= LIMITS[name]


@dataclass(frozen=True)
class GINetConfig:
    """What decides the network's function besides its weights."""

    bands: tuple[str, ...] = ("B05", "B06", "B07", "B8A", "B11", "B12")
    """Coarse bands, in the order of the channels of ``hs`` and of the output."""
    guide_bands: tuple[str, ...] = ("B02", "B03", "B04", "B08")
    """Fine bands, in the order of the channels of ``ms``."""
    factor: int = 2
    """Resolution ratio: 2 for 20 m to 10 m, 6 for 60 m to 10 m."""
    n_stages: int = 6
    """Back-projection stages, each with its own weights."""
    n_features: int = 128
    """Width of the residual branch and of the guide's hidden layer."""
    n_clusters: int = 5
    """Spectral clusters of the guide, each with its own small perceptron."""
    n_blocks: int = 3
    """Residual blocks per stage."""
    cluster_features: tuple[int, int] = (32, 64)
    """Widths of the two hidden layers that assign the clusters."""
    window_size: int = 5
    """Side of the attention window, in fine pixels."""
    patch_size: int = 3
    """Side of the patches that attention compares, in fine pixels."""
    assignment: Literal["hard", "soft"] = "hard"
    """``hard``: a pixel uses its likeliest cluster alone (the authors'; the clustering then gets no gradient).
    ``soft``: the clusters' outputs are mixed by their probabilities."""
    guide: Literal["learned", "external"] = "learned"
    """``external``: the caller supplies the guide, a tensor shaped like the output."""

    def __post_init__(self) -> None:
        if isinstance(self.bands, str) or not self.bands or isinstance(self.guide_bands, str) or not self.guide_bands:
            raise ValueError(f"bands={self.bands!r}, guide_bands={self.guide_bands!r}: each must be a tuple of names")
        object.__setattr__(self, "bands", tuple(self.bands))
        object.__setattr__(self, "guide_bands", tuple(self.guide_bands))
        object.__setattr__(self, "cluster_features", tuple(self.cluster_features))
        for name in ("bands", "guide_bands"):
            names = getattr(self, name)
            if len(names) > LIMITS["bands"] or not all(isinstance(band, str) for band in names):
                raise ValueError(f"{name}={names!r}: must be at most {LIMITS['bands']} names")
        if len(self.cluster_features) != 2 or not all(_is_within(w, 1, "n_features") for w in self.cluster_features):
            raise ValueError(
                f"cluster_features={self.cluster_features}: must be two positive widths of at most "
                f"{LIMITS['n_features']}"
            )
        for name, least in (("factor", 2), ("n_stages", 1), ("n_features", 1), ("n_clusters", 1), ("n_blocks", 0)):
            value = getattr(self, name)
            if not _is_within(value, least, name):
                raise ValueError(
                    f"{name}={value!r}: must be an integer of at least {least}, and at most {LIMITS[name]}"
                )
        for name in ("window_size", "patch_size"):
            value = getattr(self, name)
            if not _is_within(value, 1, name) or value % 2 == 0:
                raise ValueError(
                    f"{name}={value!r}: must be odd and positive, so that it has a centre, and at most {LIMITS[name]}"
                )
        for name, choices in (("assignment", ("hard", "soft")), ("guide", ("learned", "external"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {choices}")

    @property
    def receptive_radius(self) -> int:
        """Distance in fine pixels beyond which no input reaches an output pixel.

        A coarse input pixel is at the distance of the nearest fine pixel that it covers. Computed from the layers by
        following the interval of pixels that one output pixel depends on, for each phase of the two grids.
        """
        return max(self._reach(phase) for phase in range(self.factor))

    def _reach(self, phase: int) -> int:
        """Return the receptive radius of the output pixel at position ``phase`` of its coarse pixel."""
        primes = prime_factors(self.factor)
        guide_radius = 3 if self.guide == "learned" else 0  # three 3×3 convolutions assign the clusters
        head_radius = self.window_size // 2 + self.patch_size // 2
        residual_radius = 1 + head_radius + 2 * self.n_blocks + 1
        low = high = phase
        reach = 0
        for _ in range(self.n_stages):
            error = (low - residual_radius, high + residual_radius)
            reach = max(reach, phase - error[0] + guide_radius, error[1] - phase + guide_radius)
            low, high = _down_interval(*_up_interval(*error, primes), primes)
            coarse = _up_interval(*error, primes)
            reach = max(reach, _coarse_distance(*coarse, phase, self.factor))
            low, high = min(low, error[0]), max(high, error[1])
        return max(reach, _coarse_distance(*_bicubic_interval(low, high, self.factor), phase, self.factor))


def prime_factors(factor: int) -> tuple[int, ...]:
    """Return the prime factors of ``factor`` in increasing order, with repetition.

    Examples
    --------
    >>> prime_factors(6)
    (2, 3)
    """
    primes, rest, candidate = [], factor, 2
    while rest > 1:
        while rest % candidate == 0:
            primes.append(candidate)
            rest //= candidate
        candidate += 1
    return tuple(primes)


def kernel_size(prime: int) -> int:
    """Return the width of the resampling kernels of a prime ratio: ``q + 1`` for even ``q``, ``q + 2`` for odd."""
    return prime + 1 if prime % 2 == 0 else prime + 2


def _up_interval(low: int, high: int, primes: tuple[int, ...]) -> tuple[int, int]:
    """Return the coarse pixels from which ``Up`` makes the fine pixels ``low..high``."""
    for q in reversed(primes):
        k = kernel_size(q)
        # A transposed convolution writes input j to outputs q·j − k//2 … q·j − k//2 + k − 1.
        low, high = -((k - 1 - k // 2 - low) // q), (high + k // 2) // q
    return low, high


def _down_interval(low: int, high: int, primes: tuple[int, ...]) -> tuple[int, int]:
    """Return the fine pixels from which ``Down`` makes the coarse pixels ``low..high``."""
    for q in reversed(primes):
        k = kernel_size(q)
        low, high = q * low - k // 2, q * high + q - 1 + k // 2
    return low, high


def _bicubic_interval(low: int, high: int, factor: int) -> tuple[int, int]:
    """Return the coarse pixels from which bicubic upsampling makes the fine pixels ``low..high``."""

    def taps(fine: int) -> tuple[int, int]:
        before, rest = divmod(2 * fine + 1 - factor, 2 * factor)  # position between the coarse centres
        return (before - 1, before + 2) if rest else (before, before)  # on a centre, one tap is 1 and three are 0

    return min(taps(low)[0], taps(low + 1)[0]), max(taps(high)[1], taps(high - 1)[1])


def _coarse_distance(low: int, high: int, phase: int, factor: int) -> int:
    """Return how far the coarse pixels ``low..high`` are from the fine pixel ``phase``, in fine pixels."""
    return max(phase - (low * factor + factor - 1), high * factor - phase)


class Down(nn.Module):
    """Fine to coarse: per prime ratio a depthwise convolution, starting as the identity, and a block mean."""

    def __init__(self, bands: int, factor: int) -> None:
        super().__init__()
        self.primes = prime_factors(factor)
        self.blur = nn.ModuleList()
        for q in self.primes:
            k = kernel_size(q)
            conv = nn.Conv2d(bands, bands, k, padding=k // 2, groups=bands, bias=False)
            nn.init.dirac_(conv.weight, groups=bands)
            self.blur.append(conv)

    def forward(self, x: Tensor) -> Tensor:  # (N, B, H, W) -> (N, B, H/s, W/s)
        for q, blur in zip(self.primes, self.blur, strict=True):
            x = F.avg_pool2d(blur(x), q)
        return x


class Up(nn.Module):
    """Coarse to fine: per prime ratio a depthwise transposed convolution."""

    def __init__(self, bands: int, factor: int) -> None:
        super().__init__()
        self.spread = nn.Sequential()
        for q in prime_factors(factor):
            k = kernel_size(q)
            self.spread.append(
                nn.ConvTranspose2d(bands, bands, k, q, padding=k // 2, output_padding=q - 1, groups=bands, bias=False)
            )

    def forward(self, x: Tensor) -> Tensor:  # (N, B, H/s, W/s) -> (N, B, H, W)
        return self.spread(x)


class Guide(nn.Module):
    """The geometry-rich guide: each pixel's fine bands through the perceptron of its spectral cluster."""

    def __init__(self, config: GINetConfig) -> None:
        super().__init__()
        self.assignment = config.assignment
        self.temperature: float | None = None
        """Training may set one: clusters are then mixed by their probabilities at this temperature, whatever the
        assignment, so that they get a gradient; towards zero the mixture becomes the likeliest cluster alone."""
        self.n_clusters = config.n_clusters
        fine, bands = len(config.guide_bands), len(config.bands)
        first, second = config.cluster_features
        self.classify = nn.Sequential(
            nn.Conv2d(fine, first, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(first, second, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(second, config.n_clusters, 3, padding=1),
        )
        # All clusters' perceptrons side by side, as grouped 1×1 convolutions.
        self.hidden = nn.Conv2d(fine, config.n_clusters * config.n_features, 1)
        self.output = nn.Conv2d(
            config.n_clusters * config.n_features, config.n_clusters * bands, 1, groups=config.n_clusters
        )

    def forward(self, ms: Tensor) -> Tensor:  # (N, 4, H, W) -> (N, B, H, W)
        if not torch.is_grad_enabled():
            ms = ms.contiguous(memory_format=torch.channels_last)  # faster, as in Correction
        logits = self.classify(ms)  # (N, C, H, W)
        if self.temperature is not None:
            logits = logits / self.temperature
        share = cluster_shares(logits, hard=self.assignment == "hard" and self.temperature is None)
        parameters = (self.hidden.weight, self.hidden.bias, self.output.weight, self.output.bias)
        layers = zip(*(cast(Tensor, p).chunk(self.n_clusters) for p in parameters), strict=True)
        guide = ms.new_zeros(())
        for cluster, (weight_a, bias_a, weight_b, bias_b) in enumerate(layers):  # one by one, for memory's sake
            hidden = _by_pixel(ms, weight_a, bias_a).relu_()  # (N, F, H, W)
            guide = guide + share[:, cluster : cluster + 1] * _by_pixel(hidden, weight_b, bias_b).relu_()
        return guide.contiguous()


def _by_pixel(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return a 1×1 convolution.

    On one thread torch makes a matrix product of it, whose sums depend, in their last bit, on where in the image a
    pixel lies; oneDNN's do not.
    """
    on_processor = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_grad_enabled()
    if on_processor and torch.backends.mkldnn.is_available():
        return torch.mkldnn_convolution(x, weight, bias, (0, 0), (1, 1), (1, 1), 1)
    return F.conv2d(x, weight, bias)


def cluster_shares(logits: Tensor, *, hard: bool) -> Tensor:
    """Return what each cluster has of a pixel, ``(N, C, H, W)``; hard: all of the likeliest, the first on a tie."""
    # torch's softmax rounds the last pixels of each thread otherwise than the rest.
    exponentials = (logits - logits.detach().amax(1, keepdim=True)).exp()
    share = exponentials / exponentials.sum(1, keepdim=True)
    if hard:
        share = torch.zeros_like(share).scatter_(1, share.argmax(1, keepdim=True), 1)
    return share


class ResidualBlock(nn.Module):
    """``x ↦ ReLU(conv(ReLU(conv(x))) + x)``; without gradients the result takes the memory of ``x``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_a = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_b = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv_b(self.conv_a(x).relu_())
        return (y.add_(x) if torch.is_grad_enabled() else x.add_(y)).relu_()


class Correction(nn.Module):
    """The learned proximal step: a correction of the estimate from the projected error and the guide."""

    def __init__(self, config: GINetConfig) -> None:
        super().__init__()
        bands, width = len(config.bands), config.n_features + ATTENTION_CHANNELS + GUIDE_FEATURES

        def conv(channels_in: int, channels_out: int) -> nn.Conv2d:
            return nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)

        self.error_keys = conv(bands, ATTENTION_CHANNELS)
        self.guide_keys = conv(bands, GUIDE_CHANNELS)
        self.attention = WindowAttention(
            ATTENTION_CHANNELS, GUIDE_CHANNELS, window_size=config.window_size, patch_size=config.patch_size
        )
        self.error_features = conv(bands, config.n_features)
        self.guide_features = conv(bands, GUIDE_FEATURES)
        self.blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(config.n_blocks)))
        self.reconstruct = conv(width, bands)

    def forward(self, error: Tensor, guide: Tensor) -> Tensor:  # 2 × (N, B, H, W) -> (N, B, H, W)
        attended = self.attention(self.error_keys(error), self.guide_keys(guide))  # (N, 5, H, W)
        if error.is_cuda or not torch.is_grad_enabled():
            # From here on the channels of a pixel lie side by side: so convolutions reach the rate of a matrix product.
            # (On processors their gradients would take longer.)
            attended, error, guide = (x.contiguous(memory_format=torch.channels_last) for x in (attended, error, guide))
        features = torch.cat(
            [attended, self.error_features(error), self.guide_features(guide)], dim=1
        )  # (N, F+10, H, W)
        return self.reconstruct(self.blocks(features)).contiguous()


class Stage(nn.Module):
    """One back-projection: project down, compare with the coarse bands, project the error up, correct."""

    def __init__(self, config: GINetConfig) -> None:
        super().__init__()
        self.down = Down(len(config.bands), config.factor)
        self.up = Up(len(config.bands), config.factor)
        self.correction = Correction(config)

    def forward(self, estimate: Tensor, hs: Tensor, guide: Tensor) -> Tensor:
        error = self.up(self.down(estimate) - hs)  # (N, B, H, W)
        return estimate + self.correction(error, guide)


class GINet(nn.Module):
    """The network of one configuration.

    Parameters
    ----------
    config : GINetConfig
        Bands, ratio and widths. The default is the paper's.
    """

    def __init__(self, config: GINetConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or GINetConfig()
        if config.guide == "learned":
            self.guide = Guide(config)
        self.stages = nn.ModuleList(Stage(config) for _ in range(config.n_stages))

    def forward(self, ms: Tensor, hs: Tensor, guide: Tensor | None = None) -> Tensor:
        """Return the coarse bands at the fine resolution.

        Parameters
        ----------
        ms : (N, len(guide_bands), H, W)
            Fine bands, reflectance; H and W multiples of the factor.
        hs : (N, len(bands), H / factor, W / factor)
            Coarse bands, reflectance.
        guide : (N, len(bands), H, W), optional
            Guide image, for a configuration with ``guide="external"`` only.

        Returns
        -------
        (N, len(bands), H, W)
            Reflectance.

        Raises
        ------
        ValueError
            If the shapes do not belong together, or a guide is missing or superfluous.
        """
        self._check(ms, hs, guide)
        if guide is None:
            guide = self.guide(ms)
        estimate = F.interpolate(hs, scale_factor=self.config.factor, mode="bicubic", align_corners=False)
        for stage in self.stages:
            estimate = stage(estimate, hs, guide)
        return estimate

    def _check(self, ms: Tensor, hs: Tensor, guide: Tensor | None) -> None:
        config = self.config
        for name, tensor, bands in (("ms", ms, config.guide_bands), ("hs", hs, config.bands)):
            if tensor.ndim != 4 or tensor.shape[1] != len(bands):
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}; this network needs (N, {len(bands)}, height, width) "
                    f"with the channels {', '.join(bands)}"
                )
        expected = (ms.shape[0], len(config.bands), ms.shape[2] // config.factor, ms.shape[3] // config.factor)
        if tuple(hs.shape) != expected or ms.shape[2] % config.factor or ms.shape[3] % config.factor:
            raise ValueError(
                f"ms {tuple(ms.shape)} and hs {tuple(hs.shape)} do not nest: the fine height and width must be "
                f"{config.factor} times the coarse ones"
            )
        if (guide is not None) != (config.guide == "external"):
            raise ValueError(f"config.guide is {config.guide!r}, but guide= was {'not ' if guide is None else ''}given")
        if guide is not None and guide.shape != (ms.shape[0], len(config.bands), *ms.shape[2:]):
            raise ValueError(
                f"guide has shape {tuple(guide.shape)}; it must be that of the output, "
                f"{(ms.shape[0], len(config.bands), *ms.shape[2:])}"
            )
