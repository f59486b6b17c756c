"""InstanceNorm and GroupNorm: statistics of each sample's channels, alone or in groups."""

# mypy: disable-error-code="no-any-return"
# Tensor.norm and some operators have no types in torch.

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .family import Family, Spelling
from .written import Written

EPS = 1e-5
PLANE = (2, 3)
GROUPS = 3


def native_instance(m: Written, x: Tensor) -> Tensor:
    return F.instance_norm(x, weight=m.weight, bias=m.bias, eps=EPS)


def instance_mean_and_var(m: Written, x: Tensor) -> Tensor:
    mean = x.mean(PLANE, keepdim=True)
    var = x.var(PLANE, unbiased=False, keepdim=True)
    return (x - mean) / torch.sqrt(var + EPS) * m.weight + m.bias


def instance_flattened(m: Written, x: Tensor) -> Tensor:
    flat = x.view(x.size(0), x.size(1), -1)
    var, mean = torch.var_mean(flat, -1, correction=0, keepdim=True)
    flat = (flat - mean) * torch.rsqrt(var + EPS)
    return flat.view_as(x) * m.weight[:, None, None] + m.bias[:, None, None]


def instance_rows(m: Written, x: Tensor) -> Tensor:
    rows = x.reshape(x.shape[0] * x.shape[1], -1)
    rows = rows - rows.mean(1, keepdim=True)
    rows = rows / (rows.pow(2).mean(1, keepdim=True) + EPS).sqrt()
    return rows.reshape(x.shape) * m.weight.view(1, -1, 1, 1) + m.bias.view(1, -1, 1, 1)


def instance_one_axis_at_a_time(m: Written, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True).mean(-2, keepdim=True)
    var = (x * x).mean(-1, keepdim=True).mean(-2, keepdim=True) - mean**2
    scale = m.weight * torch.rsqrt(var + EPS)
    return x * scale + (m.bias - mean * scale)


def instance_sums(m: Written, x: Tensor) -> Tensor:
    area = x.shape[2] * x.shape[3]
    mean = x.sum(PLANE)[:, :, None, None] / area
    var = torch.einsum("nchw,nchw->nc", x - mean, x - mean)[:, :, None, None] / area
    return (x - mean) / (var + EPS).pow(0.5) * m.weight + m.bias


def instance_pooled(m: Written, x: Tensor) -> Tensor:
    mean = F.avg_pool2d(x, x.size()[2:])
    var = F.avg_pool2d((x - mean) ** 2, (x.size(2), x.size(3)))
    return (x - mean) / torch.sqrt(var + EPS) * m.weight + m.bias


def instance_sequence(m: Written, x: Tensor) -> Tensor:
    mean = x.mean(2, keepdim=True)
    var = (x - mean).square().mean(2, keepdim=True)
    return (x - mean) / torch.sqrt(var + EPS) * m.weight[:, None] + m.bias[:, None]


def instance_volume(m: Written, x: Tensor) -> Tensor:
    std, mean = torch.std_mean(x, (2, 3, 4), correction=0, keepdim=True)
    shape = (-1, 1, 1, 1)
    return (x - mean) / (std**2 + EPS).sqrt() * m.weight.view(shape) + m.bias.view(shape)


def native_instance_plain(m: Written, x: Tensor) -> Tensor:
    return F.instance_norm(x, eps=EPS)


def instance_plain(m: Written, x: Tensor) -> Tensor:
    centred = x - x.mean((2, 3), keepdim=True)
    return centred / (centred.square().mean((2, 3), keepdim=True) + EPS).sqrt()


def instance_plain_rows(m: Written, x: Tensor) -> Tensor:
    flat = x.flatten(2)
    mean = flat.mean(2, keepdim=True)
    return ((flat - mean) * (flat.var(2, False, True) + EPS).rsqrt()).view(x.shape)


def native_group(m: Written, x: Tensor) -> Tensor:
    return F.group_norm(x, GROUPS, m.weight, m.bias, EPS)


def group_view_of_five(m: Written, x: Tensor) -> Tensor:
    batch, count, height, width = x.shape
    groups = x.view(batch, GROUPS, count // GROUPS, height, width)
    mean = groups.mean((2, 3, 4), keepdim=True)
    var = groups.var((2, 3, 4), unbiased=False, keepdim=True)
    x = ((groups - mean) / torch.sqrt(var + EPS)).view(batch, count, height, width)
    return x * m.weight + m.bias


def group_view_of_three(m: Written, x: Tensor) -> Tensor:
    groups = x.reshape(x.size(0), GROUPS, -1)
    var, mean = torch.var_mean(groups, -1, correction=0, keepdim=True)
    normal = ((groups - mean) * torch.rsqrt(var + EPS)).reshape(x.shape)
    return normal * m.weight.view(1, -1, 1, 1) + m.bias.view(1, -1, 1, 1)


def group_rows(m: Written, x: Tensor) -> Tensor:
    rows = x.contiguous().view(x.size(0) * GROUPS, -1)
    centred = rows - rows.mean(1, keepdim=True)
    normal = centred / ((centred**2).mean(1, keepdim=True) + EPS) ** 0.5
    return m.weight[:, None, None] * normal.view(x.shape) + m.bias[:, None, None]


def group_affine_in_groups(m: Written, x: Tensor) -> Tensor:
    groups = torch.unflatten(x, 1, (GROUPS, -1))
    mean = groups.mean((2, 3, 4), keepdim=True)
    var = groups.square().mean((2, 3, 4), keepdim=True) - mean.square()
    weight = m.weight.view(1, GROUPS, -1, 1, 1)
    bias = m.bias.view(1, GROUPS, -1, 1, 1)
    return ((groups - mean) * (var + EPS).rsqrt() * weight + bias).flatten(1, 2)


def group_distributed(m: Written, x: Tensor) -> Tensor:
    batch, count = x.shape[:2]
    groups = x.view(batch, GROUPS, -1)
    mean = groups.sum(-1) / groups.shape[-1]
    var = (groups - mean[..., None]).pow(2).sum(-1) / groups.shape[-1]
    inverse = torch.rsqrt(var + EPS)
    inverse = inverse[:, :, None].expand(-1, -1, count // GROUPS).reshape(batch, count, 1, 1)
    mean = mean[:, :, None].expand(-1, -1, count // GROUPS).reshape(batch, count, 1, 1)
    return (x - mean) * inverse * m.weight + m.bias


def group_sequence(m: Written, x: Tensor) -> Tensor:
    groups = x.view(x.size(0), GROUPS, x.size(1) // GROUPS, x.size(2))
    mean = groups.mean((2, 3), keepdim=True)
    var = ((groups - mean) ** 2).mean((2, 3), keepdim=True)
    x = ((groups - mean) / (var + EPS).sqrt()).view_as(x)
    return x * m.weight.unsqueeze(-1) + m.bias.unsqueeze(-1)


AFFINE = {"weight": (6,), "bias": (6,)}
PLANES = {"weight": (6, 1, 1), "bias": (6, 1, 1)}
FULL = {"weight": (1, 6, 1, 1), "bias": (1, 6, 1, 1)}
IMAGE = (4, 6, 5, 3)
INSTANCE = Family("instance norm", ("instance_norm",), native_instance, IMAGE, PLANE, EPS, AFFINE)
INSTANCE_PLAIN = Family(
    "instance norm, no affine", ("instance_norm", "layer_norm"), native_instance_plain, IMAGE,
    PLANE, EPS,
)  # fmt: skip
GROUP = Family("group norm", ("group_norm",), native_group, IMAGE, None, EPS, AFFINE)

TABLE = (
    Spelling(instance_mean_and_var, INSTANCE, parameters=FULL, also=("float64",)),
    Spelling(instance_flattened, INSTANCE, also=("bfloat16",)),
    Spelling(instance_rows, INSTANCE, also=("backend",)),
    Spelling(instance_one_axis_at_a_time, INSTANCE, parameters=PLANES),
    Spelling(instance_sums, INSTANCE, parameters=PLANES),
    Spelling(instance_pooled, INSTANCE, parameters=PLANES),
    Spelling(instance_sequence, INSTANCE, shape=(4, 6, 7), axes=(2,)),
    Spelling(instance_volume, INSTANCE, shape=(2, 6, 3, 2, 4), axes=(2, 3, 4)),
    Spelling(instance_plain, INSTANCE_PLAIN),
    Spelling(instance_plain_rows, INSTANCE_PLAIN),
    Spelling(group_view_of_five, GROUP, parameters=FULL, also=("float64", "inductor")),
    Spelling(group_view_of_three, GROUP, also=("bfloat16", "backend")),
    Spelling(group_rows, GROUP, also=("float16",)),
    Spelling(group_affine_in_groups, GROUP, also=("float64",)),
    Spelling(group_distributed, GROUP, parameters=PLANES),
    Spelling(group_sequence, GROUP, shape=(4, 6, 7)),
)
