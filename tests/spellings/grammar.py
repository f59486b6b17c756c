"""A little grammar of spellings: every choice of words below spells the same norm.

A sentence is the choice of how to write the mean, the variance, the root, the affine and the frame
(as it is, axes moved, rows flattened). A mutation replaces one word by a wrong one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .written import Shape, Written

EPS = 1e-3
Axes = tuple[int, ...]


def count(x: Tensor, axes: Axes) -> int:
    elements = 1
    for axis in axes:
        elements *= x.shape[axis]
    return elements


def nested_mean(x: Tensor, axes: Axes) -> Tensor:
    for axis in axes:
        x = x.mean(axis, keepdim=True)
    return x


def squeezed_mean(x: Tensor, axes: Axes) -> Tensor:
    mean = x.mean(axes)
    for axis in sorted(axis % x.dim() for axis in axes):
        mean = mean.unsqueeze(axis)
    return mean


def centred(x: Tensor, axes: Axes) -> Tensor:
    return x - x.mean(axes, keepdim=True)


MEANS: Mapping[str, Callable[[Tensor, Axes], Tensor]] = {
    "mean": lambda x, axes: x.mean(axes, keepdim=True),
    "sum over count": lambda x, axes: x.sum(axes, keepdim=True) / count(x, axes),
    "means of means": nested_mean,
    "var_mean": lambda x, axes: torch.var_mean(x, axes, keepdim=True)[1],
    "squeezed": squeezed_mean,
    "expanded": lambda x, axes: x.mean(axes, True).expand_as(x),
}
VARIANCES: Mapping[str, Callable[[Tensor, Axes], Tensor]] = {
    "var": lambda x, axes: x.var(axes, unbiased=False, keepdim=True),
    "var_mean": lambda x, axes: torch.var_mean(x, axes, correction=0, keepdim=True)[0],
    "std squared": lambda x, axes: x.std(axes, correction=0, keepdim=True) ** 2,
    "mean of squares": lambda x, axes: centred(x, axes).square().mean(axes, keepdim=True),
    "sum of products": lambda x, axes: (
        (centred(x, axes) * centred(x, axes)).sum(axes, keepdim=True) / count(x, axes)
    ),
    "second moment": lambda x, axes: (
        x.pow(2).mean(axes, keepdim=True) - x.mean(axes, keepdim=True).pow(2)
    ),
    "unbiased, brought back": lambda x, axes: (
        x.var(axes, keepdim=True) * (count(x, axes) - 1) / count(x, axes)
    ),
    "length squared": lambda x, axes: (
        torch.linalg.vector_norm(centred(x, axes), dim=axes, keepdim=True).square() / count(x, axes)
    ),
}
QUOTIENTS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sqrt": lambda c, v: c / torch.sqrt(v + EPS),
    "rsqrt": lambda c, v: c * torch.rsqrt(v + EPS),
    "power": lambda c, v: (v + EPS) ** -0.5 * c,
    "half power": lambda c, v: c / (v + EPS).pow(0.5),
    "one over": lambda c, v: c * (1.0 / (EPS + v).sqrt()),
    "reciprocal": lambda c, v: c.mul(v.add(EPS).sqrt().reciprocal()),
}
AFFINES: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "after": lambda y, w, b: y * w + b,
    "weight first": lambda y, w, b: b + w * y,
    "addcmul": lambda y, w, b: torch.addcmul(b, y, w),
    "in place": lambda y, w, b: y.mul(w).add_(b),
    "around one": lambda y, w, b: y + (w - 1) * y + b,
    "shifted": lambda y, w, b: (y + b / w) * w,
}
EXACT_AFFINES = ("after", "weight first", "addcmul", "in place")  # those that a native op can take
WRONG_MEANS: Mapping[str, Callable[[Tensor, Axes], Tensor]] = {
    "detached": lambda x, axes: x.mean(axes, keepdim=True).detach(),
    "other axes": lambda x, axes: x.mean([axis - 1 for axis in axes], keepdim=True),
    "no count": lambda x, axes: x.sum(axes, keepdim=True),
    "first half": lambda x, axes: x[: x.shape[0] // 2].mean(axes, keepdim=True).mean(0, True),
    "flipped": lambda x, axes: x.relu().mean(axes, keepdim=True),
}
WRONG_VARIANCES: Mapping[str, Callable[[Tensor, Axes], Tensor]] = {
    "detached": lambda x, axes: x.var(axes, False, True).detach(),
    "unbiased": lambda x, axes: x.var(axes, keepdim=True),
    "second moment only": lambda x, axes: x.square().mean(axes, keepdim=True),
    "sum": lambda x, axes: centred(x, axes).square().sum(axes, keepdim=True),
    "of another tensor": lambda x, axes: x.sigmoid().var(axes, False, True),
}
WRONG_QUOTIENTS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "eps outside": lambda c, v: c / (v.sqrt() + EPS),
    "no root": lambda c, v: c / (v + EPS),
    "no eps": lambda c, v: c * v.rsqrt(),
    "multiplied": lambda c, v: c * (v + EPS).sqrt(),
    "lower limit": lambda c, v: c / v.clamp(min=EPS).sqrt(),
}
WRONG_AFFINES: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "bias first": lambda y, w, b: (y + b) * w,
    "swapped": lambda y, w, b: y * b + w,
    "twice": lambda y, w, b: y * w * w + b,
    "subtracted": lambda y, w, b: y * w - b,
    "detached": lambda y, w, b: y * w.detach() + b,
}
FRAMES = ("as it is", "moved", "flattened")


@dataclass(frozen=True, eq=False)  # one object per norm: its hash is its identity
class Norm:
    """What a sentence spells: the axes of a (4, 6, 5, 3) input, and where its parameters lie."""

    name: str
    kinds: tuple[str, ...]
    axes: Axes
    parameters: Mapping[str, Shape] = field(
        default_factory=lambda: {"weight": (1, 6, 1, 1), "bias": (1, 6, 1, 1)}
    )
    shape: Shape = (4, 6, 5, 3)


NORMS = (
    Norm("batch", ("batch_norm",), (0, 2, 3)),
    Norm("instance", ("instance_norm",), (2, 3)),
    Norm("layer", ("layer_norm",), (-1,), {"weight": (3,), "bias": (3,)}),
    Norm(
        "layer of a plane",
        ("layer_norm", "instance_norm"),  # one formula, where the affine is not a part of it
        (-2, -1),
        {"weight": (5, 3), "bias": (5, 3)},
    ),
)


@dataclass(frozen=True)
class Sentence:
    """One spelling: a word from each list."""

    norm: Norm
    mean: str = "mean"
    variance: str = "var"
    quotient: str = "sqrt"
    affine: str = "after"
    frame: str = "as it is"

    def build(self) -> Written:
        return Written(self, self.norm.parameters)

    def __call__(self, m: Written, x: Tensor) -> Tensor:
        axes = self.norm.axes
        if self.frame == "moved" and "layer_norm" not in self.norm.kinds:
            moved = tuple({0: 0, 2: 1, 3: 2}[axis] for axis in axes)
            y = self._normalised(x.permute(0, 2, 3, 1), moved).permute(0, 3, 1, 2)
        elif self.frame == "flattened" and axes[-1] in (-1, 3) and len(axes) > 1:
            kept = (0, 2) if axes[0] == 0 else (2,)
            y = self._normalised(x.flatten(2), kept).view_as(x)
        else:
            y = self._normalised(x, axes)
        affine = AFFINES.get(self.affine) or WRONG_AFFINES[self.affine.removeprefix("wrong: ")]
        return affine(y, m.weight, m.bias)

    def _normalised(self, x: Tensor, axes: Axes) -> Tensor:
        mean = MEANS.get(self.mean) or WRONG_MEANS[self.mean.removeprefix("wrong: ")]
        variance = (
            VARIANCES.get(self.variance) or WRONG_VARIANCES[self.variance.removeprefix("wrong: ")]
        )
        quotient = (
            QUOTIENTS.get(self.quotient) or WRONG_QUOTIENTS[self.quotient.removeprefix("wrong: ")]
        )
        return quotient(x - mean(x, axes), variance(x, axes))


WRONG_WORDS = (
    *(("mean", f"wrong: {word}") for word in WRONG_MEANS),
    *(("variance", f"wrong: {word}") for word in WRONG_VARIANCES),
    *(("quotient", f"wrong: {word}") for word in WRONG_QUOTIENTS),
    *(("affine", f"wrong: {word}") for word in WRONG_AFFINES),
)
