"""LayerNorm: any trailing axes, and channels first."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .family import Family, Spelling
from .written import Written

EPS = 1e-5


def native(m: Written, x: Tensor) -> Tensor:
    return F.layer_norm(x, m.weight.shape, m.weight, m.bias, EPS)


def mean_and_var(m: Written, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    var = x.var(-1, unbiased=False, keepdim=True)
    return m.weight * (x - mean) / torch.sqrt(var + EPS) + m.bias


def mean_of_squares(m: Written, x: Tensor) -> Tensor:
    mean = x.mean(dim=-1, keepdim=True)
    var = (x - mean).pow(2).mean(dim=-1, keepdim=True)
    return (x - mean) / (var + EPS).sqrt() * m.weight + m.bias


def second_moment(m: Written, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    var = torch.relu((x * x).mean(-1, keepdim=True) - mean * mean)
    return (x - mean) * torch.rsqrt(var + EPS) * m.weight + m.bias


def var_mean(m: Written, x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, dim=-1, unbiased=False, keepdim=True)
    return torch.addcmul(m.bias, (x - mean) * (var + EPS).rsqrt(), m.weight)


def std_squared(m: Written, x: Tensor) -> Tensor:
    std = x.std(-1, keepdim=True, unbiased=False)
    return (x - x.mean(-1, keepdim=True)) / (std**2 + EPS).sqrt() * m.weight + m.bias


def sums(m: Written, x: Tensor) -> Tensor:
    width = x.shape[-1]
    mean = x.sum(-1, keepdim=True) / width
    centred = x - mean
    var = (centred * centred).sum(-1, keepdim=True) / width
    return centred / torch.sqrt(var + EPS) * m.weight + m.bias


def unsqueezed_statistics(m: Written, x: Tensor) -> Tensor:
    mean = x.mean(2)
    centred = x - mean.unsqueeze(2)
    var = centred.square().mean(2)
    return centred * (var[..., None] + EPS).pow(-0.5) * m.weight + m.bias


def flattened_rows(m: Written, x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.size(-1))
    rows = rows - rows.mean(1, keepdim=True)
    rows = rows / (rows.pow(2).mean(1, keepdim=True) + EPS).sqrt()
    return (rows * m.weight + m.bias).view(x.size(0), x.size(1), -1)


def einsum_dots(m: Written, x: Tensor) -> Tensor:
    width = x.shape[-1]
    centred = x - torch.einsum("bld->bl", x)[..., None] / width
    var = torch.einsum("bld,bld->bl", centred, centred) / width
    return centred * torch.rsqrt(var + EPS)[:, :, None] * m.weight + m.bias


def unbiased_brought_back(m: Written, x: Tensor) -> Tensor:
    width = x.size(-1)
    var = x.var(-1, keepdim=True) * (width - 1) / width
    return (x - x.mean(-1, keepdim=True)) * torch.reciprocal(
        torch.sqrt(var + EPS)
    ) * m.weight + m.bias


def length_of_centred(m: Written, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    var = centred.norm(2, -1, keepdim=True) ** 2 / x.shape[-1]
    return centred / torch.sqrt(var + EPS) * m.weight + m.bias


def axis_moved_first(m: Written, x: Tensor) -> Tensor:
    first = x.permute(2, 0, 1)
    first = (first - first.mean(0)) / torch.sqrt(first.var(0, unbiased=False) + EPS)
    return first.permute(1, 2, 0) * m.weight + m.bias


def distributed(m: Written, x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    inverse = torch.rsqrt(var + EPS)
    return x * (inverse * m.weight) + (m.bias - mean * inverse * m.weight)


def in_place(m: Written, x: Tensor) -> Tensor:
    y = x - x.mean(-1, keepdim=True)
    y /= x.var(-1, unbiased=False, keepdim=True).add_(EPS).sqrt_()
    y *= m.weight
    y += m.bias
    return y


def up_and_down(m: Written, x: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    mean = wide.mean(-1, keepdim=True)
    var = (wide - mean).pow(2).mean(-1, keepdim=True)
    wide = (wide - mean) * torch.rsqrt(var + EPS)
    return (wide * m.weight.float() + m.bias.float()).type_as(x)


def two_axes(m: Written, x: Tensor) -> Tensor:
    mean = x.mean((-2, -1), keepdim=True)
    var = (x - mean).square().mean((-2, -1), keepdim=True)
    return (x - mean) / torch.sqrt(var + EPS) * m.weight + m.bias


def two_axes_flattened(m: Written, x: Tensor) -> Tensor:
    flat = x.flatten(1)
    var, mean = torch.var_mean(flat, 1, correction=0, keepdim=True)
    return ((flat - mean) * torch.rsqrt(var + EPS)).view_as(x) * m.weight + m.bias


def native_plain(m: Written, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def plain(m: Written, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, True)
    return centred / torch.sqrt(centred.pow(2).mean(-1, True) + EPS)


def plain_distributed(m: Written, x: Tensor) -> Tensor:
    mean = torch.mean(x, 2, keepdim=True)
    inverse = (torch.mean(x * x, 2, keepdim=True) - mean * mean + EPS).rsqrt()
    return torch.add(x * inverse, mean * inverse, alpha=-1)


def native_one_plus(m: Written, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], 1 + m.weight, m.bias, EPS)


def one_plus_weight(m: Written, x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(var + EPS) * (1.0 + m.weight) + m.bias


def one_plus_weight_spread_out(m: Written, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    normal = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    return normal + normal * m.weight + m.bias


def in_other_words(m: Written, x: Tensor) -> Tensor:
    mean = torch.mean(x, -1, keepdim=True)
    centred = torch.subtract(x, mean)
    square = torch.multiply(torch.negative(centred), torch.subtract(mean, x))
    var = torch.mean(square, -1, keepdim=True)
    normal = torch.true_divide(centred, torch.sqrt(torch.add(var, EPS)))
    return torch.add(torch.multiply(normal, m.weight), m.bias)


def native_first(m: Written, x: Tensor) -> Tensor:
    return F.layer_norm(x.movedim(1, -1), m.weight.shape, m.weight, m.bias, EPS).movedim(-1, 1)


def first_mean_of_squares(m: Written, x: Tensor) -> Tensor:
    mean = x.mean(1, keepdim=True)
    var = (x - mean).pow(2).mean(1, keepdim=True)
    x = (x - mean) / torch.sqrt(var + EPS)
    return m.weight[:, None, None] * x + m.bias[:, None, None]


def first_var_mean(m: Written, x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, dim=1, unbiased=False, keepdim=True)
    return (x - mean) * (var + EPS).rsqrt() * m.weight + m.bias


def first_permuted(m: Written, x: Tensor) -> Tensor:
    last = x.permute(0, 2, 3, 1)
    last = (last - last.mean(-1, True)) / (last.var(-1, False, True) + EPS).sqrt()
    return (last * m.weight + m.bias).permute(0, 3, 1, 2).contiguous()


WIDTH = {"weight": (8,), "bias": (8,)}
CHANNELS = {"weight": (6,), "bias": (6,)}
PLANE = {"weight": (5, 8), "bias": (5, 8)}
KINDS = ("layer_norm",)
LAYER = Family("layer norm", KINDS, native, (3, 5, 8), (2,), EPS, WIDTH)
TWO_AXES = Family("layer norm, two axes", KINDS, native, (3, 5, 8), (1, 2), EPS, PLANE)
PLAIN = Family("layer norm, no affine", KINDS, native_plain, (3, 5, 8), (2,), EPS)
ONE_PLUS = Family("layer norm, 1 + weight", KINDS, native_one_plus, (3, 5, 8), (2,), EPS, WIDTH)
FIRST = Family(
    "layer norm, channels first", KINDS, native_first, (3, 6, 4, 5), (1,), EPS, CHANNELS,
    may_stay=True,
)  # fmt: skip

TABLE = (
    Spelling(mean_and_var, LAYER, also=("float64", "bfloat16", "float16", "backend")),
    Spelling(mean_of_squares, LAYER, also=("inductor",)),
    Spelling(second_moment, LAYER, also=("float64",)),
    Spelling(var_mean, LAYER, also=("bfloat16",)),
    Spelling(std_squared, LAYER),
    Spelling(sums, LAYER),
    Spelling(unsqueezed_statistics, LAYER),
    Spelling(flattened_rows, LAYER, also=("backend",)),
    Spelling(einsum_dots, LAYER),
    Spelling(unbiased_brought_back, LAYER),
    Spelling(length_of_centred, LAYER),
    Spelling(axis_moved_first, LAYER),
    Spelling(distributed, LAYER, also=("float64",)),
    Spelling(in_place, LAYER),
    Spelling(in_other_words, LAYER),
    Spelling(up_and_down, LAYER, also=("bfloat16", "float16")),
    Spelling(mean_of_squares, LAYER, shape=(4, 8), axes=(1,)),
    Spelling(mean_and_var, LAYER, shape=(2, 3, 2, 8), axes=(3,)),
    Spelling(two_axes, TWO_AXES, also=("float64",)),
    Spelling(two_axes_flattened, TWO_AXES),
    Spelling(plain, PLAIN, also=("float16",)),
    Spelling(plain_distributed, PLAIN),
    Spelling(one_plus_weight, ONE_PLUS, also=("bfloat16",)),
    Spelling(one_plus_weight_spread_out, ONE_PLUS),
    Spelling(first_mean_of_squares, FIRST, also=("float64",)),
    Spelling(first_var_mean, FIRST, parameters={"weight": (1, 6, 1, 1), "bias": (1, 6, 1, 1)}),
    Spelling(first_permuted, FIRST, also=("backend",)),
)
