"""All heads' means as one function of torch with its own gradient: what training uses.

Where it works decides by what: loops compiled for processors, kernels for CUDA devices. Both make the softmax once more
for the gradient, which takes no longer than to keep its weights.
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


class Attend(torch.autograd.Function):
    """The heads' means, ``(N, Q, H, W), (N, C, H, W) -> (N, heads · n_values, H, W)``, float32.

    Each head is four numbers: the first of its channels of ``queries``, the first of its keys among the channels of
    ``z``, how many these are, and the side of its patches. All heads average the first ``n_values`` channels of ``z``.
    """

    @staticmethod
    def forward(queries: Tensor, z: Tensor, heads: NDArray, n_values: int, window_size: int) -> Tensor:
        if queries.is_cuda:
            from .attention_gpu_grad import means
        else:
            from .attention_cpu_grad import means
        return means(queries, z, heads, n_values, window_size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.options = inputs[2:]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *Gradients.apply(gradient, *ctx.saved_tensors, *ctx.options), None, None, None


class Gradients(torch.autograd.Function):
    """The gradients of `Attend` in ``queries`` and ``z``; a function too, for torch's transforms to look into."""

    @staticmethod
    def forward(
        gradient: Tensor, queries: Tensor, z: Tensor, heads: NDArray, n_values: int, window_size: int
    ) -> tuple[Tensor, Tensor]:
        if queries.is_cuda:
            from .attention_gpu_grad import gradients
        else:
            from .attention_cpu_grad import gradients
        return gradients(gradient, queries, z, heads, n_values, window_size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise NotImplementedError("attention has no second derivative in float32: type network.double()")
