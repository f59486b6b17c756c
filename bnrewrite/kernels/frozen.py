"""A norm with stored statistics: ``y = (x - mean) (variance + eps)^(-1/2) weight + bias``.

``batch_norm`` computes it in one pass as ``x a + b``, which is exact to an ulp of ``x a``: digits
that ``x - mean`` keeps are lost where the mean is many standard deviations large. The stored
statistics say whether it is; they are looked at again when they have changed.
"""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .layout import has_values

# |mean| / sqrt(variance + eps) up to which ``x a + b`` is as good as three roundings more.
LARGEST_MEAN = 8.0

_verdicts: MutableMapping[Tensor, tuple[Tensor, Tensor, float, bool]] = WeakIdKeyDictionary()


def frozen_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
) -> Tensor:
    """Normalise by stored statistics, in one pass where that loses no digits.

    Args:
        x: of shape (N, C, ...).
        weight: of shape (C,), or None for 1.
        bias: of shape (C,), or None for 0.
        mean: of C elements; no gradient flows to it.
        variance: of C elements; no gradient flows to it.
        eps: added to the variance.
    """
    small = is_small(mean, variance, eps)
    if mean.dim() != 1 or variance.dim() != 1:
        mean, variance = mean.reshape(-1), variance.reshape(-1)
    if small:
        if torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (x, weight, bias)
        ):  # they may change before the backward, and x may be one that nobody can save
            mean, variance = mean.clone(), variance.clone()
            x = x.clone() if x.is_inference() else x
        return torch.batch_norm(x, weight, bias, mean, variance, False, 0.0, eps, True)
    shape = (-1,) + (1,) * (x.dim() - 2)
    scale = torch.rsqrt(variance + eps)
    scale = (scale if weight is None else scale * weight).view(shape)
    centred = x - mean.view(shape)
    return centred * scale if bias is None else torch.addcmul(bias.view(shape), centred, scale)


def is_small(mean: Tensor, variance: Tensor, eps: float) -> bool:
    """Whether no mean is larger than ``LARGEST_MEAN`` standard deviations.

    NaN and infinite statistics are not small, nor are those without values, that are traced, and
    those on a device that would have to be waited for.
    """
    if not has_values(mean) or mean.device.type != "cpu":
        return False
    known = _verdicts.get(mean)
    if known is not None:
        old_mean, old_variance, old_eps, small = known
        same = torch.equal(mean, old_mean) and torch.equal(variance, old_variance)
        if same and eps == old_eps:
            return small
    with torch.no_grad():
        ratio = mean.abs() * torch.rsqrt(variance + eps)
        small = not mean.numel() or bool(ratio.amax() <= LARGEST_MEAN)
        _verdicts[mean] = (mean.clone(), variance.clone(), eps, small)
    return small
