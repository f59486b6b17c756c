"""The statistic as the user wrote it: a sum or a mean of squares, and the eps added to it.

A formula keeps no trace of that, ``(n E[x^2] + e)^(-1/2) = n^(-1/2) (E[x^2] + e / n)^(-1/2)``, but
the user's code does: some node is a multiple of the denominator.
"""

from __future__ import annotations

import math
from dataclasses import replace

from torch import fx

from .accuracy import chain
from .expression import MAXIMA, Function, Monomial, Polynomial, Sum
from .match import Match
from .meaning import Reading


def as_written(reading: Reading, found: Match) -> Match:
    """A match with the name and the eps of the user's own statistic."""
    denominator = _denominator(reading, found)
    factor = _factor(reading, found, denominator) if denominator is not None else None
    if denominator is None or factor is None:
        return replace(found, eps=found.eps or None)
    eps = float(denominator.terms.get((), 0)) * factor
    kind = found.kind
    count = reading.ring.count(found.over).constant
    if kind in ("lp_normalize", "rms_norm") and found.order == 2 and count is not None:
        elements = float(count) if found.part[0][1] != -1 else math.sqrt(count)
        unit = _lead(denominator) * factor
        if math.isclose(unit, elements, rel_tol=1e-9):
            kind = "lp_normalize"
        elif math.isclose(unit, 1, rel_tol=1e-9):
            kind = "rms_norm"
    return replace(found, kind=kind, eps=float(f"{eps:.10g}") or None)


def _denominator(reading: Reading, found: Match) -> Polynomial | None:
    """What stands under the root, or what is divided by; None for a maximum."""
    if len(found.part) != 1 or found.part[0][1] >= 0:
        return None
    base = reading.ring.bases[found.part[0][0]]
    if isinstance(base, Sum):
        return base.polynomial
    if isinstance(base, Function) and base.name in MAXIMA:
        return None
    return Polynomial({((base.id, 1),): 1})


def _factor(reading: Reading, found: Match, denominator: Polynomial) -> float | None:
    """The multiple of the denominator that the last such node is."""
    wanted = _proportions(denominator)
    last: tuple[fx.Node, float] | None = None
    for node in chain(reading, found):
        meaning = reading.formula(node)
        if meaning is None or found.linear.source in reading.ring.raw(meaning.value):
            continue
        if len(meaning.value.terms) != len(denominator.terms):
            continue
        same = _kinds(reading, meaning.value) == _kinds(reading, denominator)
        later = last is None or last[0] < node
        if later and same and _are_close(_proportions(meaning.value), wanted):
            last = (node, _lead(meaning.value) / _lead(denominator))
    return last[1] if last else None


def _lead(polynomial: Polynomial) -> float:
    """The largest coefficient of a statistic."""
    return max(abs(float(c)) for m, c in polynomial.terms.items() if m)


def _proportions(polynomial: Polynomial) -> list[float]:
    """The coefficients against the largest of a statistic."""
    if not any(polynomial.terms):
        return []
    lead = _lead(polynomial)
    return sorted(float(c) / lead for c in polynomial.terms.values())


def _kinds(reading: Reading, polynomial: Polynomial) -> list[str]:
    """What the terms are made of, whatever their axes are called."""

    def kind(monomial: Monomial) -> str:
        return str(sorted((type(reading.ring.bases[b]).__name__, str(e)) for b, e in monomial))

    return sorted(kind(monomial) for monomial in polynomial.terms)


def _are_close(left: list[float], right: list[float]) -> bool:
    return len(left) == len(right) and all(
        math.isclose(a, b, rel_tol=1e-9) for a, b in zip(left, right, strict=True)
    )
