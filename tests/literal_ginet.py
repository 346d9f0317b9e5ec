"""GINet written a second time, literally: the oracle that the package's network is tested against.

Written from the text of the network's specification only, before and without a look at ``xr_ginet.network``. It is
slow by design: every attention head unfolds all patches of all windows (1,800 floats per fine pixel for the mixed
head) and every cluster's MLP runs on every pixel and is masked afterwards. Its ``state_dict`` has the tensor names
of the authors' checkpoints. It knows the hard assignment only and checks no input.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

conv3x3 = functools.partial(nn.Conv2d, kernel_size=3, padding=1)


def prime_factors(factor: int) -> list[int]:
    """Return the primes whose product is `factor`, in increasing order."""
    return next(([q, *prime_factors(factor // q)] for q in range(2, factor + 1) if factor % q == 0), [])


def prime_kernel(prime: int) -> int:
    """Return the kernel size of the up- and downsampling by `prime`."""
    return prime + 1 if prime % 2 == 0 else prime + 2


def pixel_patches(image: Tensor, patch: int) -> Tensor:
    """Return the (N, C*P*P, H, W) patches of an (N, C, H, W) image, zero outside it."""
    return F.unfold(image, patch, padding=patch // 2).unflatten(2, image.shape[2:])


def window_positions(image: Tensor, window: int) -> Tensor:
    """Return the (N, C, W*W, H, W) values in the window of every pixel; a position outside the image is all zero."""
    unfolded = F.unfold(image, window, padding=window // 2)  # (N, C*W*W, H*W)
    return unfolded.unflatten(1, (image.shape[1], window * window)).unflatten(3, image.shape[2:])


def window_of_patches(image: Tensor, patch: int, window: int) -> Tensor:
    """Return the (N, C*P*P, W*W, H, W) patches at the window's positions; outside the image the whole patch is zero."""
    return window_positions(pixel_patches(image, patch), window)


class LiteralHead(nn.Module):
    """One attention head: values from x, logits from patches of z."""

    def __init__(self, value_bands: int, key_bands: int, patch: int, window: int) -> None:
        super().__init__()
        self.patch, self.window = patch, window
        pointwise = {name: nn.Conv2d(key_bands, key_bands, 1, bias=False) for name in ("phi", "theta")}
        self.spatial_weights = nn.ModuleDict(pointwise)
        self.g = nn.Conv2d(value_bands, value_bands, 1, bias=False)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        theta = pixel_patches(self.spatial_weights["theta"](z), self.patch)  # (N, c*P*P, H, W)
        phi = window_of_patches(self.spatial_weights["phi"](z), self.patch, self.window)  # (N, c*P*P, W*W, H, W)
        logits = torch.einsum("nchw,ncjhw->njhw", theta, phi)
        values = window_positions(self.g(x), self.window)  # (N, C, W*W, H, W)
        return torch.einsum("njhw,ncjhw->nchw", logits.softmax(dim=1), values)


class LiteralAttention(nn.Module):
    """The learned affine combination of the geometric, spectral and mixed heads."""

    def __init__(self, bands: int, guide_bands: int, patch: int, window: int) -> None:
        super().__init__()
        self.geometric_head = LiteralHead(bands, guide_bands, patch, window)
        self.spectral_head = LiteralHead(bands, bands, 1, window)
        self.mix_head = LiteralHead(bands, bands + guide_bands, patch, window)
        self.mlp = nn.Linear(3, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        heads = self.geometric_head(x, y), self.spectral_head(x, x), self.mix_head(x, torch.cat([x, y], dim=1))
        return self.mlp(torch.stack(heads, dim=-1)).squeeze(-1)


class LiteralResidualBlock(nn.Module):
    """x -> ReLU(conv2(ReLU(conv1(x))) + x)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(features, features, bias=True)
        self.conv2 = conv3x3(features, features, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))) + x)


class LiteralCorrection(nn.Module):
    """R_k: the correction of the running estimate from the back-projected error and the guide."""

    def __init__(self, bands: int, features: int, blocks: int, window: int, patch: int) -> None:
        super().__init__()
        self.NL_feat_u = conv3x3(bands, 5, bias=False)
        self.NL_feat_pan = conv3x3(bands, 3, bias=False)
        self.Nonlocal = LiteralAttention(5, 3, patch, window)
        self.res_feat_u = conv3x3(bands, features, bias=False)
        self.res_feat_pan = conv3x3(bands, 5, bias=False)
        self.residual = nn.Sequential(*(LiteralResidualBlock(features + 10) for _ in range(blocks)))
        self.res_recon = conv3x3(features + 10, bands, bias=False)

    def forward(self, error: Tensor, guide: Tensor) -> Tensor:
        attention = self.Nonlocal(self.NL_feat_u(error), self.NL_feat_pan(guide))
        x = torch.cat([attention, self.res_feat_u(error), self.res_feat_pan(guide)], dim=1)
        return self.res_recon(self.residual(x))


class LiteralDown(nn.Module):
    """Down_k: per prime a depthwise convolution, at first the identity, then the mean of each block."""

    def __init__(self, bands: int, factor: int) -> None:
        super().__init__()
        self.primes, self.conv_k = prime_factors(factor), nn.ModuleList()
        for k in map(prime_kernel, self.primes):
            conv = nn.Conv2d(bands, bands, k, padding=k // 2, groups=bands, bias=False)
            nn.init.dirac_(conv.weight, groups=bands)
            self.conv_k.append(conv)

    def forward(self, u: Tensor) -> Tensor:
        for q, conv in zip(self.primes, self.conv_k, strict=True):
            n, b, height, width = u.shape
            u = conv(u).reshape(n, b, height // q, q, width // q, q).mean(dim=(3, 5))
        return u


class LiteralUp(nn.Module):
    """Up_k: per prime a depthwise transposed convolution."""

    def __init__(self, bands: int, factor: int) -> None:
        super().__init__()
        self.up = nn.Sequential()
        for q in prime_factors(factor):
            k, b = prime_kernel(q), bands
            self.up.append(nn.ConvTranspose2d(b, b, k, q, padding=k // 2, output_padding=q - 1, groups=b, bias=False))

    def forward(self, error: Tensor) -> Tensor:
        return self.up(error)


class LiteralGuide(nn.Module):
    """One MLP per cluster on each pixel's values, kept where the pixel has the cluster's label."""

    def __init__(self, guide_bands: int, bands: int, features: int, clusters: int) -> None:
        super().__init__()
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(guide_bands, features), nn.ReLU(), nn.Linear(features, bands), nn.ReLU())
            for _ in range(clusters)
        )

    def forward(self, ms: Tensor, probabilities: Tensor) -> Tensor:
        outputs = []
        for c, mlp in enumerate(self.mlps):  # the argmax; on a tie the lowest index wins
            probability = probabilities[:, c : c + 1]
            is_label = (probability > probabilities[:, :c]).all(1, True) & (probability >= probabilities).all(1, True)
            outputs.append(is_label * mlp(ms.movedim(1, -1)).movedim(-1, 1))
        return torch.stack(outputs).sum(dim=0)


class LiteralGINet(nn.Module):
    """The whole network; `plus=False` takes the guide from the caller and leaves the clustering and MLPs unused."""

    def __init__(
        self, bands: int = 6, guide_bands: int = 4, factor: int = 2, stages: int = 6, features: int = 128,
        clusters: int = 5, blocks: int = 3, window: int = 5, patch: int = 3, plus: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.factor, self.plus = factor, plus
        self.clustering_cnn = nn.Sequential(
            conv3x3(guide_bands, 32, bias=True), nn.ReLU(), conv3x3(32, 64, bias=True), nn.ReLU(),
            conv3x3(64, clusters, bias=True), nn.Softmax(dim=1),
        )  # fmt: skip
        self.spectral_inter = LiteralGuide(guide_bands, bands, features, clusters)
        self.downsamp_hs = nn.ModuleList(LiteralDown(bands, factor) for _ in range(stages))
        self.upsamp_hs = nn.ModuleList(LiteralUp(bands, factor) for _ in range(stages))
        self.BPKernel = nn.ModuleList(LiteralCorrection(bands, features, blocks, window, patch) for _ in range(stages))

    def forward(self, ms: Tensor, hs: Tensor, guide: Tensor | None = None) -> Tensor:
        p = self.spectral_inter(ms, self.clustering_cnn(ms)) if self.plus else guide
        u = F.interpolate(hs, scale_factor=self.factor, mode="bicubic", align_corners=False)
        for down, up, correction in zip(self.downsamp_hs, self.upsamp_hs, self.BPKernel, strict=True):
            u = u + correction(up(down(u) - hs), p)
        return u
