"""Statistics that are packed and taken apart, repeated, of a slice, of a power, or rounded."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import batch
from .family import Family, Spelling
from .written import Written

EPS = 1e-5


def affine(m: Written, x: Tensor, mean: Tensor, square: Tensor) -> Tensor:
    scale = m.weight * torch.rsqrt(square - mean * mean + EPS)
    return x * scale.view(1, -1, 1, 1) + (m.bias - mean * scale).view(1, -1, 1, 1)


def packed_and_split(m: Written, x: Tensor) -> Tensor:
    packed = torch.cat([x.mean([0, 2, 3]), (x * x).mean([0, 2, 3])], dim=0)
    mean, square = torch.split(packed, x.shape[1])
    return affine(m, x, mean, square)


def packed_with_the_count(m: Written, x: Tensor) -> Tensor:
    channels = x.shape[1]
    one = torch.ones([1], dtype=x.dtype)
    packed = torch.cat([x.mean([0, 2, 3]), x.square().mean([0, 2, 3]), one]) * x.shape[0]
    count = packed[-1].detach()
    mean, square, _ = torch.split(packed / count.clamp(min=1), [channels, channels, 1])
    return affine(m, x, mean, square)


def packed_and_chunked(m: Written, x: Tensor) -> Tensor:
    count = x.numel() / x.shape[1]
    mean, square = (torch.cat([x.sum([0, 2, 3]), x.pow(2).sum([0, 2, 3])]) / count).chunk(2)
    return affine(m, x, mean, square)


def packed_and_sliced(m: Written, x: Tensor) -> Tensor:
    packed = torch.cat([x.sum([0, 2, 3]), x.square().sum([0, 2, 3])]) / (x.numel() / x.shape[1])
    return affine(m, x, packed[: x.shape[1]], packed[x.shape[1] :])


def stacked_and_unbound(m: Written, x: Tensor) -> Tensor:
    square, mean = torch.stack([x.square().mean([0, 2, 3]), x.mean([0, 2, 3])]).unbind()
    return affine(m, x, mean, square)


def stacked_last_and_indexed(m: Written, x: Tensor) -> Tensor:
    both = torch.stack([x.mean([0, 2, 3]), x.square().mean([0, 2, 3])], dim=-1)
    return affine(m, x, both[:, 0], both[..., 1])


def native_groups(m: Written, x: Tensor) -> Tensor:
    return F.rms_norm(x.view(*x.shape[:-1], 2, 4), (4,), eps=EPS).flatten(-2) * m.weight


def power_of_groups(x: Tensor) -> Tensor:
    return x.view(*x.shape[:-1], 2, 4).square().mean(-1)


def interleaved(m: Written, x: Tensor) -> Tensor:
    power = power_of_groups(x).repeat_interleave(4, dim=-1)
    return x / torch.sqrt(power + EPS) * m.weight


def interleaved_before_a_view(m: Written, x: Tensor) -> Tensor:
    power = torch.repeat_interleave(power_of_groups(x)[..., None], repeats=4, dim=-1)
    return m.weight * x / torch.sqrt(power.view(x.shape) + EPS)


def expanded_and_flattened(m: Written, x: Tensor) -> Tensor:
    power = power_of_groups(x)[..., None].expand(*x.shape[:-1], 2, 4)
    return x / (power.reshape(x.shape) + EPS).sqrt() * m.weight


def tiled_and_flattened(m: Written, x: Tensor) -> Tensor:
    power = power_of_groups(x).unsqueeze(-1).tile(4)
    return x / torch.sqrt(power.flatten(-2) + EPS) * m.weight


def native_slice(m: Written, x: Tensor) -> Tensor:
    return F.rms_norm(x[..., :4], (4,), m.weight, EPS)


def sliced_twice(m: Written, x: Tensor) -> Tensor:
    power = x[..., :4].pow(2).mean(-1, keepdim=True)
    return x[..., :4] * torch.rsqrt(power + EPS) * m.weight


def sliced_and_split(m: Written, x: Tensor) -> Tensor:
    power = x[..., :4].square().mean(-1, keepdim=True)
    first, _ = torch.split(x, 4, dim=-1)
    return first * torch.rsqrt(power + EPS) * m.weight


def sliced_and_narrowed(m: Written, x: Tensor) -> Tensor:
    power = x[:, :, 0:4].pow(2).mean(-1, keepdim=True)
    return x.narrow(-1, 0, 4) * (power + EPS).rsqrt() * m.weight


def native_cube(m: Written, x: Tensor) -> Tensor:
    return F.rms_norm(x**3, x.shape[-1:], m.weight, EPS)


def cubed(m: Written, x: Tensor) -> Tensor:
    cube = x.pow(3)
    return cube * torch.rsqrt(cube.pow(2).mean(-1, keepdim=True) + EPS) * m.weight


def cubed_twice(m: Written, x: Tensor) -> Tensor:
    power = torch.square(x**3).mean(-1, keepdim=True)
    return x**3 / torch.sqrt(power + EPS) * m.weight


def native_per_group(m: Written, x: Tensor) -> Tensor:
    weight, bias = (p.repeat_interleave(3) for p in (m.weight, m.bias))
    return F.group_norm(x, 2, weight, bias, EPS)


def one_weight_per_group(m: Written, x: Tensor) -> Tensor:
    groups = x.view(x.shape[0], 2, -1)
    mean = groups.mean(-1, keepdim=True)
    var = groups.pow(2).mean(-1, keepdim=True) - mean**2
    normal = (groups - mean) / torch.sqrt(var + EPS)
    return (m.weight.view(1, -1, 1) * normal + m.bias.view(1, -1, 1)).view(x.shape)


def one_weight_repeated(m: Written, x: Tensor) -> Tensor:
    groups = x.reshape(x.shape[0], 2, 3, *x.shape[2:])
    var, mean = torch.var_mean(groups, (2, 3, 4), correction=0, keepdim=True)
    normal = ((groups - mean) * (var + EPS).rsqrt()).flatten(1, 2)
    weight, bias = (p.repeat_interleave(3, 0)[:, None, None] for p in (m.weight, m.bias))
    return normal * weight + bias


def native_double(m: Written, x: Tensor) -> Tensor:
    scale = (m.running_var.double() + EPS).rsqrt().float()
    return (x - m.running_mean[:, None, None]) * scale[:, None, None]


def coefficients_in_double(m: Written, x: Tensor) -> Tensor:
    scale = 1 / torch.sqrt(m.running_var.to(torch.float64) + EPS)
    return (x - m.running_mean.view(-1, 1, 1)) * scale.to(torch.float32).view(-1, 1, 1)


def native_wide(m: Written, x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0, keepdim=True)
    return (x - mean.float()) * torch.rsqrt(var.float() + EPS)


def statistics_in_double(m: Written, x: Tensor) -> Tensor:
    wide = x.to(torch.float64)
    mean = wide.mean((0, 2, 3), keepdim=True)
    var = (wide - mean).square().mean((0, 2, 3), keepdim=True)
    return (x - mean.type_as(x)) / torch.sqrt(var.type_as(x) + EPS)


def native_running(m: Written, x: Tensor) -> Tensor:
    return F.batch_norm(x, m.running_mean, m.running_var, eps=EPS)


def expanded_and_rounded(m: Written, x: Tensor) -> Tensor:
    mean = m.running_mean.double().view(1, -1, 1, 1).expand_as(x)
    var = m.running_var.double().view(1, -1, 1, 1).expand_as(x)
    return (x - mean.type_as(x)) / torch.sqrt(var.type_as(x) + EPS)


IMAGE = (4, 6, 5, 3)
ROWS = (3, 5, 8)
GROUPS = Family(
    "rms norm of groups", ("rms_norm",), native_groups, ROWS, (2,), EPS, {"weight": (8,)}
)
SLICE = Family(
    "rms norm of a slice", ("rms_norm",), native_slice, ROWS, (2,), EPS, {"weight": (4,)}
)
CUBE = Family("rms norm of a cube", ("rms_norm",), native_cube, ROWS, (2,), EPS, {"weight": (8,)})
PER_GROUP = Family(
    "group norm, a weight per group", ("group_norm",), native_per_group, IMAGE, None, EPS,
    {"weight": (2,), "bias": (2,)},
)  # fmt: skip
DOUBLE = Family(
    "frozen norm, its scale in float64", ("affine",), native_double, IMAGE, None, None, {},
    {"running_mean": (6,), "running_var": (6,)}, alone="the rounded scale stays as it is",
)  # fmt: skip
WIDE = Family(
    "batch norm, its statistics in float64", ("general",), native_wide, IMAGE, None, None,
    full_size=4 * 6 * 5 * 3, alone="statistics in float64 stay in float64",
)  # fmt: skip
RUNNING = Family(
    "frozen norm, its statistics rounded", ("affine",), native_running, IMAGE, None, EPS, {},
    {"running_mean": (6,), "running_var": (6,)}, alone="the rounded statistics stay as they are",
)  # fmt: skip

TABLE = (
    Spelling(packed_and_split, batch.NORM, also=("float64", "bfloat16", "inductor")),
    Spelling(packed_with_the_count, batch.NORM, also=("backend",)),
    Spelling(packed_and_chunked, batch.NORM),
    Spelling(packed_and_sliced, batch.NORM),
    Spelling(stacked_and_unbound, batch.NORM, also=("float64",)),
    Spelling(stacked_last_and_indexed, batch.NORM),
    Spelling(interleaved, GROUPS, also=("float64",)),
    Spelling(interleaved_before_a_view, GROUPS),
    Spelling(expanded_and_flattened, GROUPS),
    Spelling(tiled_and_flattened, GROUPS),
    Spelling(sliced_twice, SLICE, also=("backend",)),
    Spelling(sliced_and_split, SLICE),
    Spelling(sliced_and_narrowed, SLICE),
    Spelling(cubed, CUBE, also=("float64",)),
    Spelling(cubed_twice, CUBE),
    Spelling(one_weight_per_group, PER_GROUP, also=("float64",)),
    Spelling(one_weight_repeated, PER_GROUP),
    Spelling(coefficients_in_double, DOUBLE),
    Spelling(expanded_and_rounded, RUNNING),
    Spelling(statistics_in_double, WIDE),
)
