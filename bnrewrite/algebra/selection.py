"""Chooses the sites of a graph: which nodes are replaced."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from .anchors import elements
from .axes import Opaque
from .calls import name_of
from .expression import Atom, Function, Monomial, Polynomial, Reduction, Sum, is_even
from .match import Match, affine, lookalike, match
from .meaning import Reading
from .ring import Ring
from .site import Linear, linear_forms
from .stored import is_buffer, is_stored
from .units import as_written

Matches = dict[fx.Node, Match]


def find(reading: Reading, graph: fx.Graph) -> list[Match]:
    """The norm sites of a graph, in graph order.

    Along a chain (x - M), (x - M)/s, ... w + b the site is the last node that has a name, as long
    as nothing else needs the ones before. Without a name it is the last node of the chain whose
    coefficients are smaller than the tensor. What only looks like a norm is among them, ``left``.
    """
    matches: Matches = {}
    lookalikes: Matches = {}
    for node in graph.nodes:
        found = _of_node(reading, node)
        if found is not None:
            (lookalikes if found.left else matches)[node] = found
    named = {n: m for n, m in matches.items() if m.kind != "general"}
    chosen = _ends(named, matches)
    open_ = _uncovered(matches, chosen)
    small = {n: m for n, m in open_.items() if is_small(reading.ring, m)}
    chosen |= _ends(small, matches)
    chosen |= _ends(_uncovered(matches, chosen), matches)
    chosen |= _ends(lookalikes, lookalikes)
    return [as_written(reading, chosen[n]) for n in graph.nodes if n in chosen]


def further(reading: Reading, found: Match, node: fx.Node) -> Match | None:
    """A site read at a node behind it: more is multiplied to it and added.

    None where a factor of that is as large as the tensor, where it has other statistics, or is no
    longer of degree one.
    """
    for linear in linear_forms(reading, node):
        if linear.source is found.linear.source and linear.index == found.linear.index:
            try:
                more = match(reading, linear)
            except Opaque:
                return None
            ring, parts = reading.ring, (linear.scale, linear.shift)
            factors = {base for part in parts for monomial in part.terms for base, _ in monomial}
            small = all(ring.bases[base].axes < linear.axes for base in factors)
            return more if small and more.over == found.over else None
    return None


def _of_node(reading: Reading, node: fx.Node) -> Match | None:
    meaning = reading.formula(node)
    if meaning is None or node.op != "call_function" or node in reading.gone:
        return None
    ring = reading.ring
    statistics = ring.moments(meaning.value)
    if not statistics:
        return _affine(reading, node)
    related = reading.derived(statistics)
    if related & ring.raw(meaning.value):
        forms = linear_forms(reading, node)
        for linear in forms:
            if linear.source in related and divides_by_moment(reading, linear):
                try:
                    return match(reading, linear)
                except Opaque:
                    return None
        for linear in forms:
            if divides_by_neighbour(reading, linear):
                reason = "it divides by a statistic of another tensor than the one it centres"
                return lookalike(ring, linear, reason)
    return _affine(reading, node)


def divides_by_neighbour(reading: Reading, linear: Linear) -> bool:
    """Whether a tensor is centred, then divided by a statistic of what was next to it."""
    ring, own = reading.ring, reading.derived(frozenset((linear.source,)))
    return linear.source in ring.moments(linear.shift) and any(
        (exponent < 0 or not isinstance(exponent, int))
        and not own.isdisjoint(reading.derived(ring.bases[base].moments))
        for monomial in linear.scale.terms
        for base, exponent in monomial
    )


def divides_by_moment(reading: Reading, linear: Linear) -> bool:
    """Whether the scale has a magnitude of its tensor in a denominator or under a root."""
    return _divides(reading, linear.scale, linear) or any(
        _is_quotient(reading, base, linear) for m in linear.scale.terms for base, _ in m
    )


def _divides(reading: Reading, value: Polynomial, linear: Linear) -> bool:
    return any(
        (exponent < 0 or not isinstance(exponent, int)) and _has_magnitude(reading, base, linear)
        for monomial in value.terms
        for base, exponent in monomial
    )


def _is_quotient(reading: Reading, base_id: int, linear: Linear) -> bool:
    """Whether a factor is a quotient of statistics in which nothing may be cancelled.

    ``n / (1 + n) / sqrt(n)`` is no polynomial: at n = 0 it is NaN, and ``sqrt(n) / (1 + n)`` is 0.
    """
    base = reading.ring.bases[base_id]
    if not isinstance(base, Atom) or linear.source not in reading.derived(base.moments):
        return False
    made = base.source
    return isinstance(made, fx.Node) and name_of(made) in ("mul", "div") and any(
        _divides(reading, reading.meanings[n].value, linear)
        for n in made.all_input_nodes
        if n in reading.meanings
    )  # fmt: skip


def _has_magnitude(reading: Reading, base_id: int, linear: Linear) -> bool:
    """Whether a base holds an even or absolute moment of the tensor, or of a part of it."""
    base = reading.ring.bases[base_id]
    if linear.source not in reading.derived(base.moments):
        return False
    if isinstance(base, Atom):
        return True
    inside: list[Monomial] = []
    if isinstance(base, Reduction):
        inside = [base.monomial]
        if base.nonnegative or any(is_even(e) for _, e in base.monomial):
            return True
    elif isinstance(base, Sum):
        inside = list(base.polynomial.terms)
    elif isinstance(base, Function):
        inside = [m for a in base.arguments for m in a.terms]
    return any(_has_magnitude(reading, b, linear) for m in inside for b, _ in m)


def is_small(ring: Ring, found: Match) -> bool:
    """Whether the coefficients are smaller than the tensor, each or in two factors."""
    everything = found.linear.axes
    if not ring.axes(found.bias) < everything:
        return False
    if ring.axes(found.linear.scale) < everything:
        return True
    return bool(found.part) and ring.axes(found.weight) <= found.over


def _ends(candidates: Matches, matches: Matches) -> Matches:
    """The ends of the chains.

    Where all uses of a candidate lead to one further candidate, the end is the further one. An end
    that is computed from another end of the same tensor stays the user's code.
    """
    target: dict[fx.Node, fx.Node] = {}
    for node in reversed(candidates):
        source = candidates[node].linear.source
        further = {
            target.get(u) if u in candidates and candidates[u].linear.source is source else None
            for u in node.users
        }
        (only,) = further if len(further) == 1 else (None,)
        target[node] = only or node
    ends: Matches = {}
    covered: set[fx.Node] = set()
    for node, found in matches.items():
        source = found.linear.source
        before = [i for i in node.all_input_nodes if i in matches]
        if any((i in covered or i in ends) and matches[i].linear.source is source for i in before):
            covered.add(node)
        elif target.get(node) is node:
            ends[node] = candidates[node]
    return ends


def _uncovered(matches: Matches, chosen: Matches) -> Matches:
    """The matches that are neither computed from a chosen site's value nor lead to one."""
    after: set[fx.Node] = set(chosen)
    for node, found in matches.items():
        source = found.linear.source
        if any(i in after and matches[i].linear.source is source for i in node.all_input_nodes):
            after.add(node)
    before: set[fx.Node] = set(chosen)
    for node in reversed(matches):
        source = matches[node].linear.source
        if any(u in before and matches[u].linear.source is source for u in node.users):
            before.add(node)
    return {n: m for n, m in matches.items() if n not in after and n not in before}


def _affine(reading: Reading, node: fx.Node) -> Match | None:
    """``x * scale + shift`` with stored statistics: a norm at inference, a frozen norm."""
    ring = reading.ring
    for linear in linear_forms(reading, node):
        if not linear.shift.terms and not _divides_by_buffer(reading, linear.scale):
            continue
        reduced = ring.moments(linear.scale) | ring.moments(linear.shift)
        stored = ring.raw(linear.scale) | ring.raw(linear.shift) | reduced
        if not all(_is_of_input(reading, s, linear) for s in reduced):
            continue
        if (
            stored
            and (ring.axes(linear.scale) or _is_of_buffers(reading, linear))
            and all(is_stored(s) or s in reading.sealed for s in stored)
            and not reading.is_parameter(linear.source)
            and (_normalises(reading, linear.scale) or _shifts_first(linear))
            and ring.axes(linear.scale) | ring.axes(linear.shift) < linear.axes
        ):
            found = affine(ring, linear)
            if any(_is_computed(ring, s) for s in stored):
                return replace(found, kind="general", reason="its statistics are computed before")
            return found
    return None


def _is_of_input(reading: Reading, source: object, linear: Linear) -> bool:
    """Whether what a coefficient is a statistic of is given, and smaller than the tensor."""
    return (
        isinstance(source, fx.Node)
        and not reading.is_parameter(source)
        and elements(source) < elements(linear.source)
        and linear.source not in reading.derived(frozenset((source,)))
    )


def _is_of_buffers(reading: Reading, linear: Linear) -> bool:
    """Whether scale and shift have each a buffer of its own: one mean and one variance for all."""
    ring = reading.ring
    scale, shift = ring.raw(linear.scale), ring.raw(linear.shift)
    return any(map(is_buffer, scale)) and any(map(is_buffer, shift - scale))


def _is_computed(ring: Ring, source: object) -> bool:
    """Whether an input carries a gradient and is no parameter: a graph before this one made it."""
    return (
        isinstance(source, fx.Node)
        and source.op == "placeholder"
        and not (source.meta.get("parameter") or source.meta.get("stored"))
        and ring.differentiable(source)
    )


def _normalises(reading: Reading, scale: Polynomial) -> bool:
    """Whether something stored is divided by, or stands under a root or an exponential."""
    return any(
        exponent < 0
        or not isinstance(exponent, int)
        or _is_exponential(reading.ring, base)
        or any(_normalises(reading, value) for value in _rounded(reading, base))
        for monomial in scale.terms
        for base, exponent in monomial
    )


def _divides_by_buffer(reading: Reading, scale: Polynomial) -> bool:
    """Whether the scale has the root of a buffer: a stored variance without a stored mean."""
    return any(
        any(_divides_by_buffer(reading, value) for value in _rounded(reading, base))
        or (
            not isinstance(exponent, int)
            and any(is_buffer(s) for s in reading.ring.bases[base].raw)
        )
        for monomial in scale.terms
        for base, exponent in monomial
    )


def _rounded(reading: Reading, base_id: int) -> list[Polynomial]:
    """What was rounded to a coefficient, before it was."""
    base = reading.ring.bases[base_id]
    meaning = reading.sealed.get(base.source) if isinstance(base, Atom) else None  # type: ignore[call-overload]
    return [meaning.value] if meaning is not None else []


def _shifts_first(linear: Linear) -> bool:
    """Whether something stored is added before something stored multiplies: scale (x + shift)."""
    if len(linear.scale.terms) != 1:
        return False
    (factor,) = linear.scale.terms
    return bool(factor) and any(set(factor) < set(monomial) for monomial in linear.shift.terms)


def _is_exponential(ring: Ring, base: int) -> bool:
    found = ring.bases[base]
    return isinstance(found, Function) and found.name == "exp"
