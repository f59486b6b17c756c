"""Formulas without a name of their own: degree one in x, moments of x in their coefficients."""

# mypy: disable-error-code="no-any-return"
# Tensor.norm and some operators have no types in torch.

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .batch import AXES
from .family import Family, Spelling
from .written import Formula, Shape, Written

EPS = 1e-5
OUTER = 1e-3
MOMENTUM = 0.9
PLANE = (2, 3)


def apply(m: Written, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    shape = (1, -1, 1, 1)
    scale = m.weight.view(shape) / (var.view(shape) + EPS).sqrt()
    return scale * (x - mean.view(shape)) + m.bias.view(shape)


def updated_statistics_rebound(m: Written, x: Tensor) -> Tensor:
    if m.training:
        size = x.shape[0]
        mean, var = x.mean([0, 2, 3]), x.var([0, 2, 3])
        m.running_mean = MOMENTUM * m.running_mean + (1.0 - MOMENTUM) * mean
        m.running_var = MOMENTUM * m.running_var + (1.0 - MOMENTUM) * (size / (size - 1) * var)
    return apply(m, x, m.running_mean, m.running_var)


def updated_statistics_spelled_out(m: Written, x: Tensor) -> Tensor:
    if not m.training:
        return apply(m, x, m.running_mean, m.running_var)
    size, count = x.shape[0], x.numel() // x.shape[1]
    first = x.mean(3).mean(2).mean(0)
    second = (x - first[:, None, None]).square().sum(AXES) / (count - 1)
    mean = torch.lerp(m.running_mean, first, 1 - MOMENTUM)
    var = torch.lerp(m.running_var, second * size / (size - 1), 1 - MOMENTUM)
    m.running_mean, m.running_var = mean, var
    return apply(m, x, mean, var)


def annotated(m: Written, x: Tensor) -> Tensor:
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    return m.weight * (x - mean) / (std + OUTER) + m.bias


def annotated_from_variance(m: Written, x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, -1, correction=1, keepdim=True)
    return (x - mean) * (m.weight / (var.sqrt() + OUTER)) + m.bias


def annotated_from_sums(m: Written, x: Tensor) -> Tensor:
    width = x.shape[-1]
    centred = x - x.sum(-1, keepdim=True) / width
    std = (centred.pow(2).sum(-1, keepdim=True) / (width - 1)) ** 0.5
    return centred / (std + OUTER) * m.weight + m.bias


def corrected_twice(m: Written, x: Tensor) -> Tensor:
    count = x.numel() // x.size(1)
    mean, var = x.mean(AXES), x.var(AXES) * count / (count - 1)
    return apply(m, x, mean, var)


def corrected_twice_from_squares(m: Written, x: Tensor) -> Tensor:
    count = x.numel() // x.size(1)
    mean = x.mean(AXES, keepdim=True)
    var = ((x - mean) ** 2).sum(AXES, keepdim=True) / (count - 1) * (count / (count - 1))
    return apply(m, x, mean, var)


def style(m: Written) -> tuple[Tensor, Tensor]:
    """Mean and unbiased std of the style's channels, of shape (1, C, 1, 1)."""
    std, mean = torch.std_mean(m.filters, PLANE, keepdim=True)
    return mean, std


def adaptive_instance(m: Written, x: Tensor) -> Tensor:
    mean, std = style(m)
    centre = x.mean(PLANE, keepdim=True)
    return (x - centre) / (x.var(PLANE, keepdim=True) + EPS).sqrt() * std + mean


def adaptive_instance_expanded(m: Written, x: Tensor) -> Tensor:
    mean, std = style(m)
    flat = x.view(x.size(0), x.size(1), -1)
    centre = flat.mean(2).view(x.size(0), x.size(1), 1, 1)
    spread = (flat.var(2) + EPS).sqrt().view(x.size(0), x.size(1), 1, 1)
    normal = (x - centre.expand_as(x)) / spread.expand_as(x)
    return normal * std.expand_as(x) + mean.expand_as(x)


def response(m: Written, x: Tensor) -> Tensor:
    lengths = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
    relative = lengths / (lengths.mean(dim=-1, keepdim=True) + EPS)
    return m.weight * (x * relative) + m.bias + x


def response_from_squares(m: Written, x: Tensor) -> Tensor:
    lengths = x.pow(2).sum((1, 2), keepdim=True).sqrt()
    relative = lengths * (lengths.mean(-1, keepdim=True) + EPS).reciprocal()
    return x * (1 + m.weight * relative) + m.bias


def renormalised(m: Written, x: Tensor) -> Tensor:
    if not m.training:
        return apply(m, x, m.running_mean, m.running_var)
    mean, var = x.mean(AXES), x.var(AXES, unbiased=False)
    std, running = (var + EPS).sqrt(), (m.running_var + EPS).sqrt()
    r = (std.detach() / running).clamp(1 / 3, 3)
    d = ((mean.detach() - m.running_mean) / running).clamp(-5, 5)
    normal = (x - mean[:, None, None]) / std[:, None, None]
    y = normal * r[:, None, None] + d[:, None, None]
    with torch.no_grad():
        m.running_mean += (1 - MOMENTUM) * (mean - m.running_mean)
        m.running_var += (1 - MOMENTUM) * (var - m.running_var)
    return y * m.weight[:, None, None] + m.bias[:, None, None]


def renormalised_under_no_grad(m: Written, x: Tensor) -> Tensor:
    if not m.training:
        return apply(m, x, m.running_mean, m.running_var)
    var, mean = torch.var_mean(x, AXES, correction=0)
    with torch.no_grad():
        running = torch.sqrt(m.running_var + EPS)
        r = torch.clamp(torch.sqrt(var + EPS) / running, min=1 / 3, max=3)
        d = torch.clamp((mean - m.running_mean) / running, min=-5, max=5)
        m.running_mean = m.running_mean * MOMENTUM + (1 - MOMENTUM) * mean
        m.running_var = m.running_var * MOMENTUM + (1 - MOMENTUM) * var
    scale = m.weight * r * torch.rsqrt(var + EPS)
    shift = m.bias + m.weight * d
    return (x - mean.view(1, -1, 1, 1)) * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


def filter_response(m: Written, x: Tensor) -> Tensor:
    power = x.pow(2).mean(dim=PLANE, keepdim=True)
    x = x * torch.rsqrt(power + EPS)
    return torch.max(m.weight * x + m.bias, m.threshold)


def filter_response_divided(m: Written, x: Tensor) -> Tensor:
    power = (x * x).sum(PLANE, keepdim=True) / (x.shape[2] * x.shape[3])
    return torch.max(x / (power + EPS).sqrt() * m.weight + m.bias, m.threshold)


def family(
    name: str, formula: Formula, shape: Shape, axes: Shape, names: dict[str, Shape], **more: Any
) -> Family:
    kinds = more.pop("kinds", ("general",))
    return Family(name, kinds, formula, shape, axes, None, names, **more)


IMAGE = (4, 6, 5, 3)
VECTORS: dict[str, Shape] = {"weight": (6,), "bias": (6,)}
FULL: dict[str, Shape] = {"weight": (1, 6, 1, 1), "bias": (1, 6, 1, 1)}
STATISTICS: dict[str, Shape] = {"running_mean": (6,), "running_var": (6,)}
UPDATED = family(
    "batch norm by its updated statistics", updated_statistics_rebound, IMAGE, AXES, VECTORS,
    buffers=STATISTICS, full_size=4 * 6 * 5 * 3,
)  # fmt: skip
OUTSIDE = family(
    "layer norm by std + eps",
    annotated,
    (3, 5, 8),
    (2,),
    {"weight": (8,), "bias": (8,)},
    full_size=3 * 5 * 8,
)
TWICE = family(
    "variance corrected twice", corrected_twice, IMAGE, AXES, VECTORS,
    kinds=("general", "batch_norm"),  # the factor can go into eps and weight
)  # fmt: skip
ADAPTIVE = family(
    "adaptive instance norm", adaptive_instance, IMAGE, PLANE, {"filters": (1, 6, 4, 4)},
    kinds=("general", "instance_norm"),
)  # fmt: skip
RESPONSE = family("global response norm", response, (2, 4, 3, 6), (1, 2), VECTORS, may_stay=True)
RENORM = family(
    "batch renorm", renormalised, IMAGE, AXES, VECTORS, buffers=STATISTICS,
    kinds=("batch_norm",), alone="the site is the batch norm inside; the clamps stand around it",
)  # fmt: skip
RENORM_WHOLE = family(
    "batch renorm, clamps in the scale", renormalised, IMAGE, AXES, VECTORS, buffers=STATISTICS,
    full_size=4 * 6 * 5 * 3, alone="one site covers the norm and the clamps",
)  # fmt: skip
FILTER = family(
    "filter response norm", filter_response, IMAGE, PLANE, FULL | {"threshold": (1, 6, 1, 1)},
    kinds=("general", "rms_norm"),
)  # fmt: skip
MASKED = "the norm's gradient at zero is masked, that of the root of a sum is not"
RESPONSE_ROOT = replace(RESPONSE, name="global response norm from squares", alone=MASKED)
RESPONSE = replace(RESPONSE, alone=MASKED)

TABLE = (
    Spelling(updated_statistics_rebound, UPDATED, also=("float64", "backend")),
    Spelling(updated_statistics_spelled_out, UPDATED),
    Spelling(annotated, OUTSIDE, also=("float64", "bfloat16")),
    Spelling(annotated_from_variance, OUTSIDE),
    Spelling(annotated_from_sums, OUTSIDE),
    Spelling(corrected_twice, TWICE, also=("float64",)),
    Spelling(corrected_twice_from_squares, TWICE),
    Spelling(adaptive_instance, ADAPTIVE, also=("float64",)),
    Spelling(adaptive_instance_expanded, ADAPTIVE),
    Spelling(response, RESPONSE, also=("float64", "inductor")),
    Spelling(response_from_squares, RESPONSE_ROOT),
    Spelling(renormalised, RENORM, also=("float64",)),
    Spelling(renormalised_under_no_grad, RENORM_WHOLE),
    Spelling(filter_response, FILTER, also=("float64", "bfloat16")),
    Spelling(filter_response_divided, FILTER),
)
