"""A norm in parts, so that a near miss is one part replaced, and the row that says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from spellings import Formula, Shape, Written, random_input
from torch import Tensor

EPS = 1e-2


@dataclass(frozen=True)
class Recipe:
    """(x - mean) / root(variance) * weight + bias, every part of which can be replaced.

    Attributes:
        mean: of x, in a shape that broadcasts to x.
        variance: of x, likewise; the divisor's square before eps.
        weight: the scale, in a shape that broadcasts to x.
        bias: the shift, likewise.
        root: what divides, from the variance.
        centre: from x and its mean.
        divide: from the centred x and the root.
        affine: from the normalised x, weight and bias.
    """

    mean: Callable[[Tensor], Tensor]
    variance: Callable[[Tensor], Tensor]
    weight: Callable[[Written], Tensor]
    bias: Callable[[Written], Tensor]
    root: Callable[[Tensor], Tensor] = lambda variance: (variance + EPS).sqrt()
    centre: Callable[[Tensor, Tensor], Tensor] = torch.sub
    divide: Callable[[Tensor, Tensor], Tensor] = torch.div
    affine: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda y, weight, bias: y * weight + bias

    def __call__(self, m: Written, x: Tensor) -> Tensor:
        normal = self.divide(self.centre(x, self.mean(x)), self.root(self.variance(x)))
        return self.affine(normal, self.weight(m), self.bias(m))


@dataclass(frozen=True, eq=False)  # one object per setting: its hash is its identity
class Setting:
    """Where a near miss and its twin run: shapes of the input, the parameters and the buffers."""

    shape: Shape
    parameters: Mapping[str, Shape] = field(default_factory=dict)
    buffers: Mapping[str, Shape] = field(default_factory=dict)

    def build(self, formula: Formula) -> Written:
        return Written(formula, self.parameters, self.buffers, seed=3)

    def batches(self, count: int) -> list[Tensor]:
        source = torch.Generator().manual_seed(5)
        return [random_input(self.shape, source) for _ in range(count)]


@dataclass(frozen=True)
class NearMiss:
    """One change to a norm that has a name.

    Attributes:
        change: what was changed, in words.
        formula: the code with the change.
        twin: the code without it.
        setting: shapes under which both run; square where a broadcast could go the wrong way.
        norm_stays: the norm itself is untouched and the change stands beside it, so that a report
            may rightly show the twin's site; the numbers are checked in any case.
    """

    change: str
    formula: Formula
    twin: Formula
    setting: Setting
    norm_stays: bool = False
