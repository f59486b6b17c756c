"""BatchNorm of a tensor with four equal sizes: changes of its mean, its variance and its root."""

from __future__ import annotations

from dataclasses import replace

import torch
from spellings import Written
from torch import Tensor

from .recipe import EPS, NearMiss, Recipe, Setting

AXES = (0, 2, 3)
SQUARE = Setting((4, 4, 4, 4), {"weight": (4,), "bias": (4,)})


def mean(x: Tensor) -> Tensor:
    return x.mean(AXES, keepdim=True)


def variance(x: Tensor) -> Tensor:
    return x.var(AXES, unbiased=False, keepdim=True)


BATCH = Recipe(
    mean=mean,
    variance=variance,
    weight=lambda m: m.weight.view(1, -1, 1, 1),
    bias=lambda m: m.bias.view(1, -1, 1, 1),
)


def transposed_statistics(m: Written, x: Tensor) -> Tensor:
    other = x.transpose(0, 1)
    y = (x - mean(other)) / (variance(other) + EPS).sqrt()
    return y * m.weight.view(1, -1, 1, 1) + m.bias.view(1, -1, 1, 1)


def rows_without_a_transpose(m: Written, x: Tensor) -> Tensor:
    rows = x.reshape(x.size(1), -1)
    rows = (rows - rows.mean(1, keepdim=True)) / (rows.var(1, False, True) + EPS).sqrt()
    return rows.view_as(x) * m.weight.view(1, -1, 1, 1) + m.bias.view(1, -1, 1, 1)


def rows_brought_back_untransposed(m: Written, x: Tensor) -> Tensor:
    rows = x.transpose(0, 1).reshape(x.size(1), -1)
    rows = (rows - rows.mean(1, keepdim=True)) / (rows.var(1, False, True) + EPS).sqrt()
    return rows.view_as(x) * m.weight.view(1, -1, 1, 1) + m.bias.view(1, -1, 1, 1)


def variance_from_the_centred_half(m: Written, x: Tensor) -> Tensor:
    centred = x - mean(x)
    var = centred[:, :, :2].square().mean(AXES, keepdim=True)
    return centred / (var + EPS).sqrt() * m.weight.view(1, -1, 1, 1) + m.bias.view(1, -1, 1, 1)


def pairwise_differences(m: Written, x: Tensor) -> Tensor:
    apart = x.unsqueeze(0) - x.unsqueeze(1)
    var = apart.square().mean((0, 1, 3, 4), keepdim=True)[0] / 2
    y = (x - mean(x)) / (var + EPS).sqrt()
    return y * m.weight.view(1, -1, 1, 1) + m.bias.view(1, -1, 1, 1)


def crossed_moments(m: Written, x: Tensor) -> Tensor:
    cross = (x * x.transpose(2, 3)).mean(AXES, keepdim=True) - mean(x).square()
    y = (x - mean(x)) / (cross.abs() + EPS).sqrt()
    return y * m.weight.view(1, -1, 1, 1) + m.bias.view(1, -1, 1, 1)


MEANS = {
    "mean over other axes": lambda x: x.mean((0, 1, 2), keepdim=True),
    "mean over two of the three axes": lambda x: x.mean((0, 2), keepdim=True),
    "mean over all axes": lambda x: x.mean(),
    "mean without keepdim": lambda x: x.mean(AXES),
    "mean viewed along the rows": lambda x: x.mean(AXES).view(1, 1, -1, 1),
    "mean detached": lambda x: mean(x).detach(),
    "mean flipped": lambda x: mean(x).flip(1),
    "mean transposed": lambda x: mean(x).transpose(0, 1),
    "mean of half of the batch": lambda x: mean(x[:2]),
    "mean of a crop": lambda x: mean(x[:, :, 1:, 1:]),
    "mean of every other column": lambda x: mean(x[..., ::2]),
    "mean of another tensor": lambda x: mean(x.relu()),
    "mean of the rolled batch's channels": lambda x: mean(x.roll(1, 1)),
    "mean of one channel for all": lambda x: mean(x[:, :1]),
    "median for the mean": lambda x: x.transpose(0, 1).flatten(1).median(1)[0].view(1, -1, 1, 1),
    "largest for the mean": lambda x: x.amax(AXES, keepdim=True),
    "sum for the mean": lambda x: x.sum(AXES, keepdim=True),
    "divided by the batch size alone": lambda x: x.sum(AXES, keepdim=True) / x.size(0),
    "divided by one less than the count": lambda x: x.sum(AXES, keepdim=True) / 63,
    "positive part of the mean": lambda x: mean(x).relu(),
    "half of the mean": lambda x: 0.5 * mean(x),
    "mean of absolute values": lambda x: mean(x.abs()),
}
VARIANCES = {
    "variance over other axes": lambda x: x.var((0, 1, 2), unbiased=False, keepdim=True),
    "variance over two of the three axes": lambda x: x.var((0, 3), False, keepdim=True),
    "variance without keepdim": lambda x: x.var(AXES, unbiased=False),
    "unbiased variance": lambda x: x.var(AXES, keepdim=True),
    "correction of two": lambda x: x.var(AXES, correction=2, keepdim=True),
    "variance corrected by the batch size": lambda x: variance(x) * (4 / 3),
    "variance detached": lambda x: variance(x).detach(),
    "variance flipped": lambda x: variance(x).flip(1),
    "variance rolled by one channel": lambda x: variance(x).roll(1, 1),
    "variance of another tensor": lambda x: variance(x.relu()),
    "variance of a scaled tensor": lambda x: variance(1.5 * x),
    "variance of a crop": lambda x: variance(x[..., 1:]),
    "variance around another mean": lambda x: (
        (x - x.mean((0, 1, 2), True)).square().mean(AXES, True)
    ),
    "second moment detached": lambda x: x.square().mean(AXES, True).detach() - mean(x).square(),
    "variance around half of the mean": lambda x: (x - mean(x) / 2).square().mean(AXES, True),
    "second moment, not centred": lambda x: x.square().mean(AXES, True),
    "second moment less the mean": lambda x: (x.square().mean(AXES, True) - mean(x)).abs(),
    "second moment plus the squared mean": lambda x: x.square().mean(AXES, True) + mean(x) ** 2,
    "square of the mean deviation": lambda x: (x - mean(x)).abs().mean(AXES, True) ** 2,
    "fourth power for the square": lambda x: (x - mean(x)).pow(4).mean(AXES, True),
    "variance of the channel means": lambda x: x.mean((2, 3), True).var(0, False, True),
    "mean of the samples' variances": lambda x: x.var((2, 3), False, True).mean(0, True),
    "sum of squares without the count": lambda x: (x - mean(x)).square().sum(AXES, True),
}
ROOTS = {
    "eps outside the root": lambda v: v.sqrt() + EPS,
    "eps inside and outside": lambda v: (v + EPS).sqrt() + EPS,
    "eps as a lower limit": lambda v: v.clamp(min=EPS * 100).sqrt(),
    "eps as a lower limit of the root": lambda v: v.sqrt().clamp(min=1.0),
    "eps squared": lambda v: (v + EPS * EPS).sqrt(),
    "eps subtracted": lambda v: (v - EPS).sqrt(),
    "no eps": lambda v: v.sqrt(),
    "eps in proportion": lambda v: (v * (1 + EPS)).sqrt(),
    "no root": lambda v: v + EPS,
    "fourth root": lambda v: (v + EPS) ** 0.25,
    "clamped from above": lambda v: (v.clamp(max=0.5) + EPS).sqrt(),
    "root detached": lambda v: (v + EPS).sqrt().detach(),
    "exponential for the root": lambda v: torch.exp(0.5 * (v + EPS)),
}
WHOLE = {
    "statistics of the transposed tensor": transposed_statistics,
    "rows without a transpose": rows_without_a_transpose,
    "rows brought back untransposed": rows_brought_back_untransposed,
    "variance of half of the centred tensor": variance_from_the_centred_half,
    "pairwise differences within the batch": pairwise_differences,
    "x times its own transpose": crossed_moments,
}

TABLE = (
    *(
        NearMiss(f"batch: {name}", replace(BATCH, mean=part), BATCH, SQUARE)
        for name, part in MEANS.items()
    ),
    *(
        NearMiss(f"batch: {name}", replace(BATCH, variance=part), BATCH, SQUARE)
        for name, part in VARIANCES.items()
    ),
    *(
        NearMiss(f"batch: {name}", replace(BATCH, root=part), BATCH, SQUARE)
        for name, part in ROOTS.items()
    ),
    *(NearMiss(f"batch: {name}", formula, BATCH, SQUARE) for name, formula in WHOLE.items()),
)
