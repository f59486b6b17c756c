"""Means over groups: a statistic of the statistics of a tensor, as each of its groups sees it.

Before:  E over c' of f(E[x^2](n, c'))
After:   f(E[x^2](n, c)), and the axes (n) that the mean keeps
Leaves alone: maxima; what is no function of moments of the tensor itself, over the same axes.
"""

from __future__ import annotations

from bnrewrite.algebra.axes import Axis, Dim, axes_of
from bnrewrite.algebra.expression import Atom, Polynomial, Reduction
from bnrewrite.algebra.match import Match
from bnrewrite.algebra.ring import Ring


def value_of_group(ring: Ring, found: Match, base: Reduction) -> Polynomial | None:
    """What a mean over groups is the mean of, at the place of a group; None if it is none.

    Args:
        ring: of the formula.
        found: the site whose groups are meant.
        base: the reduction.
    """
    if base.kind != "mean":
        return None
    value, linear = Polynomial({base.monomial: 1}), found.linear
    moves: dict[Axis, Axis] = {}
    for inner in ring.within(value, reduced=True):
        if not isinstance(inner, Atom) or inner.source is not linear.source:
            continue
        for read, own in zip(inner.index, linear.index, strict=True):
            if len(read) != len(own):
                return None
            for axis, here in zip(read, own, strict=True):
                if axis in base.bound and moves.setdefault(axis, here) is not here:
                    return None
    kept = linear.axes - found.over
    if set(moves) != base.bound or len(set(moves.values())) < len(moves):
        return None
    if any(axis.size != here.size for axis, here in moves.items()):
        return None
    if set(moves.values()) | base.axes != kept or base.axes & set(moves.values()):
        return None
    places: dict[Axis, Dim] = {axis: (here,) for axis, here in moves.items()}
    return ring.substitute(value, places)


def kept_axes(found: Match, base: Reduction) -> list[Axis]:
    """The axes along which a mean over groups runs, in order."""
    return [axis for axis in axes_of(found.linear.index) if axis in base.axes]
