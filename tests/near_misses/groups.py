"""GroupNorm, InstanceNorm, weight standardisation and frozen norms, one change each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from spellings import Formula, Written
from torch import Tensor

from .recipe import EPS, NearMiss, Recipe, Setting

IMAGE = Setting((4, 4, 4, 4), {"weight": (4,), "bias": (4,)})
FILTERS = Setting((2, 3, 4, 4), {"filters": (3, 3, 3, 3), "bias": (3,)})
FROZEN = Setting(
    (4, 4, 4, 4), {"weight": (4,), "bias": (4,)}, {"running_mean": (4,), "running_var": (4,)}
)
PLANE = (2, 3)

INSTANCE = Recipe(
    mean=lambda x: x.mean(PLANE, keepdim=True),
    variance=lambda x: x.var(PLANE, unbiased=False, keepdim=True),
    weight=lambda m: m.weight.view(1, -1, 1, 1),
    bias=lambda m: m.bias.view(1, -1, 1, 1),
)


@dataclass(frozen=True)
class Grouped:
    """A GroupNorm of two groups; how they are laid out for each statistic can be replaced."""

    split: tuple[int, ...] = (2, 2, 4, 4)
    axes: tuple[int, ...] = (2, 3, 4)
    variance_split: tuple[int, ...] | None = None
    variance_axes: tuple[int, ...] | None = None
    back: Callable[[Tensor, Tensor], Tensor] = lambda groups, x: groups.reshape(x.shape)

    def __call__(self, m: Written, x: Tensor) -> Tensor:
        groups = x.view(x.size(0), *self.split)
        mean = groups.mean(self.axes, keepdim=True)
        others = x.view(x.size(0), *(self.variance_split or self.split))
        var = others.var(self.variance_axes or self.axes, unbiased=False, keepdim=True)
        normal = self.back(groups - mean, x)
        spread = self.back((var + EPS).sqrt().expand_as(others), x)
        return normal / spread * m.weight.view(1, -1, 1, 1) + m.bias.view(1, -1, 1, 1)


def shuffled(m: Written, x: Tensor) -> Tensor:
    y = x.view(4, 2, 2, 4, 4).transpose(1, 2).reshape(x.shape)
    return GROUP(m, y)


def affine_in_swapped_groups(m: Written, x: Tensor) -> Tensor:
    groups = x.view(4, 2, 2, 4, 4)
    mean = groups.mean((2, 3, 4), keepdim=True)
    var = groups.var((2, 3, 4), unbiased=False, keepdim=True)
    weight, bias = (p.view(1, 2, 2, 1, 1).transpose(1, 2) for p in (m.weight, m.bias))
    return ((groups - mean) / (var + EPS).sqrt() * weight + bias).view(x.shape)


def standardise(axes: tuple[int, ...], w: Tensor) -> Tensor:
    centred = w - w.mean(axes, keepdim=True)
    return centred / (centred.square().mean(axes, keepdim=True) + EPS).sqrt()


def convolved(weight: Callable[[Tensor], Tensor]) -> Callable[[Written, Tensor], Tensor]:
    def formula(m: Written, x: Tensor) -> Tensor:
        return F.conv2d(x, weight(m.filters), m.bias, padding=1)

    return formula


def centred_only(w: Tensor) -> Tensor:
    return w - w.mean((1, 2, 3), keepdim=True)


def standardised_by_the_input(m: Written, x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
    return F.conv2d(x, (m.filters - mean) / (var + EPS).sqrt(), m.bias, padding=1)


def transposed(m: Written, x: Tensor) -> Tensor:
    return F.conv2d(x, standardise((1, 2, 3), m.filters).transpose(0, 1), m.bias, padding=1)


def both_conv_and_bias(m: Written, x: Tensor) -> Tensor:
    w = standardise((1, 2, 3), m.filters)
    return F.conv2d(x, w, m.bias * w.mean((1, 2, 3)), padding=1)


def wide(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)


def frozen(m: Written, x: Tensor) -> Tensor:
    scale = m.weight / (m.running_var + EPS).sqrt()
    return x * wide(scale) + wide(m.bias - m.running_mean * scale)


def frozen_from(
    scale: Callable[[Written], Tensor], shift: Callable[[Written, Tensor], Tensor]
) -> Callable[[Written, Tensor], Tensor]:
    def formula(m: Written, x: Tensor) -> Tensor:
        factor = scale(m)
        return x * wide(factor) + wide(shift(m, factor))

    return formula


def right_scale(m: Written) -> Tensor:
    return m.weight / (m.running_var + EPS).sqrt()


def right_shift(m: Written, scale: Tensor) -> Tensor:
    return m.bias - m.running_mean * scale


def frozen_detached(m: Written, x: Tensor) -> Tensor:
    scale = right_scale(m).detach()
    return x * wide(scale) + wide(right_shift(m, scale))


def linear_with_half_of_the_bias(m: Written, x: Tensor) -> Tensor:
    rows = x.movedim(1, -1).reshape(-1, 4)
    y = torch.addmm(m.bias, rows, torch.outer(m.weight, m.weight), beta=0.5)
    return (y - m.running_mean) / (m.running_var + EPS).sqrt() * m.weight + m.bias


def linear_with_the_bias(m: Written, x: Tensor) -> Tensor:
    rows = x.movedim(1, -1).reshape(-1, 4)
    y = torch.addmm(m.bias, rows, torch.outer(m.weight, m.weight))
    return (y - m.running_mean) / (m.running_var + EPS).sqrt() * m.weight + m.bias


def frozen_then_leaky(m: Written, x: Tensor) -> Tensor:
    return F.leaky_relu(frozen(m, x), 0.01)


GROUP = Grouped()
GROUPS: dict[str, Formula] = {
    "four groups for the variance": replace(
        GROUP, variance_split=(4, 1, 4, 4), variance_axes=(2, 3, 4)
    ),
    "one group for the mean": replace(GROUP, split=(1, 4, 4, 4), variance_split=(2, 2, 4, 4)),
    "interleaved groups": replace(GROUP, axes=(1, 3, 4)),
    "interleaved groups for the variance": replace(GROUP, variance_axes=(1, 3, 4)),
    "statistics within the group only": replace(GROUP, axes=(2,)),
    "statistics without the width": replace(GROUP, axes=(2, 3)),
    "rows split in the place of channels": replace(GROUP, split=(4, 2, 2, 4), axes=(1, 3, 4)),
}
REORDERED: dict[str, Formula] = {
    "brought back in another order": replace(
        GROUP, back=lambda groups, x: groups.transpose(1, 2).reshape(x.shape)
    ),
    "affine in swapped groups": affine_in_swapped_groups,
    "channels shuffled first": shuffled,
}
INSTANCES: dict[str, Recipe] = {
    "another pair of axes": replace(INSTANCE, mean=lambda x: x.mean((1, 2), keepdim=True)),
    "both statistics over another pair": replace(
        INSTANCE,
        mean=lambda x: x.mean((1, 3), keepdim=True),
        variance=lambda x: x.var((1, 3), unbiased=False, keepdim=True),
    ),
    "pooled by a window that leaves a row out": replace(
        INSTANCE, mean=lambda x: F.avg_pool2d(x, (x.size(2) - 1, x.size(3)), stride=x.size(2))
    ),
    "pooled over a border of zeros": replace(
        INSTANCE, mean=lambda x: F.avg_pool2d(x, x.size()[2:], stride=x.size(2), padding=1)
    ),
    "pooled by another divisor": replace(
        INSTANCE, mean=lambda x: F.avg_pool2d(x, x.size()[2:], divisor_override=x.size(2))
    ),
    "batch variance": replace(INSTANCE, variance=lambda x: x.var((0, 2, 3), False, True)),
    "batch mean": replace(INSTANCE, mean=lambda x: x.mean((0, 2, 3), True)),
    "a weight per sample": replace(INSTANCE, weight=lambda m: m.weight.view(-1, 1, 1, 1)),
    "a weight per row": replace(INSTANCE, weight=lambda m: m.weight.view(-1, 1)),
    "statistics without keepdim": replace(INSTANCE, mean=lambda x: x.mean(PLANE)),
    "statistics of the transposed": replace(
        INSTANCE, mean=lambda x: x.transpose(0, 1).mean(PLANE, keepdim=True)
    ),
    "statistics rolled through the batch": replace(
        INSTANCE, variance=lambda x: x.var(PLANE, False, True).roll(1, 0)
    ),
    "unbiased variance": replace(INSTANCE, variance=lambda x: x.var(PLANE, keepdim=True)),
}
STANDARDISED = convolved(lambda w: standardise((1, 2, 3), w))
WEIGHTS = {
    "statistics over the output channels": convolved(lambda w: standardise((0, 2, 3), w)),
    "statistics over everything": convolved(lambda w: standardise((0, 1, 2, 3), w)),
    "statistics over the kernel only": convolved(lambda w: standardise((2, 3), w)),
    "only centred": convolved(centred_only),
    "standardised by the input": standardised_by_the_input,
    "unbiased std and eps outside": convolved(
        lambda w: centred_only(w) / (w.std((1, 2, 3), keepdim=True) + EPS)
    ),
    "statistics under no_grad": convolved(
        lambda w: centred_only(w) / (w.detach().var((1, 2, 3), False, True) + EPS).sqrt()
    ),
}
AFFINES = {
    "no eps": frozen_from(lambda m: m.weight / m.running_var.sqrt(), right_shift),
    "eps outside the root": frozen_from(
        lambda m: m.weight / (m.running_var.sqrt() + EPS), right_shift
    ),
    "no root": frozen_from(lambda m: m.weight / (m.running_var + EPS), right_shift),
    "mean added": frozen_from(right_scale, lambda m, scale: m.bias + m.running_mean * scale),
    "mean not scaled": frozen_from(right_scale, lambda m, scale: m.bias - m.running_mean),
    "mean scaled by the weight": frozen_from(
        right_scale, lambda m, scale: m.bias - m.running_mean * m.weight
    ),
    "bias scaled too": frozen_from(right_scale, lambda m, s: (m.bias - m.running_mean) * s),
    "mean flipped": frozen_from(right_scale, lambda m, s: m.bias - m.running_mean.flip(0) * s),
}

TABLE = (
    *(NearMiss(f"group: {name}", each, GROUP, IMAGE) for name, each in GROUPS.items()),
    *(
        NearMiss(f"group: {name}", each, GROUP, IMAGE, norm_stays=True)
        for name, each in REORDERED.items()
    ),
    *(NearMiss(f"instance: {name}", each, INSTANCE, IMAGE) for name, each in INSTANCES.items()),
    *(NearMiss(f"weight: {name}", each, STANDARDISED, FILTERS) for name, each in WEIGHTS.items()),
    NearMiss("weight: transposed", transposed, STANDARDISED, FILTERS, norm_stays=True),
    NearMiss(
        "weight: used in the bias too",
        both_conv_and_bias,
        STANDARDISED,
        FILTERS,
        norm_stays=True,
    ),
    *(NearMiss(f"frozen: {name}", each, frozen, FROZEN) for name, each in AFFINES.items()),
    NearMiss("frozen: scale detached", frozen_detached, frozen, FROZEN, norm_stays=True),
    NearMiss("frozen: leaky after it", frozen_then_leaky, frozen, FROZEN, norm_stays=True),
    NearMiss(
        "frozen: after a linear map with half of its bias",
        linear_with_half_of_the_bias,
        linear_with_the_bias,
        FROZEN,
        norm_stays=True,
    ),
)
