"""The parts of a norm whose statistics are stored."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from .expression import Atom, Number, Polynomial, Sum, added
from .ring import Ring
from .site import Linear


@dataclass(frozen=True)
class Frozen:
    """``(x - mean) (variance + eps)^(-1/2) weight + bias``, no gradient in the statistics."""

    mean: Atom
    variance: Atom
    eps: Number
    weight: Polynomial
    bias: Polynomial


def frozen(ring: Ring, linear: Linear) -> Frozen | None:
    """The parts of a formula that has exactly these, else None."""
    divided = _divided(ring, linear.scale)
    if divided is None:
        return None
    variance, eps, weight = divided
    for source in ring.raw(linear.shift):
        mean = _atom_of(ring, linear.shift, source)
        if mean is None:
            continue
        product = ring.multiply(linear.scale, Polynomial({((mean.id, 1),): 1}))
        bias = added(linear.shift, product)
        if not ring.raw(bias) & {source, variance.source}:
            return Frozen(mean, variance, eps, weight, bias)
    return None


def _divided(ring: Ring, scale: Polynomial) -> tuple[Atom, Number, Polynomial] | None:
    """V, eps and w of ``(v + eps)^(-1/2) w``."""
    common = set.intersection(*(set(monomial) for monomial in scale.terms))
    for item in common:
        base, exponent = ring.bases[item[0]], item[1]
        if exponent != Fraction(-1, 2):
            continue
        inside = base.polynomial if isinstance(base, Sum) else Polynomial({((base.id, 1),): 1})
        eps = inside.terms.get((), 0)
        rest = [(m, c) for m, c in inside.terms.items() if m]
        if len(rest) != 1 or eps < 0:
            continue
        ((monomial, coefficient),) = rest
        variance = ring.bases[monomial[0][0]]
        single = len(monomial) == 1 and monomial[0][1] == 1 and coefficient == 1
        if single and isinstance(variance, Atom) and _is_constant(ring, variance):
            weight = {tuple(i for i in m if i != item): c for m, c in scale.terms.items()}
            return variance, eps, Polynomial(weight)
    return None


def _atom_of(ring: Ring, value: Polynomial, source: object) -> Atom | None:
    """The one base that a stored tensor is in a formula."""
    bases = [ring.bases[b] for b in value.bases() if source in ring.bases[b].raw]
    if len(bases) == 1 and isinstance(bases[0], Atom) and _is_constant(ring, bases[0]):
        return bases[0]
    return None


def _is_constant(ring: Ring, atom: Atom) -> bool:
    return atom.stopped or not ring.differentiable(atom.source)
