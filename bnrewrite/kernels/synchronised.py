"""The moments of a tensor whose samples are spread over the processes of a group.

With n_i elements, mean M_i and variance V_i per channel on rank i, and N = sum n_i,

    M = sum n_i / N M_i                      V = sum n_i / N (V_i + (M_i - M)^2)

so every element has the same weight, however many a rank has, and E[x^2] - E[x]^2, which cancels,
is never formed. Forward: one all_gather of (n_i, M_i, V_i). Backward: one all_reduce of (dM, dV),
the cotangents of all ranks, and then

    dx = (dM + 2 dV (x - M)) / N

Source: T. Chan, G. Golub, R. LeVeque, "Updating formulae and a pairwise algorithm for computing
sample variances" (1979), equation 2.1.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

c10d = torch.ops._c10d_functional  # what torch.distributed's functional collectives call
NARROW = (torch.float16, torch.bfloat16)


def synchronised_moments(x: Tensor, dims: list[int], group: str) -> tuple[Tensor, Tensor, Tensor]:
    """V and E[x] over dimensions and over all processes, and how many elements each is taken of.

    Every process of the group has to call it, and to call the backward, in the same order. One
    with no elements takes part with n = 0.

    Args:
        x: of any shape; extents of ``dims`` may differ between the processes, the others not.
        dims: what is reduced.
        group: the name of a process group.

    Returns:
        V and E[x] in the dtype of x with reduced dimensions of size 1, and N in float32 or float64.

    Raises:
        ValueError: no process group has this name.
    """
    size = _size_of(group)
    variance, mean, count = _Moments.apply(x, dims, group, size)  # type: ignore[no-untyped-call]
    return variance, mean, count


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dims: list[int], group: str, size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        variance, mean, count = _merged(_gathered(x, dims, group, size))
        shape = [1 if i in dims else extent for i, extent in enumerate(x.shape)]
        mean = mean.reshape(shape).to(x.dtype)
        ctx.save_for_backward(x, mean, count)
        ctx.group = group
        ctx.mark_non_differentiable(count)
        return variance.reshape(shape).to(x.dtype), mean, count

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None, None, None]:
        x, mean, count = ctx.saved_tensors
        wide = _wide(x.dtype)
        both = torch.stack([each.to(wide) for each in cotangents[:2]])
        variance_part, mean_part = _Total.apply(both, ctx.group) / count  # type: ignore[no-untyped-call]
        dx = mean_part.to(x.dtype) + 2 * variance_part.to(x.dtype) * (x - mean)
        return dx, None, None, None


class _Total(torch.autograd.Function):
    """The sum over all processes, of which the derivative is the sum of the cotangents."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: str) -> Tensor:
        ctx.group = group
        total: Tensor = c10d.wait_tensor(c10d.all_reduce(value.contiguous(), "sum", group))
        return total

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None]:
        return _Total.apply(cotangents[0], ctx.group), None  # type: ignore[no-untyped-call]


def _gathered(x: Tensor, dims: list[int], group: str, size: int) -> Tensor:
    """Count, means and variances of each process: of shape (processes, 1 + 3 channels).

    A mean of 4096 has no digit behind the third in single precision, which (M_i - M)^2 would lack:
    what it was rounded by, E[x - M_i], goes along.
    """
    wide = _wide(x.dtype)
    count = math.prod(x.shape[i] for i in dims)
    if isinstance(count, int) and count == 0:  # `var_mean` would warn
        kept = math.prod(extent for i, extent in enumerate(x.shape) if i not in dims)
        own = x.new_zeros(1 + 3 * kept, dtype=wide)
    else:
        values = x.to(wide)
        variance, mean = torch.var_mean(values, dims, correction=0, keepdim=True)
        rest = (values - mean).mean(dims)
        number = torch.full((1,), count, dtype=wide, device=x.device)
        own = torch.cat([number, mean.flatten(), rest.flatten(), variance.flatten()])
    every = c10d.all_gather_into_tensor(own, size, group)
    gathered: Tensor = c10d.wait_tensor(every)
    return gathered.view(size, -1)


def _merged(gathered: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """V, M and N of all; NaN where there is no element at all."""
    counts, statistics = gathered[:, :1], gathered[:, 1:]
    means, rests, variances = statistics.reshape(len(gathered), 3, -1).unbind(1)
    total = counts.sum()
    shares = counts / total
    pivot = means.index_select(0, counts.argmax(0))  # M_i - pivot has the digits that M_i lacks
    offset = torch.where(counts > 0, means - pivot + rests, 0)
    apart = (shares * offset).sum(0)
    spread = torch.where(counts > 0, variances + (offset - apart).square(), 0)
    return (shares * spread).sum(0), (pivot + apart).squeeze(0), total


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in NARROW else dtype


def _size_of(group: str) -> int:
    try:
        found = dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type, attr-defined]
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(
            f"no process group is named {group!r} here; create it before the model is called"
        ) from error
    return int(found.size())
