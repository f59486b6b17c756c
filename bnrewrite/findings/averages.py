"""Running statistics: buffers whose new value is a weighted sum of the old one and a moment.

    mean        r' = k r + f E[x]
    variance    r' = k r + f (E[x^2] - E[x]^2)

k says what the old value weighs, f what the batch does, with the correction of its variance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from bnrewrite.algebra import Reading
from bnrewrite.algebra.axes import Axis, Dims, Opaque
from bnrewrite.algebra.calls import shape_of
from bnrewrite.algebra.expression import (
    ZERO,
    Atom,
    Number,
    Polynomial,
    Reduction,
    added,
    factor_of,
    scaled,
)
from bnrewrite.algebra.ring import Ring


@dataclass(frozen=True)
class Average:
    """A running statistic.

    Attributes:
        buffer: its placeholder.
        node: its new value.
        source: the tensor that the statistic is taken of.
        kept: what the old value weighs, k.
        factor: what the moment weighs, f.
        is_variance: whether the moment is a variance; else it is a mean.
        count: the number of elements that the moment is taken over, n.
        batch: the extent of the tensor's first dimension.
        dims: the axes of the buffer's dimensions.
        index: the axes of the tensor's dimensions.
        bound: those that the moment is taken over.
    """

    buffer: fx.Node
    node: fx.Node
    source: fx.Node
    kept: Number
    factor: Polynomial
    is_variance: bool
    count: Polynomial
    batch: Polynomial
    dims: Dims
    index: Dims
    bound: frozenset[Axis]


def averages(reading: Reading, updates: Sequence[tuple[fx.Node, fx.Node]]) -> list[Average]:
    """The running statistics among updates.

    Args:
        reading: the meanings of the graph.
        updates: placeholders and their new values.
    """
    found = []
    for buffer, node in updates:
        try:
            average = _average(reading, buffer, node)
        except Opaque:  # its formula grows beyond the algebra
            continue
        if average is not None:
            found.append(average)
    return found


def _average(reading: Reading, buffer: fx.Node, node: fx.Node) -> Average | None:
    meaning = reading.formula(node)
    if meaning is None:
        return None
    ring = reading.ring
    value = ring.attached(meaning.value)
    kept, rest = _taken_apart(ring, value, buffer)
    if kept is None:
        return None
    moments = [
        base
        for base in map(ring.bases.__getitem__, sorted(rest.bases()))
        if isinstance(base, Reduction) and base.kind == "mean" and len(base.monomial) == 1
    ]
    for base in sorted(moments, key=lambda each: -float(each.monomial[0][1])):
        ((inner, power),) = base.monomial
        atom = ring.bases[inner]
        if not isinstance(atom, Atom) or not isinstance(atom.source, fx.Node):
            continue
        factor = factor_of(rest, base.id)
        moment = _moment(ring, moments, base)
        if power not in (1, 2) or not factor.terms or ring.moments(factor):
            continue
        if added(rest, ring.multiply(factor, moment), -1) != ZERO:
            continue
        return Average(
            buffer,
            node,
            atom.source,
            kept,
            factor,
            power == 2,
            ring.count(base.bound),
            ring.extent(shape_of(atom.source)[0]),
            meaning.dims,
            atom.index,
            base.bound,
        )
    return None


def _taken_apart(
    ring: Ring, value: Polynomial, buffer: fx.Node
) -> tuple[Number | None, Polynomial]:
    """What the old value of a buffer weighs, None where that is no number; and the rest."""
    kept: Number = 0
    rest = dict(value.terms)
    for monomial in value.terms:
        if not any(buffer in ring.bases[base].raw for base, _ in monomial):
            continue
        if len(monomial) != 1 or monomial[0][1] != 1:
            return None, value
        kept += rest.pop(monomial)
    return kept, Polynomial(rest)


def _moment(ring: Ring, moments: Sequence[Reduction], base: Reduction) -> Polynomial:
    """E[x], or the variance that belongs to E[x^2]."""
    own = Polynomial({((base.id, 1),): 1})
    ((inner, power),) = base.monomial
    means = [each for each in moments if each.monomial == ((inner, 1),)]
    if power != 2 or not means:
        return own
    mean = Polynomial({((means[0].id, 1),): 1})
    return added(own, scaled(ring.multiply(mean, mean), -1))
