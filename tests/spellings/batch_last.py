"""BatchNorm with channels last, or with only a part of the affine."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .batch import AXES, EPS
from .family import Family, Spelling
from .written import Written

LAST = (0, 1, 2)


def native_last(m: Written, x: Tensor) -> Tensor:
    first = x.movedim(-1, 1)
    y = F.batch_norm(first, None, None, m.weight, m.bias, training=True, eps=EPS)
    return y.movedim(1, -1)


def last_mean_and_var(m: Written, x: Tensor) -> Tensor:
    mean = x.mean(LAST)
    var = x.var(LAST, unbiased=False)
    return (x - mean) / torch.sqrt(var + EPS) * m.weight + m.bias


def last_as_rows(m: Written, x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    var, mean = torch.var_mean(rows, 0, correction=0)
    return ((rows - mean) * torch.rsqrt(var + EPS) * m.weight + m.bias).reshape(x.shape)


def last_distributed(m: Written, x: Tensor) -> Tensor:
    mean = x.mean((0, 1, 2), keepdim=True)
    var = (x * x).mean((0, 1, 2), keepdim=True) - mean * mean
    scale = m.weight * (var + EPS).rsqrt()
    return x * scale + (m.bias - mean * scale)


def native_plain(m: Written, x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, training=True, eps=EPS)


def plain(m: Written, x: Tensor) -> Tensor:
    mean = x.mean(AXES, keepdim=True)
    return (x - mean) / torch.sqrt(x.var(AXES, unbiased=False, keepdim=True) + EPS)


def plain_distributed(m: Written, x: Tensor) -> Tensor:
    mean = x.mean(AXES, keepdim=True)
    inverse = ((x - mean).pow(2).mean(AXES, keepdim=True) + EPS).pow(-0.5)
    return x * inverse - mean * inverse


def native_scaled(m: Written, x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, weight=m.weight, training=True, eps=EPS)


def scaled_before(m: Written, x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, AXES, correction=0, keepdim=True)
    return m.weight * (x - mean) / torch.sqrt(var + EPS)


def scaled_statistics(m: Written, x: Tensor) -> Tensor:
    inverse = (x.var(AXES, correction=0) + EPS).rsqrt() * m.weight.flatten()
    return (x - x.mean(AXES)[:, None, None]) * inverse[:, None, None]


CHANNELS_LAST = Family(
    "batch norm, channels last",
    ("batch_norm",),
    native_last,
    shape=(4, 5, 3, 6),
    axes=LAST,
    eps=EPS,
    parameters={"weight": (6,), "bias": (6,)},
)
PLAIN = Family(
    "batch norm, no affine", ("batch_norm",), native_plain, shape=(4, 6, 5, 3), axes=AXES, eps=EPS
)
SCALED = Family(
    "batch norm, weight only",
    ("batch_norm",),
    native_scaled,
    shape=(4, 6, 5, 3),
    axes=AXES,
    eps=EPS,
    parameters={"weight": (6,)},
)

TABLE = (
    Spelling(last_mean_and_var, CHANNELS_LAST, also=("float64",)),
    Spelling(last_as_rows, CHANNELS_LAST),
    Spelling(last_distributed, CHANNELS_LAST),
    Spelling(plain, PLAIN, also=("bfloat16",)),
    Spelling(plain_distributed, PLAIN),
    Spelling(scaled_before, SCALED, parameters={"weight": (1, 6, 1, 1)}),
    Spelling(scaled_statistics, SCALED, parameters={"weight": (6, 1, 1)}),
)
