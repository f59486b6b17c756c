"""LayerNorm, RMSNorm and Lp-normalise of a cube: every broadcast fits, few are right."""

# mypy: disable-error-code="no-any-return"
# Tensor.norm and some operators have no types in torch.

from __future__ import annotations

from dataclasses import replace

import torch
from spellings import Formula, Written
from torch import Tensor

from .recipe import EPS, NearMiss, Recipe, Setting

CUBE = Setting((6, 6, 6), {"weight": (6,), "bias": (6,)})
SCALED = Setting((6, 6, 6), {"weight": (6,)})
BARE = Setting((6, 6, 6))

LAYER = Recipe(
    mean=lambda x: x.mean(-1, keepdim=True),
    variance=lambda x: x.var(-1, unbiased=False, keepdim=True),
    weight=lambda m: m.weight,
    bias=lambda m: m.bias,
)
RMS = Recipe(
    mean=lambda x: x.square().mean(-1, keepdim=True),
    variance=lambda x: x.square().mean(-1, keepdim=True),
    weight=lambda m: m.weight,
    bias=lambda m: m.weight,
    centre=lambda x, unused: x,
    affine=lambda y, weight, unused: y * weight,
)


def length(x: Tensor) -> Tensor:
    return x.norm(2, -1, keepdim=True)


def unit(m: Written, x: Tensor) -> Tensor:
    return x / length(x).clamp_min(EPS)


def channels_first_weight(m: Written, x: Tensor) -> Tensor:
    return replace(LAYER, weight=lambda m: m.weight[:, None], bias=lambda m: m.bias[:, None])(m, x)


def statistics_of_the_transposed(m: Written, x: Tensor) -> Tensor:
    other = x.transpose(-1, -2)
    y = (x - LAYER.mean(other)) / (LAYER.variance(other) + EPS).sqrt()
    return y * m.weight + m.bias


def statistics_swapped(m: Written, x: Tensor) -> Tensor:
    return (x - LAYER.variance(x)) / (LAYER.mean(x).square() + EPS).sqrt() * m.weight + m.bias


def rms_of_the_centred(m: Written, x: Tensor) -> Tensor:
    return RMS(m, x - x.mean(-1, keepdim=True))


def rms_by_its_first_half(m: Written, x: Tensor) -> Tensor:
    power = x[..., :3].square().mean(-1, keepdim=True)
    return x * torch.rsqrt(power + EPS) * m.weight


def rms_gated(m: Written, x: Tensor) -> Tensor:
    return RMS(m, x * torch.sigmoid(x)) * x


def rms_of_another_tensor(m: Written, x: Tensor) -> Tensor:
    return x * torch.rsqrt((x + 1).square().mean(-1, keepdim=True) + EPS) * m.weight


def rms_with_a_moving_weight(m: Written, x: Tensor) -> Tensor:
    y = RMS(m, x)
    return y * m.weight


def leaky(m: Written, x: Tensor) -> Tensor:
    return torch.nn.functional.leaky_relu(LAYER(m, x))


LAYERS: dict[str, Recipe] = {
    "another axis": replace(
        LAYER,
        mean=lambda x: x.mean(-2, keepdim=True),
        variance=lambda x: x.var(-2, unbiased=False, keepdim=True),
    ),
    "both statistics without keepdim": replace(
        LAYER, mean=lambda x: x.mean(-1), variance=lambda x: x.var(-1, unbiased=False)
    ),
    "mean without keepdim": replace(LAYER, mean=lambda x: x.mean(-1)),
    "variance without keepdim": replace(LAYER, variance=lambda x: x.var(-1, unbiased=False)),
    "statistics unsqueezed at the wrong axis": replace(
        LAYER, mean=lambda x: x.mean(-1).unsqueeze(1)
    ),
    "variance over another axis": replace(
        LAYER, variance=lambda x: x.var(-2, unbiased=False, keepdim=True)
    ),
    "variance over two axes": replace(
        LAYER, variance=lambda x: x.var((-2, -1), unbiased=False, keepdim=True)
    ),
    "unbiased variance": replace(LAYER, variance=lambda x: x.var(-1, keepdim=True)),
    "std plus eps": replace(LAYER, root=lambda v: v.sqrt() + EPS),
    "variance detached": replace(
        LAYER, variance=lambda x: x.var(-1, unbiased=False, keepdim=True).detach()
    ),
    "weight along the rows": replace(LAYER, weight=lambda m: m.weight[:, None]),
    "weight along the batch": replace(LAYER, weight=lambda m: m.weight[:, None, None]),
    "bias along the rows": replace(LAYER, bias=lambda m: m.bias[:, None]),
    "weight written into the bias": replace(LAYER, bias=lambda m: m.weight),
    "a weight per row and column": replace(
        LAYER, weight=lambda m: m.weight[:, None] * m.weight[None, :]
    ),
    "weight of rank two, broadcast": replace(LAYER, weight=lambda m: m.weight[:1, None]),
    "bias before the scale": replace(LAYER, affine=lambda y, w, b: (y + b) * w),
    "mean of the first five": replace(LAYER, mean=lambda x: x[..., :5].mean(-1, keepdim=True)),
    "cumulative mean": replace(
        LAYER, mean=lambda x: x.cumsum(-1) / torch.arange(1, 7, dtype=x.dtype)
    ),
}
POWERS: dict[str, Recipe] = {
    "eps outside the root": replace(RMS, root=lambda v: v.sqrt() + EPS),
    "eps as a lower limit": replace(RMS, root=lambda v: v.clamp(min=1.0).sqrt()),
    "absolute values for squares": replace(RMS, variance=lambda x: x.abs().mean(-1, keepdim=True)),
    "cubes for squares": replace(RMS, variance=lambda x: x.pow(3).abs().mean(-1, keepdim=True)),
    "sum for the mean": replace(RMS, variance=lambda x: x.square().sum(-1, keepdim=True)),
    "divided by one less": replace(RMS, variance=lambda x: x.square().sum(-1, keepdim=True) / 5),
    "another axis": replace(RMS, variance=lambda x: x.square().mean(1, keepdim=True)),
    "without keepdim": replace(RMS, variance=lambda x: x.square().mean(-1)),
    "power detached": replace(RMS, variance=lambda x: x.square().mean(-1, keepdim=True).detach()),
    "x times its transpose": replace(
        RMS, variance=lambda x: (x * x.transpose(-1, -2)).mean(-1, keepdim=True).abs()
    ),
    "square of the mean": replace(RMS, variance=lambda x: x.mean(-1, keepdim=True).square()),
    "one plus the weight": replace(RMS, weight=lambda m: 1 + m.weight),
    "numerator squared": replace(RMS, centre=lambda x, unused: x.square()),
    "numerator's sign lost": replace(RMS, centre=lambda x, unused: x.abs()),
    "reciprocal forgotten": replace(RMS, divide=torch.mul),
}
UNITS = {
    "length of the whole": lambda m, x: x / x.norm(2).clamp_min(EPS),
    "length along another axis": lambda m, x: x / x.norm(2, 1, keepdim=True).clamp_min(EPS),
    "length without keepdim": lambda m, x: x / x.norm(2, -1).clamp_min(EPS),
    "sum of absolute values": lambda m, x: x / x.norm(1, -1, keepdim=True).clamp_min(EPS),
    "p of three": lambda m, x: x / x.norm(3, -1, keepdim=True).clamp_min(EPS),
    "largest absolute value": lambda m, x: x / x.abs().amax(-1, keepdim=True).clamp_min(EPS),
    "largest value": lambda m, x: x / x.amax(-1, keepdim=True).abs().clamp_min(EPS),
    "sum of values": lambda m, x: x / x.sum(-1, keepdim=True).abs().clamp_min(EPS),
    "eps as an upper limit": lambda m, x: x / length(x).clamp_max(EPS),
    "a limit that binds": lambda m, x: x / length(x).clamp_min(2.0),
    "eps added": lambda m, x: x / (length(x) + EPS),
    "eps under the root": lambda m, x: x / (length(x).square() + EPS).sqrt(),
    "no root": lambda m, x: x / x.square().sum(-1, keepdim=True).clamp_min(EPS),
    "length detached": lambda m, x: x / length(x).detach().clamp_min(EPS),
    "length of another tensor": lambda m, x: x / length(x.relu()).clamp_min(EPS),
    "length of the difference to the next": lambda m, x: (
        x / length(x - x.roll(1, 1)).clamp_min(EPS)
    ),
    "length of the centred": lambda m, x: x / length(x - x.mean(-1, keepdim=True)).clamp_min(EPS),
    "squared numerator": lambda m, x: x.square() / length(x).clamp_min(EPS),
    "distances between samples": lambda m, x: (
        (x.unsqueeze(0) - x.unsqueeze(1)) / length(x).clamp_min(EPS)
    ),
    "mean for the sum": lambda m, x: x / x.square().mean(-1, keepdim=True).sqrt().clamp_min(EPS),
}
WHOLE = {
    "weight and bias of channels first": channels_first_weight,
    "statistics of the transposed": statistics_of_the_transposed,
    "mean and variance swapped": statistics_swapped,
}
OTHER_POWERS = {
    "power of the first half": rms_by_its_first_half,
    "power of another tensor": rms_of_another_tensor,
    "weight applied twice": rms_with_a_moving_weight,
    "centred before": rms_of_the_centred,
}
BESIDE: dict[str, Formula] = {
    "gated input and output": rms_gated,
    "weight along the rows": replace(RMS, weight=lambda m: m.weight[:, None]),
}

TABLE = (
    *(NearMiss(f"layer: {name}", each, LAYER, CUBE) for name, each in LAYERS.items()),
    *(NearMiss(f"layer: {name}", each, LAYER, CUBE) for name, each in WHOLE.items()),
    *(NearMiss(f"rms: {name}", each, RMS, SCALED) for name, each in POWERS.items()),
    *(NearMiss(f"rms: {name}", each, RMS, SCALED) for name, each in OTHER_POWERS.items()),
    *(
        NearMiss(f"rms: {name}", each, RMS, SCALED, norm_stays=True)
        for name, each in BESIDE.items()
    ),
    NearMiss("layer: leaky after it", leaky, LAYER, CUBE, norm_stays=True),
    *(NearMiss(f"lp: {name}", each, unit, BARE) for name, each in UNITS.items()),
)
