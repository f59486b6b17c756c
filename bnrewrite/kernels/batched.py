"""Batch norm of a tensor whose channels lie dense in memory, on a CPU.

The native operator adds up each channel there in one float32 number: over 100,000 elements the
mean is wrong in the fifth digit. Here it adds up blocks of pixels, whose moments are combined

    M = E[M_i]    V = E[V_i] + E[(M_i - M)^2]

The transform, the backward and what is saved for it are the native operator's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .layout import has_dense_channels, has_values

SHORTEST_SUM = 1024  # elements of a channel; the native operator may add up so many
BLOCKS = 32  # of longer ones, at most: each costs a call


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """Normalise by the moments of the batch; as ``torch.batch_norm`` in training, but accurate.

    Args:
        x: of shape (N, C, H, W) or (N, C, D, H, W).
        weight: of shape (C,), or None for 1.
        bias: of shape (C,), or None for 0.
        running_mean: of shape (C,), updated in place, or None.
        running_var: of shape (C,), updated in place with n / (n - 1) V, or None.
        momentum: the weight of the new moments.
        eps: added to the variance.
    """
    if not _is_long(x):
        return torch.batch_norm(
            x, weight, bias, running_mean, running_var, True, momentum, eps, True
        )
    mean, variance = _moments(x)
    if running_mean is not None and running_var is not None:
        n = x.numel() // x.shape[1]
        running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
        running_var.mul_(1 - momentum).add_(variance, alpha=momentum * n / (n - 1))
    normalised: Tensor = _Normalise.apply(x, weight, bias, mean, variance, eps)  # type: ignore[no-untyped-call]
    return normalised


class _Normalise(torch.autograd.Function):
    """``(x - mean) (variance + eps)^(-1/2) weight + bias``, both moments those of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(variance + eps))
        ctx.eps = eps
        return torch.batch_norm(x, weight, bias, mean, variance, False, 0.0, eps, True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse = ctx.saved_tensors
        needed = list(ctx.needs_input_grad[:3])
        found = torch.ops.aten.native_batch_norm_backward.default(
            gradients[0], x, weight, None, None, mean, inverse, True, ctx.eps, needed
        )
        wanted = (g if n else None for g, n in zip(found, needed, strict=True))
        return (*wanted, None, None, None)


def _is_long(x: Tensor) -> bool:
    """Whether the native operator's sums are too long, and can be cut."""
    if not has_values(x) or forward_ad._current_level >= 0:
        return False
    counted = x.numel() // max(x.shape[1], 1)
    return x.dtype == torch.float32 and counted > SHORTEST_SUM and has_dense_channels(x)


@torch.no_grad()
def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """E[x] and V of each channel."""
    rows = x.movedim(1, -1).reshape(1, -1, 1, x.shape[1]).movedim(-1, 1)
    blocks = torch.split(rows, max(SHORTEST_SUM, -(-rows.shape[2] // BLOCKS)), 2)
    both = [torch.batch_norm_update_stats(block, None, None, 0.0) for block in blocks]
    means, variances = (torch.stack([moments[i] for moments in both]) for i in range(2))
    shares = torch.tensor([[block.shape[2] / rows.shape[2]] for block in blocks])
    mean = (shares * means).sum(0)
    return mean, (shares * (variances + (means - mean).square())).sum(0)
