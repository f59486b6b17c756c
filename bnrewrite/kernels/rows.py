"""Layer norm with derivatives of every order."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .derivatives import Gradients, gradients, records


def layer_norm(
    x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Normalise over the last dimensions, as ``torch.layer_norm``.

    Args:
        x: of shape (..., *shape).
        shape: the extents of the dimensions that are normalised.
        weight: of that shape, or None for 1.
        bias: of that shape, or None for 0.
        eps: added to the variance.
    """
    if not records(x, weight, bias):
        return torch.layer_norm(x, shape, weight, bias, eps, True)
    normalised: Tensor = _LayerNorm.apply(x, weight, bias, shape, eps)  # type: ignore[no-untyped-call]
    return normalised


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        shape: list[int],
        eps: float,
    ) -> Tensor:
        y, mean, inverse = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, inverse)
        ctx.shape, ctx.eps = shape, eps
        return y

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Gradients:
        x, weight, bias, mean, inverse = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        native = partial(
            torch.ops.aten.native_layer_norm_backward.default,
            *(cotangents[0], x, ctx.shape, mean, inverse, weight, bias, list(needed)),
        )
        formula = partial(_formula, dims=len(ctx.shape), eps=ctx.eps)
        return (*gradients(formula, native, (x, weight, bias), needed, cotangents[0]), None, None)


def _formula(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, dims: int, eps: float
) -> Tensor:
    over = list(range(-dims, 0))
    variance, mean = torch.var_mean(x, over, correction=0, keepdim=True)
    y = (x - mean) * torch.rsqrt(variance + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias
