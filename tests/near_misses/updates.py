"""BatchNorm with running statistics: changes of what is remembered, and of what normalises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from spellings import Formula, Written
from torch import Tensor

from .recipe import EPS, NearMiss, Setting
from .statistics import AXES

SETTING = Setting(
    (4, 4, 4, 4),
    {"weight": (4,), "bias": (4,)},
    {"running_mean": (4,), "running_var": (4,), "num_batches_tracked": ()},
)
Update = Callable[[Tensor, Tensor], Tensor]
MOMENTUM = 0.1


def apply(m: Written, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    shape = (1, -1, 1, 1)
    normal = (x - mean.view(shape)) / (var.view(shape) + EPS).sqrt()
    return normal * m.weight.view(shape) + m.bias.view(shape)


def blend(old: Tensor, new: Tensor) -> Tensor:
    return (1 - MOMENTUM) * old + MOMENTUM * new


@dataclass(frozen=True)
class Running:
    """A BatchNorm whose updates, and whose choice of statistics, can be replaced.

    Attributes:
        remember_mean: the new running mean, from the old one and the batch.
        remember_var: the new running variance, likewise.
        train: the statistics that normalise a training batch: (module, mean, variance).
        evaluate: the statistics that normalise in eval mode: (module, x).
        in_eval: the buffers are updated in eval mode, not in training.
        step: what the counter grows by.
    """

    remember_mean: Update = lambda old, x: blend(old, x.mean(AXES))
    remember_var: Update = lambda old, x: blend(old, x.var(AXES))
    train: Callable[[Written, Tensor, Tensor], tuple[Tensor, Tensor]] = lambda m, mean, var: (
        mean,
        var,
    )
    evaluate: Callable[[Written, Tensor], tuple[Tensor, Tensor]] = lambda m, x: (
        m.running_mean,
        m.running_var,
    )
    in_eval: bool = False
    step: int = 1

    def __call__(self, m: Written, x: Tensor) -> Tensor:
        if m.training != self.in_eval:
            with torch.no_grad():
                m.num_batches_tracked += self.step
                m.running_mean = self.remember_mean(m.running_mean, x)
                m.running_var = self.remember_var(m.running_var, x)
        if m.training:
            mean, var = self.train(m, x.mean(AXES), x.var(AXES, unbiased=False))
        else:
            mean, var = self.evaluate(m, x)
        return apply(m, x, mean, var)


def variance_around_the_running_mean(m: Written, x: Tensor) -> Tensor:
    if not m.training:
        return apply(m, x, m.running_mean, m.running_var)
    mean, var = x.mean(AXES), x.var(AXES, unbiased=False)
    with torch.no_grad():
        m.num_batches_tracked += 1
        m.running_mean.mul_(1 - MOMENTUM).add_(mean, alpha=MOMENTUM)
        apart = (x - m.running_mean[:, None, None]).square().sum(AXES) / 63
        m.running_var.mul_(1 - MOMENTUM).add_(apart, alpha=MOMENTUM)
    return apply(m, x, mean, var)


def updated_twice(m: Written, x: Tensor) -> Tensor:
    if not m.training:
        return apply(m, x, m.running_mean, m.running_var)
    mean, var = x.mean(AXES), x.var(AXES, unbiased=False)
    with torch.no_grad():
        m.num_batches_tracked += 1
        for _ in range(2):
            m.running_mean.lerp_(mean, MOMENTUM)
        m.running_var.lerp_(x.var(AXES), MOMENTUM)
    return apply(m, x, mean, var)


def mean_read_after_its_update(m: Written, x: Tensor) -> Tensor:
    y = TWIN(m, x)
    return y + m.running_mean.clone().view(1, -1, 1, 1)


def one_buffer_for_both(m: Written, x: Tensor) -> Tensor:
    if not m.training:
        return apply(m, x, m.running_mean, m.running_var)
    mean, var = x.mean(AXES), x.var(AXES, unbiased=False)
    with torch.no_grad():
        m.num_batches_tracked += 1
        m.running_mean.lerp_(mean, MOMENTUM)
        m.running_mean.lerp_(x.var(AXES), MOMENTUM)
    return apply(m, x, mean, var)


TWIN = Running()
REMEMBERED: dict[str, Formula] = {
    "another momentum for the variance": replace(
        TWIN, remember_var=lambda old, x: 0.8 * old + 0.2 * x.var(AXES)
    ),
    "momentum the other way round": replace(
        TWIN,
        remember_mean=lambda old, x: MOMENTUM * old + (1 - MOMENTUM) * x.mean(AXES),
        remember_var=lambda old, x: MOMENTUM * old + (1 - MOMENTUM) * x.var(AXES),
    ),
    "shares that do not add to one": replace(
        TWIN, remember_mean=lambda old, x: 0.9 * old + 0.2 * x.mean(AXES)
    ),
    "variance into the running mean": replace(
        TWIN, remember_mean=lambda old, x: blend(old, x.var(AXES))
    ),
    "mean into the running variance": replace(
        TWIN, remember_var=lambda old, x: blend(old, x.mean(AXES).abs())
    ),
    "biased variance remembered": replace(
        TWIN, remember_var=lambda old, x: blend(old, x.var(AXES, unbiased=False))
    ),
    "standard deviation remembered": replace(
        TWIN, remember_var=lambda old, x: blend(old, x.std(AXES))
    ),
    "variance corrected by the batch size": replace(
        TWIN, remember_var=lambda old, x: blend(old, x.var(AXES, unbiased=False) * 4 / 3)
    ),
    "variance corrected twice": replace(
        TWIN, remember_var=lambda old, x: blend(old, x.var(AXES) * 64 / 63)
    ),
    "mean of half of the batch remembered": replace(
        TWIN, remember_mean=lambda old, x: blend(old, x[:2].mean(AXES))
    ),
    "mean flipped before it is remembered": replace(
        TWIN, remember_mean=lambda old, x: blend(old, x.mean(AXES).flip(0))
    ),
    "mean over other axes remembered": replace(
        TWIN, remember_mean=lambda old, x: blend(old, x.mean((0, 1, 2)))
    ),
    "mean only remembered": replace(TWIN, remember_var=lambda old, x: old * 1.0),
    "squared momentum": replace(
        TWIN, remember_mean=lambda old, x: old + MOMENTUM**2 * (x.mean(AXES) - old)
    ),
    "running mean clamped": replace(
        TWIN, remember_mean=lambda old, x: blend(old, x.mean(AXES)).clamp(min=-0.1, max=0.1)
    ),
    "sum for the mean remembered": replace(
        TWIN, remember_mean=lambda old, x: blend(old, x.sum(AXES))
    ),
    "largest remembered": replace(TWIN, remember_mean=lambda old, x: blend(old, x.amax(AXES))),
    "counter grows by two": replace(TWIN, step=2),
    "updated in eval mode, not in training": replace(TWIN, in_eval=True),
    "variance around the running mean remembered": variance_around_the_running_mean,
    "running mean updated twice": updated_twice,
    "both statistics in one buffer": one_buffer_for_both,
    "running mean read after its update": mean_read_after_its_update,
    "eval swaps the buffers": replace(
        TWIN, evaluate=lambda m, x: (m.running_var, m.running_mean.abs())
    ),
    "eval uses batch statistics": replace(
        TWIN, evaluate=lambda m, x: (x.mean(AXES), x.var(AXES, unbiased=False))
    ),
    "eval scales the variance": replace(
        TWIN, evaluate=lambda m, x: (m.running_mean, m.running_var * 64 / 63)
    ),
}
NORMALISED = {
    "training by the updated statistics": replace(
        TWIN, train=lambda m, mean, var: (m.running_mean, m.running_var)
    ),
    "training by the updated mean only": replace(
        TWIN, train=lambda m, mean, var: (m.running_mean, var)
    ),
    "training by the updated variance only": replace(
        TWIN, train=lambda m, mean, var: (mean, m.running_var)
    ),
    "training by a mix of batch and running mean": replace(
        TWIN, train=lambda m, mean, var: ((mean + m.running_mean) / 2, var)
    ),
    "training by the unbiased variance": replace(
        TWIN, train=lambda m, mean, var: (mean, var * 64 / 63)
    ),
    "training with the larger variance": replace(
        TWIN, train=lambda m, mean, var: (mean, torch.maximum(var, m.running_var))
    ),
}

TABLE = (
    *(
        NearMiss(f"running: {name}", formula, TWIN, SETTING, norm_stays=True)
        for name, formula in REMEMBERED.items()
    ),
    *(NearMiss(f"running: {name}", formula, TWIN, SETTING) for name, formula in NORMALISED.items()),
)
