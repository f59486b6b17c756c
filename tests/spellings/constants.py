"""Norms whose statistics do not depend on the input: of a weight, or frozen in buffers."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .family import Family, Spelling
from .written import Written

EPS = 1e-5
OUTER = 1e-3
FAN = (1, 2, 3)


def native_standardised(m: Written, x: Tensor) -> Tensor:
    return F.conv2d(x, F.layer_norm(m.filters, m.filters.shape[1:], eps=EPS), m.bias, padding=1)


def standardised(m: Written, x: Tensor) -> Tensor:
    mean = m.filters.mean(dim=FAN, keepdim=True)
    var = m.filters.var(dim=FAN, unbiased=False, keepdim=True)
    return F.conv2d(x, (m.filters - mean) / torch.sqrt(var + EPS), m.bias, padding=1)


def standardised_var_mean(m: Written, x: Tensor) -> Tensor:
    var, mean = torch.var_mean(m.filters, dim=[1, 2, 3], keepdim=True, unbiased=False)
    return F.conv2d(x, (m.filters - mean) * (var + EPS).rsqrt(), m.bias, 1, 1)


def standardised_means_of_means(m: Written, x: Tensor) -> Tensor:
    w = m.filters
    w = w - w.mean(1, keepdim=True).mean(2, keepdim=True).mean(3, keepdim=True)
    var = w.pow(2).view(w.size(0), -1).mean(1).view(-1, 1, 1, 1)
    return F.conv2d(x, w / torch.sqrt(var + EPS).expand_as(w), m.bias, padding=1)


def standardised_rows(m: Written, x: Tensor) -> Tensor:
    rows = m.filters.flatten(1)
    centred = rows - rows.mean(1, keepdim=True)
    rows = centred / (centred.square().mean(1, keepdim=True) + EPS) ** 0.5
    return F.conv2d(x, rows.view_as(m.filters), m.bias, padding=1)


def native_outer(m: Written, x: Tensor) -> Tensor:
    centred = m.filters - m.filters.mean(FAN, keepdim=True)
    return F.conv2d(x, centred / (m.filters.std(FAN, keepdim=True) + OUTER), m.bias, padding=1)


def outer_eps_means_of_means(m: Written, x: Tensor) -> Tensor:
    w = m.filters
    mean = w.mean(dim=1, keepdim=True).mean(dim=2, keepdim=True).mean(dim=3, keepdim=True)
    w = w - mean
    std = w.view(w.size(0), -1).std(dim=1).view(-1, 1, 1, 1) + OUTER
    return F.conv2d(x, w / std.expand_as(w), m.bias, padding=1)


def outer_eps_std_mean(m: Written, x: Tensor) -> Tensor:
    std, mean = torch.std_mean(m.filters, FAN, keepdim=True)
    return F.conv2d(x, (m.filters - mean) * (std + OUTER).reciprocal(), m.bias, padding=1)


def native_scaled(m: Written, x: Tensor) -> Tensor:
    w = F.layer_norm(m.filters, m.filters.shape[1:], eps=EPS)
    return F.conv2d(x, w * m.weight.view(-1, 1, 1, 1), m.bias, padding=1)


def scaled_standardised(m: Written, x: Tensor) -> Tensor:
    var, mean = torch.var_mean(m.filters, FAN, correction=0, keepdim=True)
    scale = torch.rsqrt(var + EPS) * m.weight
    return F.conv2d(x, m.filters * scale - mean * scale, m.bias, padding=1)


def scaled_through_batch_norm(m: Written, x: Tensor) -> Tensor:
    rows = m.filters.reshape(m.filters.shape[0], -1)
    mean = rows.mean(1, keepdim=True)
    rows = (rows - mean) / torch.sqrt((rows * rows).mean(1, keepdim=True) - mean**2 + EPS)
    return F.conv2d(x, (rows * m.weight.view(-1, 1)).reshape(m.filters.shape), m.bias, padding=1)


def native_frozen(m: Written, x: Tensor) -> Tensor:
    return F.batch_norm(x, m.running_mean, m.running_var, m.weight, m.bias, False, 0.0, EPS)


def frozen_scale_and_shift(m: Written, x: Tensor) -> Tensor:
    weight, bias = m.weight.reshape(1, -1, 1, 1), m.bias.reshape(1, -1, 1, 1)
    scale = weight * (m.running_var.reshape(1, -1, 1, 1) + EPS).rsqrt()
    return x * scale + (bias - m.running_mean.reshape(1, -1, 1, 1) * scale)


def frozen_centred(m: Written, x: Tensor) -> Tensor:
    spread = torch.sqrt(m.running_var[:, None, None] + EPS)
    normal = (x - m.running_mean[:, None, None]) / spread
    return normal * m.weight[:, None, None] + m.bias[:, None, None]


def frozen_vectors_first(m: Written, x: Tensor) -> Tensor:
    scale = m.weight / (m.running_var + EPS) ** 0.5
    shift = m.bias - m.running_mean * scale
    return torch.addcmul(shift.view(1, -1, 1, 1), x, scale.view(1, -1, 1, 1))


def frozen_expanded(m: Written, x: Tensor) -> Tensor:
    mean = m.running_mean.view(1, -1, 1, 1).expand_as(x)
    var = m.running_var.view(1, -1, 1, 1).expand_as(x)
    return m.weight * (x - mean) / (var + EPS).sqrt() + m.bias


IMAGE = (4, 6, 5, 3)
FILTERS = {"filters": (4, 6, 3, 3), "bias": (4,)}
STANDARD = ("weight_standardization",)
WEIGHT = Family("weight standardisation", STANDARD, native_standardised, IMAGE, FAN, EPS, FILTERS)
OUTER_WEIGHT = Family(
    "weight standardisation, std + eps", ("weight_standardization", "general"), native_outer,
    IMAGE, FAN, None, FILTERS, full_size=4 * 6 * 3 * 3,
)  # fmt: skip
SCALED_WEIGHT = Family(
    "weight standardisation with a gain", STANDARD, native_scaled, IMAGE, FAN, EPS,
    {"weight": (4,), **FILTERS},
)  # fmt: skip
FROZEN = Family(
    "frozen batch norm", ("affine",), native_frozen, IMAGE, None, None,
    {"weight": (6,), "bias": (6,)}, {"running_mean": (6,), "running_var": (6,)},
)  # fmt: skip
# (x - mean) * scale keeps the digits that x * scale + shift loses, so the two stay two.
FROZEN_CENTRED = replace(FROZEN, name="frozen batch norm, centred first")

TABLE = (
    Spelling(standardised, WEIGHT, also=("float64", "bfloat16", "backend")),
    Spelling(standardised_var_mean, WEIGHT, also=("inductor",)),
    Spelling(standardised_means_of_means, WEIGHT),
    Spelling(standardised_rows, WEIGHT),
    Spelling(outer_eps_means_of_means, OUTER_WEIGHT, also=("float64",)),
    Spelling(outer_eps_std_mean, OUTER_WEIGHT),
    Spelling(scaled_standardised, SCALED_WEIGHT, parameters={"weight": (4, 1, 1, 1)}),
    Spelling(scaled_through_batch_norm, SCALED_WEIGHT, also=("float64",)),
    Spelling(frozen_scale_and_shift, FROZEN, also=("float64", "bfloat16", "backend")),
    Spelling(frozen_centred, FROZEN_CENTRED),
    Spelling(frozen_vectors_first, FROZEN, also=("inductor",)),
    Spelling(frozen_expanded, FROZEN_CENTRED, parameters={"weight": (6, 1, 1), "bias": (6, 1, 1)}),
)
