"""BatchNorm in training mode without running statistics: how the statistics can be written."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .family import Family, Spelling
from .written import Written

EPS = 1e-5
AXES = (0, 2, 3)


def native(m: Written, x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, m.weight, m.bias, training=True, eps=EPS)


def channels(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)


def mean_and_var(m: Written, x: Tensor) -> Tensor:
    mean = x.mean(AXES, keepdim=True)
    var = x.var(AXES, unbiased=False, keepdim=True)
    return (x - mean) / torch.sqrt(var + EPS) * channels(m.weight) + channels(m.bias)


def var_mean_rsqrt(m: Written, x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, dim=AXES, correction=0, keepdim=True)
    return channels(m.weight) * ((x - mean) * torch.rsqrt(var + EPS)) + channels(m.bias)


def std_mean_squared(m: Written, x: Tensor) -> Tensor:
    std, mean = torch.std_mean(x, dim=AXES, correction=0, keepdim=True)
    return (x - mean) * (std.pow(2) + EPS).rsqrt() * m.weight + m.bias


def std_times_itself(m: Written, x: Tensor) -> Tensor:
    std = x.std(dim=AXES, correction=0)
    spread = (std * std + EPS).sqrt()
    centred = x - channels(x.mean(AXES))
    return centred / channels(spread) * channels(m.weight) + channels(m.bias)


def second_moment_less_squared_mean(m: Written, x: Tensor) -> Tensor:
    mean = x.mean(AXES, keepdim=True)
    var = (x**2).mean(AXES, keepdim=True) - mean**2
    return (x - mean) / (var + EPS).sqrt() * m.weight + m.bias


def second_moment_clamped(m: Written, x: Tensor) -> Tensor:
    mean = x.mean(AXES)
    var = (x.square().mean(AXES) - mean.square()).clamp(min=0)
    scale = m.weight / torch.sqrt(var + EPS)
    return (x - channels(mean)) * channels(scale) + channels(m.bias)


def mean_of_centred_squares(m: Written, x: Tensor) -> Tensor:
    centred = x - x.mean(dim=AXES, keepdim=True)
    var = torch.mean(torch.square(centred), dim=AXES, keepdim=True)
    return m.weight * centred * (var + EPS) ** -0.5 + m.bias


def centred_times_itself(m: Written, x: Tensor) -> Tensor:
    centred = x - x.mean(AXES, True)
    var = (centred * centred).mean(AXES, True)
    return torch.pow(var + EPS, -0.5) * centred * m.weight + m.bias


def covariance_with_x(m: Written, x: Tensor) -> Tensor:
    mean = x.mean(AXES, keepdim=True)
    var = (x * (x - mean)).mean(AXES, keepdim=True)
    return (x - mean) * (1.0 / torch.sqrt(var + EPS)) * m.weight + m.bias


def sums_and_a_count(m: Written, x: Tensor) -> Tensor:
    count = x.numel() // x.size(1)
    mean = x.sum(dim=AXES, keepdim=True) / count
    var = ((x - mean) ** 2).sum(dim=AXES, keepdim=True) / count
    return (x - mean) / torch.sqrt(var + EPS) * m.weight + m.bias


def count_from_the_shape(m: Written, x: Tensor) -> Tensor:
    batch, _, height, width = x.shape
    mean = x.sum((0, 2, 3)) * (1.0 / (batch * height * width))
    centred = x - mean[None, :, None, None]
    var = centred.pow(2).sum((0, 2, 3)) / (batch * height * width)
    inverse = (var + EPS).sqrt().reciprocal()
    return centred * (m.weight * inverse)[None, :, None, None] + m.bias[None, :, None, None]


def one_axis_at_a_time(m: Written, x: Tensor) -> Tensor:
    mean = x.mean(3, keepdim=True).mean(2, keepdim=True).mean(0, keepdim=True)
    squares = (x - mean).pow(2)
    var = squares.mean(0, keepdim=True).mean(2, keepdim=True).mean(3, keepdim=True)
    return (x - mean) / (var + EPS).pow(0.5) * m.weight + m.bias


def transposed_to_rows(m: Written, x: Tensor) -> Tensor:
    rows = x.transpose(0, 1).reshape(x.size(1), -1)
    mean, var = rows.mean(1), rows.var(1, unbiased=False)
    normal = (x - channels(mean)) / channels(var + EPS).sqrt()
    return normal * channels(m.weight) + channels(m.bias)


def normalised_as_rows(m: Written, x: Tensor) -> Tensor:
    batch, count, height, width = x.shape
    rows = x.permute(1, 0, 2, 3).contiguous().view(count, -1)
    rows = (rows - rows.mean(1, keepdim=True)) / (rows.var(1, False, True) + EPS).sqrt()
    rows = rows * m.weight.unsqueeze(1) + m.bias.unsqueeze(1)
    return rows.view(count, batch, height, width).permute(1, 0, 2, 3)


def channels_moved_last(m: Written, x: Tensor) -> Tensor:
    last = x.permute(0, 2, 3, 1)
    mean = last.mean((0, 1, 2))
    var = last.var((0, 1, 2), unbiased=False)
    last = (last - mean) / torch.sqrt(var + EPS) * m.weight + m.bias
    return last.permute(0, 3, 1, 2)


def flattened_positions(m: Written, x: Tensor) -> Tensor:
    flat = x.flatten(2)
    mean = flat.mean(2).mean(0)
    var = flat.pow(2).mean((0, 2)) - mean.pow(2)
    flat = (flat - mean[:, None]) * torch.rsqrt(var[:, None] + EPS)
    return (flat * m.weight[:, None] + m.bias[:, None]).view_as(x)


def einsum_variance(m: Written, x: Tensor) -> Tensor:
    count = x.shape[0] * x.shape[2] * x.shape[3]
    mean = torch.einsum("nchw->c", x) / count
    centred = x - mean.view(1, -1, 1, 1)
    var = torch.einsum("nchw,nchw->c", centred, centred) / count
    normal = centred * torch.rsqrt(var + EPS).view(1, -1, 1, 1)
    return torch.einsum("nchw,c->nchw", normal, m.weight) + m.bias.view(1, -1, 1, 1)


def unbiased_brought_back(m: Written, x: Tensor) -> Tensor:
    count = x.numel() / x.size(1)
    var = x.var(AXES, keepdim=True) * ((count - 1) / count)
    return (x - x.mean(AXES, keepdim=True)) / torch.sqrt(var + EPS) * m.weight + m.bias


def norm_of_centred(m: Written, x: Tensor) -> Tensor:
    count = x.numel() // x.size(1)
    centred = x - x.mean(AXES, keepdim=True)
    length = torch.linalg.vector_norm(centred, dim=AXES, keepdim=True)
    return centred / torch.sqrt(length**2 / count + EPS) * m.weight + m.bias


def distributed_scale_and_shift(m: Written, x: Tensor) -> Tensor:
    mean = x.mean(AXES)
    scale = m.weight * torch.rsqrt(x.var(AXES, correction=0) + EPS)
    shift = m.bias - mean * scale
    return x * scale[None, :, None, None] + shift[None, :, None, None]


def scale_before_subtraction(m: Written, x: Tensor) -> Tensor:
    scale = m.weight / (x.var(AXES, correction=0, keepdim=True) + EPS).sqrt()
    return x * scale - x.mean(AXES, keepdim=True) * scale + m.bias


def addcmul_affine(m: Written, x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, AXES, correction=0, keepdim=True)
    normal = (x - mean).div(var.add(EPS).sqrt())
    return torch.addcmul(channels(m.bias), channels(m.weight), normal)


def addcdiv_affine(m: Written, x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, AXES, correction=0, keepdim=True)
    return torch.addcdiv(m.bias, (x - mean) * m.weight, torch.sqrt(var + EPS))


def functions_only(m: Written, x: Tensor) -> Tensor:
    mean = torch.mean(x, AXES, keepdim=True)
    var = torch.var(x, AXES, unbiased=False, keepdim=True)
    normal = torch.div(torch.sub(x, mean), torch.sqrt(torch.add(var, EPS)))
    return torch.add(torch.mul(normal, m.weight), m.bias)


def subtract_with_alpha(m: Written, x: Tensor) -> Tensor:
    total = x.sum(AXES, keepdim=True)
    centred = torch.sub(x, total, alpha=x.size(1) / x.numel())
    var = centred.square().mean(AXES, keepdim=True)
    return torch.add(m.bias, centred * m.weight * torch.rsqrt(var + EPS), alpha=1)


def everything_in_place(m: Written, x: Tensor) -> Tensor:
    y = x - x.mean(AXES, keepdim=True)
    spread = x.var(AXES, unbiased=False, keepdim=True).add_(EPS).sqrt_()
    return y.div_(spread).mul_(m.weight).add_(m.bias)


def expanded_statistics(m: Written, x: Tensor) -> Tensor:
    mean = x.mean(AXES).view(1, -1, 1, 1).expand_as(x)
    var = x.var(AXES, unbiased=False).view(1, -1, 1, 1).expand(x.shape)
    weight = m.weight.unsqueeze(0).unsqueeze(2).unsqueeze(3).expand_as(x)
    bias = m.bias.reshape(1, x.size(1), 1, 1).expand_as(x)
    return weight * (x - mean) / (var + EPS).sqrt() + bias


def negative_axes(m: Written, x: Tensor) -> Tensor:
    mean = x.mean((-4, -2, -1), keepdim=True)
    var = ((x - mean) ** 2).mean(dim=[-1, -2, -4], keepdim=True)
    return (x - mean) * var.add(EPS).rsqrt() * m.weight + m.bias


def up_to_float_and_down(m: Written, x: Tensor) -> Tensor:
    wide = x.float()
    var, mean = torch.var_mean(wide, AXES, correction=0, keepdim=True)
    normal = (wide - mean) * torch.rsqrt(var + EPS)
    return (normal * channels(m.weight).float() + channels(m.bias).float()).to(x.dtype)


def shifted_twice(m: Written, x: Tensor) -> Tensor:
    mean = x.mean(AXES, keepdim=True)
    centred = x - mean
    centred = centred - centred.mean(AXES, keepdim=True)
    var = centred.pow(2).mean(AXES, keepdim=True)
    return centred / (var + EPS).sqrt() * m.weight + m.bias


def rows(m: Written, x: Tensor) -> Tensor:
    mean, var = x.mean(0), x.var(0, unbiased=False)
    return (x - mean) / torch.sqrt(var + EPS) * m.weight + m.bias


def sequence(m: Written, x: Tensor) -> Tensor:
    mean = x.mean((0, 2), keepdim=True)
    var = (x - mean).pow(2).mean((0, 2), keepdim=True)
    return m.weight[:, None] * (x - mean) / (var + EPS).sqrt() + m.bias[:, None]


def volume(m: Written, x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, (0, 2, 3, 4), unbiased=False, keepdim=True)
    shape = (1, -1, 1, 1, 1)
    return (x - mean) / (var + EPS) ** 0.5 * m.weight.view(shape) + m.bias.view(shape)


NORM = Family(
    "batch norm",
    ("batch_norm",),
    native,
    shape=(4, 6, 5, 3),
    axes=AXES,
    eps=EPS,
    parameters={"weight": (6,), "bias": (6,)},
)
PLANES = {"weight": (6, 1, 1), "bias": (6, 1, 1)}
FULL = {"weight": (1, 6, 1, 1), "bias": (1, 6, 1, 1)}

TABLE = (
    Spelling(mean_and_var, NORM, also=("float64", "bfloat16", "float16", "backend")),
    Spelling(var_mean_rsqrt, NORM, also=("float64", "inductor")),
    Spelling(std_mean_squared, NORM, parameters=FULL),
    Spelling(std_times_itself, NORM),
    Spelling(second_moment_less_squared_mean, NORM, parameters=FULL),
    Spelling(second_moment_clamped, NORM),
    Spelling(mean_of_centred_squares, NORM, parameters=PLANES, also=("bfloat16",)),
    Spelling(centred_times_itself, NORM, parameters=FULL),
    Spelling(covariance_with_x, NORM, parameters=FULL),
    Spelling(sums_and_a_count, NORM, parameters=PLANES, also=("float64",)),
    Spelling(count_from_the_shape, NORM),
    Spelling(one_axis_at_a_time, NORM, parameters=FULL),
    Spelling(transposed_to_rows, NORM, also=("backend",)),
    Spelling(normalised_as_rows, NORM),
    Spelling(channels_moved_last, NORM, also=("float64",)),
    Spelling(flattened_positions, NORM),
    Spelling(einsum_variance, NORM),
    Spelling(unbiased_brought_back, NORM, parameters=PLANES),
    Spelling(norm_of_centred, NORM, parameters=FULL),
    Spelling(distributed_scale_and_shift, NORM, also=("float64",)),
    Spelling(scale_before_subtraction, NORM, parameters=PLANES),
    Spelling(addcmul_affine, NORM),
    Spelling(addcdiv_affine, NORM, parameters=FULL),
    Spelling(functions_only, NORM, parameters=PLANES),
    Spelling(subtract_with_alpha, NORM, parameters=FULL),
    Spelling(everything_in_place, NORM, parameters=FULL, also=("inductor",)),
    Spelling(expanded_statistics, NORM),
    Spelling(negative_axes, NORM, parameters=PLANES),
    Spelling(up_to_float_and_down, NORM, also=("bfloat16", "float16")),
    Spelling(shifted_twice, NORM, parameters=FULL),
    Spelling(rows, NORM, shape=(16, 6), axes=(0,), also=("float64",)),
    Spelling(sequence, NORM, shape=(4, 6, 7), axes=(0, 2)),
    Spelling(volume, NORM, shape=(2, 6, 3, 2, 4), axes=(0, 2, 3, 4)),
)
