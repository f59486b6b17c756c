"""Batch norm with derivatives of every order, and with accurate moments.

Where the channels lie dense in memory, the native operator on a CPU adds up each channel in one
float32 number: over 100,000 elements the mean is wrong in the fifth digit. There the variance is
that of blocks

    V = E[V_i] + E[(M_i - M)^2]

and the mean is taken by ``mean``, which adds up pairwise.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .derivatives import Gradients, gradients, records
from .layout import has_dense_channels, has_values

LONGEST_SUM = 1024  # elements of a channel that the native operator adds up
BLOCKS = 32  # of longer ones; each costs a call


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """Normalise by the moments of the batch, as ``torch.batch_norm`` in training.

    Args:
        x: of shape (N, C, ...).
        weight: of shape (C,), or None for 1.
        bias: of shape (C,), or None for 0.
        running_mean: of shape (C,), updated in place, or None.
        running_var: of shape (C,), updated in place with n / (n - 1) V, or None.
        momentum: the weight of the new moments.
        eps: added to the variance.
    """
    running = (running_mean, running_var, momentum)
    if records(x, weight, bias):
        found: Tensor = _BatchNorm.apply(x, weight, bias, running, eps)  # type: ignore[no-untyped-call]
        return found
    if _is_long(x):
        return _normalised(x, weight, bias, running, eps)[0]
    return torch.batch_norm(x, weight, bias, running_mean, running_var, True, momentum, eps, True)


_Running = tuple[Tensor | None, Tensor | None, float]


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running: _Running,
        eps: float,
    ) -> Tensor:
        if _is_long(x):
            y, mean, inverse = _normalised(x, weight, bias, running, eps)
        else:
            y, mean, inverse = torch.native_batch_norm(
                x, weight, bias, *running[:2], True, running[2], eps
            )
        ctx.save_for_backward(x, weight, bias, mean, inverse)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Gradients:
        x, weight, bias, mean, inverse = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        native = partial(
            torch.ops.aten.native_batch_norm_backward.default,
            *(cotangents[0], x, weight, None, None, mean, inverse, True, ctx.eps, list(needed)),
        )
        formula = partial(_formula, eps=ctx.eps)
        return (*gradients(formula, native, (x, weight, bias), needed, cotangents[0]), None, None)


def _formula(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float) -> Tensor:
    over = [0, *range(2, x.dim())]
    along = (-1,) + (1,) * (x.dim() - 2)
    variance, mean = torch.var_mean(x, over, correction=0, keepdim=True)
    y = (x - mean) * torch.rsqrt(variance + eps)
    y = y if weight is None else y * weight.view(along)
    return y if bias is None else y + bias.view(along)


def _is_long(x: Tensor) -> bool:
    """Whether the native operator's sums are too long, and can be cut."""
    if not has_values(x) or x.dtype != torch.float32 or not has_dense_channels(x):
        return False
    return x.numel() // max(x.shape[1], 1) > LONGEST_SUM


@torch.no_grad()
def _normalised(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running: _Running, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm, E[x], and one over the root of V + eps."""
    mean, variance = _moments(x)
    running_mean, running_var, momentum = running
    if running_mean is not None and running_var is not None:
        n = x.numel() // x.shape[1]
        running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
        running_var.mul_(1 - momentum).add_(variance, alpha=momentum * n / (n - 1))
    y = torch.batch_norm(x, weight, bias, mean, variance, False, 0.0, eps, True)
    return y, mean, torch.rsqrt(variance + eps)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """E[x] and V of each channel."""
    rows = x.movedim(1, -1).reshape(-1, x.shape[1])
    mean = rows.mean(0)
    count = rows.shape[0]
    length = max(LONGEST_SUM, -(-count // BLOCKS))
    blocks = torch.split(rows.view(1, count, 1, -1).movedim(-1, 1), length, 2)
    both = [torch.batch_norm_update_stats(block, None, None, 0.0) for block in blocks]
    means, variances = (torch.stack([moments[i] for moments in both]) for i in range(2))
    shares = torch.tensor([[block.shape[2] / count] for block in blocks])
    return mean, (shares * (variances + (means - mean).square())).sum(0)
