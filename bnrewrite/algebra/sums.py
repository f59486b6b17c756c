"""The user's own sums of tensors that are given: what was multiplied out is put together again.

    (x - M) / s * (w1 - w2)  reads  x w1 / s - x w2 / s - ...

Written like that it would have lost the digits that ``w1 - w2`` keeps where the two are alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from .axes import Axis, Dim, Dims, substitute
from .calls import is_tensor
from .expression import Atom, Function, Monomial, Number, Polynomial, Sum, inverse, magnitude
from .meaning import Reading
from .ring import Ring
from .site import attached


@dataclass(frozen=True)
class Whole:
    """A sum that the user's code has as a tensor.

    Attributes:
        node: the tensor.
        dims: its dimensions in the axes of the formula that it is looked for in.
        value: the sum.
        base: the same as one base.
    """

    node: fx.Node
    dims: Dims
    value: Polynomial
    base: Sum

    def taken_out_of(self, polynomial: Polynomial) -> Polynomial:
        """The same polynomial with ``q * value`` as ``q * base`` wherever all terms are there."""
        lead = max(self.value.terms, key=len)
        for monomial, coefficient in polynomial.terms.items():
            factor = coefficient * inverse(self.value.terms[lead])
            quotient = _quotient(monomial, lead)
            if quotient is None or not self._is_whole_in(quotient):
                continue
            if not quotient and magnitude(factor) == 1 and len(self.value.terms) == 2:
                continue  # there is only one way to add two terms
            found = {_product(quotient, m): c * factor for m, c in self.value.terms.items()}
            if all(_close(polynomial.terms.get(m, 0), c) for m, c in found.items()):
                terms = {m: c for m, c in polynomial.terms.items() if m not in found}
                whole = _product(quotient, ((self.base.id, 1),))
                terms[whole] = terms.get(whole, 0) + factor
                return self.taken_out_of(Polynomial(terms))
        return polynomial

    def _is_whole_in(self, monomial: Monomial) -> bool:
        exponent = dict(monomial).get(self.base.id, 0)
        return isinstance(exponent, int) and exponent >= 0


def wholes(reading: Reading, polynomial: Polynomial, before: fx.Node) -> Iterator[Whole]:
    """The user's sums in front of a site that may be in a polynomial, the longest first."""
    ring = reading.ring
    known = _sums(reading)
    nodes = {
        node for source in ring.raw(polynomial) for node in known.get(source, ()) if node < before
    }
    if not nodes:
        return
    formula = reading.formula(before)
    detached = formula is not None and attached(ring, formula.value)[1]
    places = {(a.source, a.stopped): a for a in _atoms(ring, polynomial)}
    for node in sorted(nodes, key=lambda n: (-len(reading.meanings[n].value.terms), n)):
        meaning = reading.meanings[node]
        value = ring.attached(meaning.value) if detached else meaning.value
        moves = _moves(ring, value, places)
        if moves is not None and len(value.terms) <= len(polynomial.terms):
            value = ring.substitute(value, moves)
            yield Whole(node, substitute(meaning.dims, moves), value, ring.sum(value))


def _sums(reading: Reading) -> dict[object, list[fx.Node]]:
    """All sums of a graph that hold no statistic, by the tensors inside."""
    if reading.sums is None:
        reading.sums = {}
        seen: set[Polynomial] = set()
        for node, meaning in reading.meanings.items():
            value = meaning.value
            if len(value.terms) < 2 or node.op != "call_function" or not is_tensor(node):
                continue
            if value not in seen and not reading.ring.moments(value):
                seen.add(value)
                for source in reading.ring.raw(value):
                    reading.sums.setdefault(source, []).append(node)
    return reading.sums


def _atoms(ring: Ring, polynomial: Polynomial) -> Iterator[Atom]:
    """The atoms outside of every reduction."""
    for base_id in sorted(polynomial.bases()):
        base = ring.bases[base_id]
        if isinstance(base, Atom):
            yield base
        elif isinstance(base, Sum):
            yield from _atoms(ring, base.polynomial)
        elif isinstance(base, Function):
            for argument in base.arguments:
                yield from _atoms(ring, argument)


def _moves(
    ring: Ring, value: Polynomial, places: dict[tuple[object, bool], Atom]
) -> dict[Axis, Dim] | None:
    """The axes of a sum as the axes of the formula that has the same tensors; None without."""
    moves: dict[Axis, Dim] = {}
    for atom in _atoms(ring, value):
        place = places.get((atom.source, atom.stopped))
        if place is None:
            return None
        for mine, other in zip(atom.index, place.index, strict=True):
            parts = [(axis,) for axis in other] if len(mine) == len(other) else [other]
            if len(mine) != len(parts):
                return None
            pairs = list(zip(mine, parts, strict=True))
            if any(moves.setdefault(axis, dim) != dim for axis, dim in pairs):
                return None
    return {axis: dim for axis, dim in moves.items() if dim != (axis,)}


def _quotient(monomial: Monomial, divisor: Monomial) -> Monomial | None:
    """``monomial / divisor`` where nothing is left below the fraction bar that was not there."""
    exponents = dict(monomial)
    for base, exponent in divisor:
        rest = exponents.pop(base, 0) - exponent
        if rest * exponent < 0:
            return None
        if rest:
            exponents[base] = rest
    return tuple(sorted(exponents.items()))


def _product(left: Monomial, right: Monomial) -> Monomial:
    exponents = dict(left)
    for base, exponent in right:
        exponents[base] = exponents.get(base, 0) + exponent
    return tuple(sorted((b, e) for b, e in exponents.items() if e))


def _close(left: Number, right: Number) -> bool:
    return math.isclose(float(left), float(right), rel_tol=1e-13)
