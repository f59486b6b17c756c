"""Means over groups: statistics of the statistics of a tensor, as each of its groups sees them.

Before:  E over c' of f(E over h, w of x(n, c')^2);  E over c', h, w of x
After:   the mean over c of f(E[x^2]); the mean over c of E[x];  E and V of each (n, c)
Leaves alone: maxima; what is no function of moments of the tensor itself, over the same axes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import fx

from bnrewrite.algebra import Match, Reading
from bnrewrite.algebra.axes import Axis, Dim, axes_of, product
from bnrewrite.algebra.expression import Atom, Polynomial, Reduction, added
from bnrewrite.algebra.ring import Ring
from bnrewrite.algebra.site import Linear, moments_of

from .state import Update, meaning_of

Change = Callable[[Polynomial], Polynomial]
Variance = tuple[int, Polynomial, str]


class Means:
    """The means over groups of a site, by the names that a program has for them.

    Args:
        ring: of the formula.
        found: the site whose groups are meant.
        letters: of the axes of its tensor.

    Attributes:
        values: of each reduction that is one, what it is the mean of, at the place of a group.
        texts: their definitions.
    """

    def __init__(self, ring: Ring, found: Match, letters: dict[Axis, str]) -> None:
        self.ring = ring
        self.found = found
        self.letters = letters
        self.values: dict[int, Polynomial] = {}
        self.texts: list[str] = []

    def statistics(self, *polynomials: Polynomial) -> set[int]:
        """The reductions inside, and those of which there are means over groups."""
        used: set[int] = set()
        for base in self.ring.within(*polynomials):
            if isinstance(base, Reduction):
                used.add(base.id)
                value = self._value(base)
                if value is not None:
                    self.values[base.id] = value
                    used |= self.statistics(value)
        return used

    def define(self, base: Reduction, value: str) -> str:
        """The name of a mean over groups, of a text."""
        name = f"m{len(self.texts)}"
        own = [a for a in axes_of(self.found.linear.index) if a in base.axes]
        self.texts.append(f"{name}[{' '.join(self.letters[a] for a in own)}] = {value}")
        return name

    def moments(
        self, mark: str, change: Change, *, about_zero: bool
    ) -> tuple[dict[int, str], list[Variance]]:
        """The moments of x over further axes: names of E[x] and E[x^2], and the variances.

        ``V = E[v + (m - M)^2]`` of the means m and variances v of groups, in which nothing cancels.

        Args:
            mark: of the names of moments through which no gradient flows.
            change: makes the moments of a group those.
            about_zero: the variance of a group is about zero.
        """
        moments = self.found.moments
        mean, square = change(moments.mean), change(moments.square)
        if mark and mean == moments.mean:
            return {}, []  # nothing has a gradient
        wide: dict[frozenset[Axis], dict[bool, Reduction]] = {}
        for place, value in self.values.items():
            base = self.ring.bases[place]
            if isinstance(base, Reduction) and value in (mean, square):
                wide.setdefault(base.axes, {})[value == square] = base
        special: dict[int, str] = {}
        variances: list[Variance] = []
        for of in wide.values():
            first, second = of.get(False), of.get(True)
            if first is None:
                assert second is not None
                raw = f"V{mark}" if about_zero else f"V{mark} + M{mark}**2"
                special[second.id] = self.define(second, raw)
                continue
            name = special[first.id] = self.define(first, f"M{mark}")
            if second is not None:
                spread = self.define(second, f"V{mark} + (M{mark} - {name})**2")
                special[second.id] = f"({spread} + {name}**2)"
                middle = Polynomial({((first.id, 1),): 1})
                moment = Polynomial({((second.id, 1),): 1})
                variance = added(moment, self.ring.multiply(middle, middle), -1)
                variances.append((second.id, variance, spread))
        return special, variances

    def _value(self, base: Reduction) -> Polynomial | None:
        """What a reduction is the mean of over groups, at the place of a group, or None."""
        found, linear = self.found, self.found.linear
        moves = _places(self.ring, linear, base)
        if moves is None:
            return None
        here, groups = _axes(moves), linear.axes - found.over
        if _degree(self.ring, linear, base) is not None:
            if not found.over < here or not _is_of_this_place(self.ring, linear, base):
                return None
            return _moment(self.ring, found, base)
        if not here or here | base.axes != groups or base.axes & here:
            return None
        return self.ring.substitute(Polynomial({base.monomial: 1}), moves)


def of_smallest_groups(reading: Reading, found: Match) -> Match | None:
    """The same formula of the groups that all of its statistics are made of; None for none."""
    ring, linear = reading.ring, found.linear
    over: frozenset[Axis] | None = None
    for base in ring.within(linear.scale, linear.shift, reduced=True):
        if isinstance(base, Reduction) and _degree(ring, linear, base) is not None:
            moves = _places(ring, linear, base)
            if moves is None:
                return None
            over = _axes(moves) if over is None else over & _axes(moves)
    if not over or over == found.over:
        return None
    return replace(found, over=over, moments=moments_of(ring, linear, over))


def updates_of_means(
    reading: Reading, found: Match, candidates: list[tuple[fx.Node | None, fx.Node]]
) -> list[Update]:
    """The buffers whose new value is made of means over the groups of a site.

    Args:
        reading: the meanings of the graph.
        found: the site.
        candidates: (buffer, new value), and (None, returned value), which stay the user's.
    """
    ring, moments = reading.ring, found.moments
    groups = [axis for axis in axes_of(found.linear.index) if axis not in found.over]
    own = moments.mean.bases() | moments.square.bases()
    updates: list[Update] = []
    for buffer, node in candidates:
        if buffer is None or (meaning := meaning_of(reading, node)) is None:
            continue
        value, means = ring.attached(meaning.value), Means(ring, found, {})
        along = axes_of(meaning.dims)
        known = means.statistics(value) <= own | means.values.keys()
        if known and along == [axis for axis in groups if axis in along]:
            updates.append(Update(buffer, node, value, meaning.dims))
    return updates


def _places(ring: Ring, linear: Linear, base: Reduction) -> dict[Axis, Dim] | None:
    """Where in the tensor the bound axes of a mean run; None where that is no one place."""
    if base.kind != "mean":
        return None
    moves: dict[Axis, Dim] = {}
    for inner in ring.within(Polynomial({base.monomial: 1}), reduced=True):
        if not isinstance(inner, Atom) or inner.source is not linear.source:
            continue
        for read, own in zip(inner.index, linear.index, strict=True):
            if not base.bound & set(read):
                continue
            if len(read) == 1:  # axes that are reduced together are one
                pairs = [(read[0], own)]
            elif len(read) == len(own):
                pairs = [(axis, (to,)) for axis, to in zip(read, own, strict=True)]
            else:
                return None
            for axis, to in pairs:
                if axis in base.bound and moves.setdefault(axis, to) != to:
                    return None
    places = [axis for to in moves.values() for axis in to]
    if set(moves) != base.bound or len(set(places)) < len(places):
        return None
    fits = (axis.size == product(part.size for part in to) for axis, to in moves.items())
    return moves if all(fits) else None


def _axes(moves: dict[Axis, Dim]) -> frozenset[Axis]:
    return frozenset(axis for to in moves.values() for axis in to)


def _degree(ring: Ring, linear: Linear, base: Reduction) -> int | None:
    """1 for E[x], 2 for E[x^2], None for another mean."""
    if len(base.monomial) != 1:
        return None
    ((place, exponent),) = base.monomial
    atom = ring.bases[place]
    if isinstance(atom, Atom) and atom.source is linear.source and exponent in (1, 2):
        return int(exponent)
    return None


def _is_of_this_place(ring: Ring, linear: Linear, base: Reduction) -> bool:
    """Whether the other axes of a moment run where they do in the tensor.

    Of ``x(n, j, i)`` read at ``(n, i, j)`` another group has the mean.
    """
    atom = ring.bases[base.monomial[0][0]]
    assert isinstance(atom, Atom)
    for read, own in zip(atom.index, linear.index, strict=True):
        if set(read) <= base.bound:
            continue
        if len(read) != len(own):
            return False
        if any(axis not in base.bound and axis != to for axis, to in zip(read, own, strict=True)):
            return False
    return True


def _moment(ring: Ring, found: Match, base: Reduction) -> Polynomial:
    """The moment of a group whose mean a moment over further axes is."""
    atom = ring.bases[base.monomial[0][0]]
    moment = found.moments.square if base.monomial[0][1] == 2 else found.moments.mean
    return ring.stop(moment) if isinstance(atom, Atom) and atom.stopped else moment
