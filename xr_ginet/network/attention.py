"""Three-head non-local attention over a local window, without unfolding patches.

A head compares the patch around a pixel with the patch around each of its neighbours. The inner product of two
patches is a box sum of the pointwise product of one image with the other one shifted, so a head needs one plane per
window position instead of one per window position, patch position and channel. Nothing here knows about bands.

`attention_cpu` and `attention_gpu` hold the same head compiled for processors and for CUDA: what inference uses there.

References
----------
Pereira-Sánchez et al., arXiv 2508.04729, the multi-head attention module.
"""

from __future__ import annotations

import warnings
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIP_PIXELS = 2**16
"""Pixels that attention works on at once: of 2¹³ to 2¹⁸ the fastest for 512² images on one core."""


def window_offsets(window_size: int) -> list[tuple[int, int]]:
    """Return the ``(dy, dx)`` of each window position, measured from the window's first corner."""
    return [(dy, dx) for dy in range(window_size) for dx in range(window_size)]


def window_logits(theta: Tensor, phi: Tensor, *, window_size: int, patch_size: int) -> Tensor:
    """Return the inner product of each pixel's θ-patch with the φ-patches of its window.

    Parameters
    ----------
    theta, phi : (N, C, H, W)
        Embeddings; both count as zero outside the image.
    window_size, patch_size : int
        Odd widths in pixels.

    Returns
    -------
    (N, window_size², H, W)
        Window positions in row-major order; 0 where the position lies outside the image, even if a part of the patch
        around it would lie inside.
    """
    height, width = theta.shape[-2:]
    radius = window_size // 2
    padded = F.pad(phi, (radius,) * 4)
    # One product plane per window position: (N, W², H, W).
    logits = torch.stack(
        [(theta * padded[..., dy : dy + height, dx : dx + width]).sum(1) for dy, dx in window_offsets(window_size)],
        dim=1,
    )
    if patch_size > 1:
        logits = box_sum(logits, patch_size)
        rows, columns = (_inside(n, window_size, like=logits) for n in (height, width))
        grid = logits.unflatten(1, (window_size, window_size))  # (N, W, W, H, W), the same memory
        grid.mul_(rows[:, None, :, None]).mul_(columns[:, None, :])
    return logits


def box_sum(planes: Tensor, size: int) -> Tensor:
    """Return the sum over each pixel's ``size × size`` neighbours, zero outside: ``(…, H, W) -> (…, H, W)``.

    By rows, then by columns: twice ``size`` sums per pixel, where pooling takes its square.
    """
    height, width = planes.shape[-2:]
    padded = F.pad(planes, (size // 2,) * 4)
    rows = padded[..., :width] + padded[..., 1 : width + 1]
    for x in range(2, size):
        rows += padded[..., x : width + x]
    total = rows[..., :height, :] + rows[..., 1 : height + 1, :]
    for y in range(2, size):
        total += rows[..., y : height + y, :]
    return total


def window_sum(weights: Tensor, values: Tensor, *, window_size: int) -> Tensor:
    """Return the weighted sum over each pixel's window.

    ``weights (N, window_size², H, W)``, ``values (N, C, H, W)`` -> ``(N, C, H, W)``. Values outside the image are zero.
    """
    height, width = values.shape[-2:]
    radius = window_size // 2
    padded = F.pad(values, (radius,) * 4)
    total = torch.zeros_like(values)
    for position, (dy, dx) in enumerate(window_offsets(window_size)):
        total.addcmul_(weights[:, position : position + 1], padded[..., dy : dy + height, dx : dx + width])
    return total


def _inside(size: int, window_size: int, *, like: Tensor) -> Tensor:
    """Return 1 where a window position along one axis lies inside the image, else 0: ``(window_size, size)``."""
    ones = F.pad(like.new_ones(size), (window_size // 2,) * 2)
    return torch.stack([ones[start : start + size] for start in range(window_size)])


class Head(nn.Module):
    """One attention head: values from ``x``, weights from ``z``."""

    def __init__(self, value_channels: int, key_channels: int, *, window_size: int, patch_size: int) -> None:
        super().__init__()
        self.window_size, self.patch_size = window_size, patch_size
        self.theta = nn.Conv2d(key_channels, key_channels, 1, bias=False)
        self.phi = nn.Conv2d(key_channels, key_channels, 1, bias=False)
        self.value = nn.Conv2d(value_channels, value_channels, 1, bias=False)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:  # (N, Cx, H, W), (N, Cz, H, W) -> (N, Cx, H, W)
        if x.is_cuda:
            return self.at_once(x, z)
        logits = window_logits(self.theta(z), self.phi(z), window_size=self.window_size, patch_size=self.patch_size)
        # The softmax, in place: its denominator divides the few planes of the sum instead of the many of the weights.
        weights = logits.sub_(logits.detach().amax(1, keepdim=True)).exp_()
        return window_sum(weights, self.value(x), window_size=self.window_size) / weights.sum(1, keepdim=True)

    def at_once(self, x: Tensor, z: Tensor) -> Tensor:
        """Return the output by a few operations on all window positions: on GPUs each launch of one takes time."""

        def window(image: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C, window_size², H, W)
            unfolded = F.unfold(image, self.window_size, padding=self.window_size // 2)
            return unfolded.unflatten(1, (image.shape[1], -1)).unflatten(-1, image.shape[2:])

        logits = (self.theta(z)[:, :, None] * window(self.phi(z))).sum(1)
        if self.patch_size > 1:
            logits = F.avg_pool2d(logits, self.patch_size, 1, self.patch_size // 2, divisor_override=1)
            logits = logits * window(x.new_ones(1, 1, *x.shape[2:]))[:, 0]
        return (logits.softmax(1)[:, None] * window(self.value(x))).sum(2)

    @property
    def metric(self) -> Tensor:
        """Return ``ΦᵀΘ``: with ``⟨Θz, Φz'⟩ = ⟨ΦᵀΘz, z'⟩`` the keys are ``z`` itself."""
        return self.phi.weight[:, :, 0, 0].T @ self.theta.weight[:, :, 0, 0]

    def add_compiled(self, out: Tensor, x: Tensor, z: Tensor, *, values: Tensor, margin: int) -> None:
        """Add ``values`` of the head's mean of ``x``, by the form for processors, of images within ``margin`` zeros."""
        from .attention_cpu import attend

        attend(
            out.numpy(),
            z.numpy(),
            x.numpy(),
            self.metric.numpy(),
            values.numpy(),
            margin=margin,
            window_size=self.window_size,
            patch_size=self.patch_size,
            threads=torch.get_num_threads(),
        )


def may_compile(x: Tensor) -> bool:
    """Return whether the compiled form can take the place of the torch form: it has no gradient, and one precision."""
    return (
        x.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and (x.device.type == "cpu" or (x.device.type == "cuda" and triton_works()))
    )


@lru_cache(maxsize=1)
def triton_works() -> bool:
    """Return whether kernels can be made here: besides Triton that takes a C compiler."""
    try:
        pixel = torch.ones((1, 1, 1, 1), dtype=torch.float32, device="cuda")
        WindowAttention(1, 1, window_size=1, patch_size=1).to(pixel)._compiled(pixel, pixel)
    except (ImportError, RuntimeError) as error:
        warnings.warn(f"attention runs in torch, which takes longer: {str(error).splitlines()[0]}", stacklevel=2)
        return False
    return True


class WindowAttention(nn.Module):
    """A learned affine combination of a geometric, a spectral and a mixed head.

    The geometric head weighs by patches of ``y``, the spectral one by single pixels of ``x``, the mixed one by patches
    of both; all three average ``x``.
    """

    def __init__(self, x_channels: int, y_channels: int, *, window_size: int, patch_size: int) -> None:
        super().__init__()
        self.geometric = Head(x_channels, y_channels, window_size=window_size, patch_size=patch_size)
        self.spectral = Head(x_channels, x_channels, window_size=window_size, patch_size=1)
        self.mixed = Head(x_channels, x_channels + y_channels, window_size=window_size, patch_size=patch_size)
        self.combine = nn.Linear(3, 1)
        self.window_size, self.patch_size = window_size, patch_size
        self.reach = window_size // 2 + patch_size // 2

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # (N, Cx, H, W), (N, Cy, H, W) -> (N, Cx, H, W)
        if may_compile(x):
            return self._compiled(x, y)
        attend = self._with_gradient if self._may_compile_gradient(x) else self._attend
        # Strip by strip: the window's planes of one strip stay in the cache, and their memory does not grow with the
        # image.
        height = x.shape[-2]
        pixels = STRIP_PIXELS if x.device.type == "cpu" else 16 * STRIP_PIXELS
        rows = max(1, pixels // (x.shape[0] * x.shape[-1]))
        reach = self.reach
        strips = []
        for start in range(0, height, rows):
            stop = min(start + rows, height)
            first, last = max(start - reach, 0), min(stop + reach, height)
            strip = attend(x[..., first:last, :], y[..., first:last, :])
            strips.append(strip[..., start - first : stop - first, :])
        return torch.cat(strips, dim=-2) if len(strips) > 1 else strips[0]

    def _attend(self, x: Tensor, y: Tensor) -> Tensor:
        heads = self.geometric(x, y), self.spectral(x, x), self.mixed(x, torch.cat([x, y], dim=1))
        return self._combine(*heads)

    def _may_compile_gradient(self, x: Tensor) -> bool:
        """Return whether the compiled form with a gradient can take the place of the torch form."""
        return (
            (x.device.type == "cpu" or (x.device.type == "cuda" and triton_works()))
            and self.combine.weight.dtype == torch.float32
            and torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
        )

    def _with_gradient(self, x: Tensor, y: Tensor) -> Tensor:
        from .attention_grad import Attend

        n, m, patch = x.shape[1], x.shape[1] + y.shape[1], self.patch_size
        heads = np.array([(0, n, m - n, patch), (m - n, 0, n, 1), (m, 0, m, patch)])
        with torch.autocast(x.device.type, enabled=False):
            z = torch.cat([x, y], dim=1).float()
            metrics, values, bias = self.folded()
            queries = (metrics @ z.flatten(2)).unflatten(2, z.shape[2:])
            means = Attend.apply(queries, z, heads, n, self.window_size)
            out = values.transpose(0, 1).flatten(1) @ means.flatten(2) + bias
        return out.unflatten(2, x.shape[2:]).to(x.dtype)

    def _compiled(self, x: Tensor, y: Tensor) -> Tensor:
        margin = self.reach
        z = F.pad(torch.cat([x, y], dim=1), (margin,) * 4)
        if z.is_cuda:
            return self._on_gpu(z, margin)
        _, of_heads, bias = self.folded()
        out = bias.expand_as(x).contiguous()
        x, y = z[:, : x.shape[1]], z[:, x.shape[1] :]
        heads = (self.geometric, y), (self.spectral, x), (self.mixed, z)
        for (head, embedding), values in zip(heads, of_heads, strict=True):
            head.add_compiled(out, x, embedding, values=values, margin=margin)
        return out

    def _on_gpu(self, z: Tensor, margin: int) -> Tensor:
        from .attention_gpu import attend

        metrics, values, bias = self.folded()
        queries = (metrics @ z.flatten(2)).unflatten(2, z.shape[2:])
        return attend(queries, z, values, bias, margin=margin, window_size=self.window_size, patch_size=self.patch_size)

    def folded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return what takes ``z = [x, y]`` to the heads' queries, their means of ``x`` to the output, and its bias."""
        heads = self.geometric, self.spectral, self.mixed
        x, y = (head.theta.in_channels for head in (self.spectral, self.geometric))
        metrics = [F.pad(self.geometric.metric, (x, 0)), F.pad(self.spectral.metric, (0, y)), self.mixed.metric]
        values = torch.stack([head.value.weight[:, :, 0, 0] for head in heads])
        return torch.cat(metrics), self.combine.weight[0, :, None, None] * values, self.combine.bias

    def _combine(self, geometric: Tensor, spectral: Tensor, mixed: Tensor) -> Tensor:
        a, b, c = self.combine.weight[0].unbind()
        return a * geometric + self.combine.bias + b * spectral + c * mixed
