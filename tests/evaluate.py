"""Evaluates a meaning at one index, straight from its definition: the algebra's oracle."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from bnrewrite.algebra.axes import Axis, Dims
from bnrewrite.algebra.expression import (
    Atom,
    Base,
    Function,
    Polynomial,
    Reduction,
    Sum,
)
from bnrewrite.algebra.meaning import Meaning
from bnrewrite.algebra.ring import Ring

Point = Mapping[Axis, int]

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "root": lambda x: math.sqrt(max(x, 0.0)), "abs": abs, "maximum": max, "minimum": min,
    "clamp_min": max, "clamp_max": min, "exp": math.exp, "log": math.log,
}  # fmt: skip


class Values(fx.Interpreter):
    """Runs a graph and keeps the value of every node."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = self.values[n] = super().run_node(n)
        return value


def value_at(ring: Ring, values: Mapping[fx.Node, Any], polynomial: Polynomial, at: Point) -> float:
    """The number that a polynomial is at an index."""
    return sum(
        float(coefficient)
        * float_product(_base_at(ring, values, ring.bases[b], at) ** float(e) for b, e in monomial)
        for monomial, coefficient in polynomial.terms.items()
    )


def float_product(factors: Iterable[float]) -> float:
    """A product that is a float also where there is no factor."""
    result = 1.0
    for factor in factors:
        result *= factor
    return result


def _base_at(ring: Ring, values: Mapping[fx.Node, Any], base: Base, at: Point) -> float:
    if isinstance(base, Atom):
        assert isinstance(base.source, fx.Node)
        return float(values[base.source][_position(base.index, at)])
    if isinstance(base, Sum):
        return value_at(ring, values, base.polynomial, at)
    if isinstance(base, Function):
        return float(FUNCTIONS[base.name](*(value_at(ring, values, a, at) for a in base.arguments)))
    assert isinstance(base, Reduction), f"{type(base).__name__} {getattr(base, 'size', '')}"
    bound = list(base.bound)
    inner = Polynomial({base.monomial: 1})
    found = [
        value_at(ring, values, inner, {**at, **dict(zip(bound, place, strict=True))})
        for place in itertools.product(*(range(int(a.size)) for a in bound))
    ]
    return sum(found) / len(found) if base.kind == "mean" else max(found)


def _position(index: Dims, at: Point) -> tuple[int, ...]:
    position = []
    for dim in index:
        place = 0
        for axis in dim:
            place = place * int(axis.size) + at[axis]
        position.append(place)
    return tuple(position)


def disagreement(
    ring: Ring, values: Mapping[fx.Node, Any], node: fx.Node, meaning: Meaning
) -> float:
    """The largest relative difference between a node's value and its meaning, at a few indices."""
    value = values[node]
    assert isinstance(value, torch.Tensor)
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for _ in range(3):
        at: dict[Axis, int] = {}
        position = []
        for dim, extent in zip(meaning.dims, value.shape, strict=True):
            if not dim:
                position.append(int(torch.randint(extent, (), generator=generator)))
                continue
            place = 0
            for axis in dim:
                at[axis] = int(torch.randint(int(axis.size), (), generator=generator))
                place = place * int(axis.size) + at[axis]
            position.append(place)
        expected = float(value[tuple(position)])
        found = value_at(ring, values, meaning.value, at)
        if math.isnan(expected):
            continue
        worst = max(worst, abs(found - expected) / max(1.0, abs(expected)))
    return worst
