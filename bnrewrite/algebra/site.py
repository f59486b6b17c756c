"""Norm sites: nodes whose meaning is ``scale * x + shift`` with moments of x in the scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from .axes import Axis, Dims, axes_of
from .calls import is_tensor
from .expression import (
    Atom,
    Exponent,
    Monomial,
    Polynomial,
    Reduction,
    added,
    inverse,
)
from .meaning import Reading
from .ring import Ring


@dataclass(frozen=True)
class Moments:
    """The statistics of a tensor over axes, as bases of the ring."""

    mean: Polynomial  # E[x]
    square: Polynomial  # E[x^2]

    def variance(self, ring: Ring) -> Polynomial:
        """E[x^2] - E[x]^2."""
        return added(self.square, ring.multiply(self.mean, self.mean), -1)


@dataclass(frozen=True)
class Linear:
    """``value = scale * x + shift`` at a node.

    Attributes:
        node: the node with this meaning.
        source: the normalised tensor.
        index: the axes of the source's dimensions.
        dims: the axes of the node's dimensions; none for one along which the tensor was expanded.
        scale, shift: free of the source outside reductions.
        detached: no gradient flows through the whole value.
    """

    node: fx.Node
    source: fx.Node
    index: Dims
    dims: Dims
    scale: Polynomial
    shift: Polynomial
    detached: bool

    @property
    def axes(self) -> frozenset[Axis]:
        """All axes of the normalised tensor."""
        return frozenset(axes_of(self.index))


def linear_forms(reading: Reading, node: fx.Node) -> list[Linear]:
    """The tensors in which a node's meaning is of degree one, with their coefficients."""
    meaning = reading.formula(node)
    if meaning is None or not meaning.value.terms or not is_tensor(node):
        return []
    ring = reading.ring
    value, detached = attached(ring, meaning.value)
    forms = []
    for source in sorted(ring.raw(value), key=lambda s: (s not in reading.anchors, ring.order(s))):
        if isinstance(source, fx.Node):
            form = _linear_in(ring, value, source)
            if form is not None and set(axes_of(form[0])) == set(axes_of(meaning.dims)):
                index, scale, shift = form
                forms.append(Linear(node, source, index, meaning.dims, scale, shift, detached))
    return forms


def attached(ring: Ring, value: Polynomial) -> tuple[Polynomial, bool]:
    """A value of which every part is detached, as an attached value; else the value itself."""
    if _stops(ring, value) != {True}:
        return value, False
    return ring.attached(value), True


def _stops(ring: Ring, value: Polynomial) -> set[bool]:
    """Whether the differentiable atoms inside are stopped."""
    return {
        base.stopped
        for base in ring.within(value, reduced=True)
        if isinstance(base, Atom) and ring.differentiable(base.source)
    }


def mixes_gradients(ring: Ring, linear: Linear) -> bool:
    """Whether a part of the formula is detached and another is not."""
    x = ring.atom(linear.source, linear.index)
    whole = added(ring.multiply(linear.scale, x), linear.shift)
    return True in _stops(ring, whole)


def _linear_in(
    ring: Ring, value: Polynomial, source: fx.Node
) -> tuple[Dims, Polynomial, Polynomial] | None:
    scale: dict[Monomial, Any] = {}
    shift: dict[Monomial, Any] = {}
    atom: Atom | None = None
    for monomial, coefficient in value.terms.items():
        here = [(b, e) for b, e in monomial if source in ring.bases[b].raw]
        if not here:
            shift[monomial] = coefficient
            continue
        base = ring.bases[here[0][0]]
        if len(here) != 1 or here[0][1] != 1 or not isinstance(base, Atom) or base.stopped:
            return None
        if atom is not None and atom is not base:
            return None
        atom = base
        rest = tuple(item for item in monomial if item != here[0])
        scale[rest] = coefficient
    if atom is None:
        return None
    return atom.index, Polynomial(scale), Polynomial(shift)


def reduced_axes(ring: Ring, linear: Linear) -> frozenset[Axis] | None:
    """The axes over which the moments of the source in the scale are taken, if they agree."""
    found: set[frozenset[Axis]] = set()
    for base in ring.within(linear.scale):
        if not isinstance(base, Reduction) or not base.axes <= linear.axes:
            continue
        if any(ring.bases[b].raw == {linear.source} for b, _ in base.monomial):
            found.add(linear.axes - base.axes)
    return found.pop() if len(found) == 1 else None


def moments_of(ring: Ring, linear: Linear, over: frozenset[Axis]) -> Moments:
    """E[x] and E[x^2] of the source over axes."""
    x = ring.atom(linear.source, linear.index)
    return Moments(ring.mean(x, over), ring.mean(ring.multiply(x, x), over))


def factored(
    ring: Ring, linear: Linear
) -> tuple[tuple[tuple[int, Exponent], ...], Polynomial] | None:
    """``scale = F * W``: the part made of moments of the source, and a factor free of them."""
    parts: set[Monomial] = set()
    rest: dict[Monomial, Any] = {}
    for monomial, coefficient in linear.scale.terms.items():
        of_source = tuple(i for i in monomial if linear.source in ring.bases[i[0]].moments)
        parts.add(of_source)
        rest[tuple(i for i in monomial if i not in of_source)] = coefficient
    if len(parts) != 1:
        return None
    return parts.pop(), Polynomial(rest)


def split_shift(ring: Ring, linear: Linear, weight: Polynomial) -> tuple[Polynomial, Polynomial]:
    """``shift = inner * weight + rest``: what is added before the weight multiplies, and after.

    The inner part holds the moments of the source. Without such a factor it is zero.
    """
    rest: dict[Monomial, Any] = {}
    held: dict[Monomial, Any] = {}
    for monomial, coefficient in linear.shift.terms.items():
        has_moment = any(linear.source in ring.bases[b].moments for b, _ in monomial)
        (held if has_moment else rest)[monomial] = coefficient
    first = min(weight.terms)
    alone = len(weight.terms) == 1
    inner = Polynomial(
        {
            tuple(i for i in m if i not in first): c * inverse(weight.terms[first])
            for m, c in held.items()
            if set(first) <= set(m) and (alone or _unmoved(ring, linear, m) == set(first))
        }
    )
    if inner.terms and ring.multiply(inner, weight) == Polynomial(held):
        return inner, Polynomial(rest)
    return Polynomial({}), linear.shift


def _unmoved(ring: Ring, linear: Linear, monomial: Monomial) -> set[tuple[int, Exponent]]:
    """The factors that hold no moment of the source."""
    return {i for i in monomial if linear.source not in ring.bases[i[0]].moments}
