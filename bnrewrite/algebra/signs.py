"""What is known of signs: a variance is never negative, with an eps it is positive."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sympy

from .axes import Size
from .expression import Extent, Monomial, Number, Polynomial, Reduction, is_even

if TYPE_CHECKING:
    from .arithmetic import Arithmetic


def nonnegative(ring: Arithmetic, polynomial: Polynomial) -> bool:
    """Whether the value is proven to be at least zero.

    Every term is a product of squares and nonnegative bases, or a ``-a E[f]^2`` for which there is
    an ``a' E[f^2]`` with a' >= a (Jensen's inequality: a variance).
    """
    if _is_positive_size(ring, polynomial):
        return True
    budget = dict(polynomial.terms)
    for monomial, coefficient in polynomial.terms.items():
        if coefficient > 0:
            continue
        partner = _second_moment(ring, monomial, budget)
        if partner is None:
            return False
        budget[partner] = budget[partner] + coefficient
        del budget[monomial]
        if float(budget[partner]) < -1e-13 * abs(float(coefficient)):
            return False
    return all(_is_nonnegative(ring, m) for m, c in budget.items() if c > 0)


def positive(ring: Arithmetic, polynomial: Polynomial) -> bool:
    """Whether the value is proven to be above zero: nonnegative plus a positive constant."""
    constant = polynomial.terms.get((), 0)
    if constant > 0:
        return nonnegative(ring, polynomial)
    if _is_positive_size(ring, polynomial):
        return True
    if len(polynomial.terms) == 1:
        ((monomial, coefficient),) = polynomial.terms.items()
        return (
            coefficient > 0
            and all(ring.never_zero(ring.bases[b]) for b, _ in monomial)
            and (_is_nonnegative(ring, monomial))
        )
    return False


def _is_positive_size(ring: Arithmetic, polynomial: Polynomial) -> bool:
    """A polynomial in sizes, each at least 2, that is positive at 2 and grows."""
    if not polynomial.terms:
        return False
    total = 0.0
    for monomial, coefficient in polynomial.terms.items():
        if monomial and coefficient < 0:
            return False
        for base_id, exponent in monomial:
            base = ring.bases[base_id]
            if not isinstance(base, Extent) or not isinstance(exponent, int) or exponent < 0:
                return False
            if not is_extent_of_tensor(base.size):
                return False
        total += float(coefficient) * 2.0 ** sum(float(e) for _, e in monomial)
    return total > 0


def is_extent_of_tensor(size: Size) -> bool:
    """Whether a symbol is a tensor's own extent, at least 2; an integer of the call may be any."""
    return isinstance(size, sympy.Symbol) and size.name.startswith("s") and bool(size.is_positive)


def is_nonnegative_size(size: Size) -> bool:
    """Whether a size cannot be below zero: ``n // 2`` of an extent, not ``(n - 9) // 2``."""
    return bool(sympy.sympify(size).is_nonnegative)


def _is_nonnegative(ring: Arithmetic, monomial: Monomial) -> bool:
    return all(
        is_even(e) or ring.bases[b].nonnegative or not isinstance(e, int) for b, e in monomial
    )


def _second_moment(
    ring: Arithmetic, monomial: Monomial, terms: dict[Monomial, Number]
) -> Monomial | None:
    """The term ``E[f^2] rest`` that pays for ``E[f]^2 rest``."""
    for base_id, exponent in monomial:
        base = ring.bases[base_id]
        if exponent != 2 or not isinstance(base, Reduction) or base.kind != "mean":
            continue
        square = tuple((b, e * 2) for b, e in base.monomial)
        second = ring.reduction("mean", square, base.bound)
        rest = {b: e for b, e in monomial if b != base_id}
        partner, _ = ring.merge(tuple(sorted(rest.items())), next(iter(second.terms)))
        if float(terms.get(partner, 0)) > 0 and all(
            is_even(e) or ring.bases[b].nonnegative for b, e in rest.items()
        ):
            return partner
    return None
