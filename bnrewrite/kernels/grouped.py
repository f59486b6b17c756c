"""Group norm of a tensor whose channels lie dense in memory, on a CPU.

The native operator takes the variance there as ``E[x^2] - E[x]^2``, which loses the digits that the
two share: at a mean of 30 standard deviations it is wrong in the third. ``x - c`` with any number c
of each group has the same norm and the same gradient; where the mean is large, c is the mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import dense_format, has_values

# |mean| / standard deviation up to which a difference of squares is as good as a few roundings.
LARGEST_MEAN = 2.0
LARGEST_STEP = 8  # of the sample's rows and columns
FEWEST = 4  # rows and columns of a sample where a group is one to three channels; else half of it
SMALL = 32768  # elements, up to which two copies cost less than the sample


def group_norm(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Normalise groups of channels; as ``torch.group_norm``, accurate where the mean is large.

    Args:
        x: of shape (N, C, H, W) or (N, C, D, H, W).
        groups: how many groups the C channels make.
        weight: of shape (C,), or None for 1.
        bias: of shape (C,), or None for 0.
        eps: added to the variance.
    """
    if has_values(x) and x.numel() <= SMALL:
        y = torch.group_norm(x.contiguous(), groups, weight, bias, eps, True)
        return y.contiguous(memory_format=dense_format(x))
    if not _is_centred(x, groups):
        x = x - _means(x, groups)
    return torch.group_norm(x, groups, weight, bias, eps, True)


def _is_centred(x: Tensor, groups: int) -> bool:
    """Whether no group's mean is large beside its standard deviation.

    A sample of at least one element in 64 tells: were the rest elsewhere, its distance would be in
    the variance of the whole.
    """
    if not has_values(x):
        return False
    with torch.no_grad():
        fewest = FEWEST if x.shape[1] // groups < FEWEST else FEWEST // 2
        rows, columns = (max(1, min(LARGEST_STEP, size // fewest)) for size in x.shape[-2:])
        sample = x[..., rows // 2 :: rows, columns // 2 :: columns]
        sample = sample.to(torch.promote_types(x.dtype, torch.float32))  # 300^2 is inf in float16
        mean, square = (_by_group(each, groups) for each in (sample, sample * sample))
        limit = LARGEST_MEAN**2 / (1 + LARGEST_MEAN**2)
        return bool((mean * mean <= square * limit).all())


def _by_group(x: Tensor, groups: int) -> Tensor:
    """The mean of each group, of shape (N, groups)."""
    return x.mean(list(range(2, x.dim()))).view(x.shape[0], groups, -1).mean(2)


@torch.no_grad()
def _means(x: Tensor, groups: int) -> Tensor:
    """The mean of each group, to be subtracted from its channels."""
    means = _by_group(x, groups).repeat_interleave(x.shape[1] // groups, 1)
    return means.reshape(*means.shape, *[1] * (x.dim() - 2))
