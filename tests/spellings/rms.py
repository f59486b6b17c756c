"""RMSNorm, with the many places in which its casts and its scale can stand."""

# mypy: disable-error-code="no-any-return"
# Tensor.norm and some operators have no types in torch.

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .family import Family, Spelling
from .written import Written

EPS = 1e-6


def native(m: Written, x: Tensor) -> Tensor:
    return F.rms_norm(x, m.weight.shape, m.weight, EPS)


def mean_of_powers(m: Written, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * m.weight


def cast_before_the_scale(m: Written, x: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    power = wide.pow(2).mean(-1, keepdim=True)
    return m.weight * (wide * torch.rsqrt(power + EPS)).to(x.dtype)


def cast_after_the_scale(m: Written, x: Tensor) -> Tensor:
    wide = x.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    return (m.weight.float() * normal).type_as(x)


def only_the_statistic_is_wide(m: Written, x: Tensor) -> Tensor:
    power = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(power + EPS)
    return m.weight * x.to(m.weight.dtype)


def divided_by_the_root(m: Written, x: Tensor) -> Tensor:
    return m.weight * x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + EPS)


def sum_over_width(m: Written, x: Tensor) -> Tensor:
    power = torch.sum(x**2, dim=-1, keepdim=True) / x.shape[-1]
    return x / (power + EPS) ** 0.5 * m.weight


def length_squared(m: Written, x: Tensor) -> Tensor:
    length = x.norm(2, dim=-1, keepdim=True)
    return x * (length.pow(2) / x.size(-1) + EPS).pow(-0.5) * m.weight


def scaled_length(m: Written, x: Tensor) -> Tensor:
    size = x.shape[-1] ** -0.5 * torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.sqrt(size * size + EPS) * m.weight


def einsum_dot(m: Written, x: Tensor) -> Tensor:
    power = torch.einsum("bsd,bsd->bs", x, x).unsqueeze(-1) / x.shape[-1]
    return torch.einsum("bsd,d->bsd", x * torch.rsqrt(power + EPS), m.weight)


def variance_and_mean(m: Written, x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    return x * torch.rsqrt(var + mean.square() + EPS) * m.weight


def scale_joined_first(m: Written, x: Tensor) -> Tensor:
    inverse = (x.square().mean(-1) + EPS).sqrt().reciprocal()
    return x * (inverse[..., None] * m.weight)


def in_place(m: Written, x: Tensor) -> Tensor:
    inverse = x.pow(2).mean(-1, keepdim=True).add_(EPS).rsqrt_()
    return (x * inverse).mul_(m.weight)


def heads_apart(m: Written, x: Tensor) -> Tensor:
    rows = x.view(-1, x.shape[-1])
    rows = rows / rows.square().mean(1).add(EPS).sqrt().unsqueeze(1)
    return rows.view(x.shape) * m.weight


def native_one_plus(m: Written, x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], 1 + m.weight, EPS)


def one_plus_weight(m: Written, x: Tensor) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return (wide * (1.0 + m.weight.float())).type_as(x)


def weight_added_to_itself(m: Written, x: Tensor) -> Tensor:
    normal = x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    return torch.addcmul(normal, normal, m.weight)


def native_plain(m: Written, x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=EPS)


def plain(m: Written, x: Tensor) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + EPS).rsqrt()


def plain_divided(m: Written, x: Tensor) -> Tensor:
    return torch.div(x, torch.sqrt(torch.mean(torch.mul(x, x), -1, True) + EPS))


def native_first(m: Written, x: Tensor) -> Tensor:
    return F.rms_norm(x.movedim(1, -1), m.weight.shape, m.weight, EPS).movedim(-1, 1)


def channels_first(m: Written, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS) * m.weight[:, None, None]


def channels_first_permuted(m: Written, x: Tensor) -> Tensor:
    last = x.permute(0, 2, 3, 1)
    last = last / torch.sqrt((last * last).mean(-1, keepdim=True) + EPS) * m.weight
    return last.permute(0, 3, 1, 2)


WIDTH = {"weight": (8,)}
KINDS = ("rms_norm",)
RMS = Family("rms norm", KINDS, native, (3, 5, 8), (2,), EPS, WIDTH)
ONE_PLUS = Family("rms norm, 1 + weight", KINDS, native_one_plus, (3, 5, 8), (2,), EPS, WIDTH)
PLAIN = Family("rms norm, no weight", KINDS, native_plain, (3, 5, 8), (2,), EPS)
FIRST = Family(
    "rms norm, channels first", KINDS, native_first, (3, 6, 4, 5), (1,), EPS, {"weight": (6,)},
    may_stay=True,
)  # fmt: skip

FIRST_DIVIDED = replace(
    FIRST, name="rms norm, channels first, divided", alone="a division stays a division"
)
FIRST = replace(FIRST, alone="a product with a root stays one")

TABLE = (
    Spelling(mean_of_powers, RMS, also=("float64", "backend")),
    Spelling(cast_before_the_scale, RMS, also=("bfloat16", "float16", "inductor")),
    Spelling(cast_after_the_scale, RMS, also=("bfloat16", "float16")),
    Spelling(only_the_statistic_is_wide, RMS, also=("bfloat16", "float16")),
    Spelling(divided_by_the_root, RMS, also=("float64",)),
    Spelling(sum_over_width, RMS),
    Spelling(length_squared, RMS),
    Spelling(scaled_length, RMS),
    Spelling(einsum_dot, RMS),
    Spelling(variance_and_mean, RMS),
    Spelling(scale_joined_first, RMS, also=("float64",)),
    Spelling(in_place, RMS),
    Spelling(heads_apart, RMS),
    Spelling(one_plus_weight, ONE_PLUS, also=("bfloat16",)),
    Spelling(weight_added_to_itself, ONE_PLUS),
    Spelling(plain, PLAIN, also=("bfloat16",)),
    Spelling(plain_divided, PLAIN),
    Spelling(channels_first, FIRST, also=("float64",)),
    Spelling(channels_first_permuted, FIRST_DIVIDED),
)
