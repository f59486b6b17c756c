"""BatchNorm with running statistics: how the buffers can be updated."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .batch import AXES, EPS
from .family import Family, Spelling
from .written import Written

MOMENTUM = 0.1
KEEP = 0.9


def native(m: Written, x: Tensor) -> Tensor:
    return F.batch_norm(
        x, m.running_mean, m.running_var, m.weight, m.bias, m.training, MOMENTUM, EPS
    )


def affine(m: Written, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    mean, var = mean.reshape(1, -1, 1, 1), var.reshape(1, -1, 1, 1)
    normal = (x - mean) / torch.sqrt(var + EPS)
    return normal * m.weight.view(1, -1, 1, 1) + m.bias.view(1, -1, 1, 1)


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, the variance that normalises, and the unbiased one that is remembered."""
    return x.mean(AXES), x.var(AXES, unbiased=False), x.var(AXES, unbiased=True)


def rebound_without_detach(m: Written, x: Tensor) -> Tensor:
    if not m.training:
        return affine(m, x, m.running_mean, m.running_var)
    mean, var, unbiased = batch_statistics(x)
    m.running_mean = KEEP * m.running_mean + MOMENTUM * mean
    m.running_var = KEEP * m.running_var + MOMENTUM * unbiased
    return affine(m, x, mean, var)


def rebound_with_detach(m: Written, x: Tensor) -> Tensor:
    if not m.training:
        return affine(m, x, m.running_mean, m.running_var)
    mean, var, unbiased = batch_statistics(x)
    m.running_mean = (1 - MOMENTUM) * m.running_mean + MOMENTUM * mean.detach()
    m.running_var = (1 - MOMENTUM) * m.running_var + MOMENTUM * unbiased.detach()
    return affine(m, x, mean, var)


def rebound_under_no_grad(m: Written, x: Tensor) -> Tensor:
    if m.training:
        count = x.numel() / x.size(1)
        mean, var = x.mean(AXES), x.var(AXES, unbiased=False)
        with torch.no_grad():
            m.running_mean = MOMENTUM * mean + (1 - MOMENTUM) * m.running_mean
            m.running_var = MOMENTUM * var * count / (count - 1) + KEEP * m.running_var
    else:
        mean, var = m.running_mean, m.running_var
    return affine(m, x, mean, var)


def copied_under_no_grad(m: Written, x: Tensor) -> Tensor:
    if not m.training:
        return affine(m, x, m.running_mean, m.running_var)
    mean, var, unbiased = batch_statistics(x)
    with torch.no_grad():
        m.running_mean.copy_(KEEP * m.running_mean + MOMENTUM * mean)
        m.running_var.copy_(KEEP * m.running_var + MOMENTUM * unbiased)
    return affine(m, x, mean, var)


def multiplied_and_added(m: Written, x: Tensor) -> Tensor:
    if not m.training:
        return affine(m, x, m.running_mean, m.running_var)
    mean, var, unbiased = batch_statistics(x)
    with torch.no_grad():
        m.running_mean.mul_(KEEP).add_(mean, alpha=MOMENTUM)
        m.running_var.mul_(KEEP).add_(unbiased, alpha=MOMENTUM)
    return affine(m, x, mean, var)


def multiplied_and_added_detached(m: Written, x: Tensor) -> Tensor:
    if not m.training:
        return affine(m, x, m.running_mean, m.running_var)
    mean, var, unbiased = batch_statistics(x)
    m.running_mean.mul_(1 - MOMENTUM).add_(MOMENTUM * mean.detach())
    m.running_var.mul_(1 - MOMENTUM).add_(MOMENTUM * unbiased.detach())
    return affine(m, x, mean, var)


def multiplied_and_added_leaking(m: Written, x: Tensor) -> Tensor:
    if not m.training:
        return affine(m, x, m.running_mean, m.running_var)
    mean, var, unbiased = batch_statistics(x)
    m.running_mean.mul_(KEEP).add_(mean * MOMENTUM)
    m.running_var.mul_(KEEP).add_(unbiased * MOMENTUM)
    return affine(m, x, mean, var)


def lerped_in_place(m: Written, x: Tensor) -> Tensor:
    if not m.training:
        return affine(m, x, m.running_mean, m.running_var)
    mean, var, unbiased = batch_statistics(x)
    m.running_mean.lerp_(mean.detach(), MOMENTUM)
    m.running_var.lerp_(unbiased.detach(), MOMENTUM)
    return affine(m, x, mean, var)


def lerped_and_rebound(m: Written, x: Tensor) -> Tensor:
    if not m.training:
        return affine(m, x, m.running_mean, m.running_var)
    mean, var, unbiased = batch_statistics(x)
    m.running_mean = torch.lerp(m.running_mean, mean, MOMENTUM).detach()
    m.running_var = torch.lerp(m.running_var, unbiased, MOMENTUM).detach()
    return affine(m, x, mean, var)


def through_data(m: Written, x: Tensor) -> Tensor:
    if not m.training:
        return affine(m, x, m.running_mean, m.running_var)
    mean, var, unbiased = batch_statistics(x)
    m.running_mean.data.mul_(KEEP).add_(mean.data, alpha=MOMENTUM)
    m.running_var.data.copy_(m.running_var.data * KEEP + unbiased.data * MOMENTUM)
    return affine(m, x, mean, var)


def moved_towards(m: Written, x: Tensor) -> Tensor:
    if not m.training:
        return affine(m, x, m.running_mean, m.running_var)
    mean, var, unbiased = batch_statistics(x)
    with torch.no_grad():
        m.running_mean += MOMENTUM * (mean - m.running_mean)
        m.running_var -= (m.running_var - unbiased) * MOMENTUM
    return affine(m, x, mean, var)


def statistics_under_no_grad(m: Written, x: Tensor) -> Tensor:
    if not m.training:
        return affine(m, x, m.running_mean, m.running_var)
    with torch.no_grad():
        unbiased, mean = torch.var_mean(x, AXES)
        m.running_mean.mul_(KEEP).add_(mean, alpha=MOMENTUM)
        m.running_var.mul_(KEEP).add_(unbiased, alpha=MOMENTUM)
    return affine(m, x, x.mean(AXES), x.var(AXES, correction=0))


def updated_after_the_output(m: Written, x: Tensor) -> Tensor:
    if not m.training:
        return affine(m, x, m.running_mean, m.running_var)
    mean = x.mean(AXES)
    var = (x - mean[:, None, None]).square().mean(AXES)
    y = affine(m, x, mean, var)
    count = x.numel() // x.size(1)
    m.running_mean.copy_(MOMENTUM * mean.detach() + KEEP * m.running_mean)
    m.running_var.copy_(MOMENTUM * var.detach() * count / (count - 1) + KEEP * m.running_var)
    return y


def full_shape_buffers(m: Written, x: Tensor) -> Tensor:
    if m.training:
        var, mean = torch.var_mean(x, AXES, correction=0, keepdim=True)
        count = x.numel() // x.size(1)
        m.running_mean = KEEP * m.running_mean + MOMENTUM * mean
        m.running_var = KEEP * m.running_var + MOMENTUM * var * (count / (count - 1))
    else:
        mean, var = m.running_mean, m.running_var
    return m.weight * (x - mean) * torch.rsqrt(var + EPS) + m.bias


def native_biased(m: Written, x: Tensor) -> Tensor:
    if m.training:
        with torch.no_grad():
            var, mean = torch.var_mean(x, AXES, correction=0)
            m.running_mean.lerp_(mean, MOMENTUM)
            m.running_var.lerp_(var, MOMENTUM)
        return F.batch_norm(x, None, None, m.weight, m.bias, True, eps=EPS)
    return native(m, x)


def biased_variance_remembered(m: Written, x: Tensor) -> Tensor:
    if m.training:
        mean, var = x.mean(AXES), x.var(AXES, unbiased=False)
        m.running_mean = KEEP * m.running_mean + MOMENTUM * mean
        m.running_var = KEEP * m.running_var + MOMENTUM * var
    else:
        mean, var = m.running_mean, m.running_var
    return affine(m, x, mean, var)


def biased_variance_in_place(m: Written, x: Tensor) -> Tensor:
    if m.training:
        var, mean = torch.var_mean(x, AXES, correction=0, keepdim=True)
        with torch.no_grad():
            m.running_mean.mul_(KEEP).add_(MOMENTUM * mean)
            m.running_var.mul_(KEEP).add_(MOMENTUM * var)
    else:
        mean, var = m.running_mean, m.running_var
    return (x - mean) / (var + EPS).sqrt() * m.weight[:, None, None] + m.bias[:, None, None]


def native_counted(m: Written, x: Tensor) -> Tensor:
    if m.training:
        m.num_batches_tracked.add_(1)
    return native(m, x)


def counted_in_place(m: Written, x: Tensor) -> Tensor:
    if m.training:
        m.num_batches_tracked += 1
    return multiplied_and_added(m, x)


def counted_and_rebound(m: Written, x: Tensor) -> Tensor:
    if m.training:
        m.num_batches_tracked = m.num_batches_tracked + 1
    return rebound_without_detach(m, x)


def native_cumulative(m: Written, x: Tensor) -> Tensor:
    if not m.training:
        return native(m, x)
    with torch.no_grad():
        m.num_batches_tracked.add_(1)
        share = 1.0 / m.num_batches_tracked
        var, mean = torch.var_mean(x, AXES, correction=1)
        m.running_mean.copy_(m.running_mean + share * (mean - m.running_mean))
        m.running_var.copy_(m.running_var + share * (var - m.running_var))
    return F.batch_norm(x, None, None, m.weight, m.bias, True, eps=EPS)


def cumulative_average(m: Written, x: Tensor) -> Tensor:
    if not m.training:
        return affine(m, x, m.running_mean, m.running_var)
    mean, var, unbiased = batch_statistics(x)
    with torch.no_grad():
        m.num_batches_tracked += 1
        share = 1.0 / m.num_batches_tracked
        m.running_mean = share * mean + (1 - share) * m.running_mean
        m.running_var = share * unbiased + (1 - share) * m.running_var
    return affine(m, x, mean, var)


def cumulative_lerp(m: Written, x: Tensor) -> Tensor:
    if not m.training:
        return affine(m, x, m.running_mean, m.running_var)
    mean, var, unbiased = batch_statistics(x)
    m.num_batches_tracked.add_(1)
    share = m.num_batches_tracked.to(x.dtype).reciprocal()
    m.running_mean.add_(share * (mean.detach() - m.running_mean))
    m.running_var.add_(share * (unbiased.detach() - m.running_var))
    return affine(m, x, mean, var)


def family(name: str, formula: Any, counter: bool = False) -> Family:
    return Family(
        name,
        ("batch_norm",),
        formula,
        shape=(4, 6, 5, 3),
        axes=AXES,
        eps=EPS,
        parameters={"weight": (6,), "bias": (6,)},
        buffers={"running_mean": (6,), "running_var": (6,)}
        | ({"num_batches_tracked": ()} if counter else {}),
    )


RUNNING = family("batch norm with running statistics", native)
BIASED = family("batch norm that remembers the biased variance", native_biased)
COUNTED = family("batch norm that counts its batches", native_counted, counter=True)
CUMULATIVE = family("batch norm with cumulative averages", native_cumulative, counter=True)
FULL = {"running_mean": (1, 6, 1, 1), "running_var": (1, 6, 1, 1)}
FULL_AFFINE = {"weight": (1, 6, 1, 1), "bias": (1, 6, 1, 1)}

TABLE = (
    Spelling(rebound_without_detach, RUNNING, also=("float64", "backend")),
    Spelling(rebound_with_detach, RUNNING, also=("bfloat16",)),
    Spelling(rebound_under_no_grad, RUNNING),
    Spelling(copied_under_no_grad, RUNNING, also=("float64",)),
    Spelling(multiplied_and_added, RUNNING, also=("inductor", "backend", "float16")),
    Spelling(multiplied_and_added_detached, RUNNING),
    Spelling(multiplied_and_added_leaking, RUNNING),
    Spelling(lerped_in_place, RUNNING, also=("float64",)),
    Spelling(lerped_and_rebound, RUNNING),
    Spelling(through_data, RUNNING),
    Spelling(moved_towards, RUNNING),
    Spelling(statistics_under_no_grad, RUNNING),
    Spelling(updated_after_the_output, RUNNING),
    Spelling(full_shape_buffers, RUNNING, parameters=FULL_AFFINE, buffers=FULL, also=("inductor",)),
    Spelling(biased_variance_remembered, BIASED, also=("float64",)),
    Spelling(biased_variance_in_place, BIASED, buffers=FULL),
    Spelling(counted_in_place, COUNTED, also=("backend",)),
    Spelling(counted_and_rebound, COUNTED),
    Spelling(cumulative_average, CUMULATIVE, also=("float64",)),
    Spelling(cumulative_lerp, CUMULATIVE),
)
