"""Where a norm's source loses digits that its replacement keeps."""

from __future__ import annotations

import torch
from torch import fx

from .calls import arguments_of, dtype_of, is_tensor, name_of
from .expression import ONE, ZERO, Monomial, Polynomial, Reduction, added, scaled
from .match import Match
from .meaning import Reading
from .ring import Ring
from .site import Linear, linear_forms

CANCELS = "more accurate than the source: E[x^2] - E[x]^2 cancels there"
ROUNDS = "more accurate than the source: a statistic is rounded to {dtype} there"
OVERFLOWS = "more accurate than the source: squares are summed in {dtype} there"


def remarks(reading: Reading, found: Match) -> list[str]:
    """What the replacement of a site computes more accurately than the user's code."""
    result = []
    nodes = chain(reading, found)
    if any(cancels(reading, node) for node in nodes):
        result.append(CANCELS)
    rounding = [n for n in nodes if n in reading.narrowed]
    if rounding:
        result.append(ROUNDS.format(dtype=_name(dtype_of(rounding[0]))))
    narrow = [n for n in nodes if squares_in_half(n)]
    if narrow:
        result.append(OVERFLOWS.format(dtype=_name(dtype_of(narrow[0]))))
    return result


def shares_its_errors(reading: Reading, found: Match) -> bool:
    """Whether what a site divides by is wrong in the user's code, and used beside the site.

    In ``x / s - M / s`` the error of s multiplies what is left of x; in ``x / s' - M / s``, with
    the better s' of a site, the difference of the two multiplies x. A site that is centred itself
    multiplies nothing large.
    """
    if reading.ring.moments(found.linear.shift):
        return False
    nodes = set(chain(reading, found))
    rough: set[fx.Node] = set()
    for node in sorted(nodes):
        if node is found.node or not reading.ring.moments(_value(reading, node)):
            continue
        if found.linear.source in reading.ring.raw(_value(reading, node)):
            continue
        wrong = node in reading.narrowed or cancels(reading, node)
        if wrong or not rough.isdisjoint(node.all_input_nodes):
            rough.add(node)
    return any(user.op != "output" and user not in nodes for node in rough for user in node.users)


def _value(reading: Reading, node: fx.Node) -> Polynomial:
    meaning = reading.meanings.get(node)
    return ZERO if meaning is None else meaning.value


def centre(reading: Reading, found: Match) -> Polynomial | None:
    """``c`` where the user's code forms ``x - c`` before it scales, as digits ask for."""
    ring, linear = reading.ring, found.linear
    formed: list[Polynomial] = []
    for node in chain(reading, found):
        meaning = reading.meanings.get(node)
        if node is found.node or meaning is None:
            continue
        for form in linear_forms(reading, node):
            same = form.source is linear.source and form.index == linear.index
            if same and form.scale == ONE and form.shift.terms:
                c = scaled(form.shift, -1)
                rest = added(linear.shift, ring.multiply(linear.scale, c))
                if len(rest.terms) < len(linear.shift.terms):
                    return c
                formed.append(c)
    return formed[0] if formed else None


def chain(reading: Reading, found: Match) -> list[fx.Node]:
    """The nodes between a site and its tensor, or what was made of it, that make the statistics."""
    linear = found.linear
    key = (found.node, linear.source)
    if key not in reading.chains:
        reading.chains[key] = _chain(reading, linear)
    return reading.chains[key]


def _chain(reading: Reading, linear: Linear) -> list[fx.Node]:
    ring = reading.ring
    moments = ring.moments(linear.scale) | ring.moments(linear.shift)
    about = {m for m in moments if linear.source in reading.derived(frozenset((m,)))}
    about.add(linear.source)
    result: list[fx.Node] = []
    seen = {linear.source}
    todo = [linear.node]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "call_function" and not about.isdisjoint(reading.sources(node)):
            result.append(node)
            todo += node.all_input_nodes
    return result


def cancels(reading: Reading, node: fx.Node) -> bool:
    """Whether E[f^2] and E[f]^2 meet here for the first time, as a difference of numbers."""
    if name_of(node) not in ("sub", "add", "rsub"):
        return False
    operands = [reading.meanings.get(n) for n in node.all_input_nodes if is_tensor(n)]
    values = [m.value for m in operands if m is not None]
    if len(values) != 2:
        return False
    square, mean = (_moment_terms(reading.ring, v) for v in values)
    return any(
        a[0] and b[1] and not (a[0] and a[1]) and not (b[0] and b[1])
        for a, b in ((square, mean), (mean, square))
    )


def _moment_terms(ring: Ring, value: Polynomial) -> tuple[bool, bool]:
    """Whether a value has a term in E[f^2], and one in E[f]^2."""

    def second(monomial: Monomial) -> bool:
        return any(
            isinstance(base := ring.bases[b], Reduction)
            and e == 1
            and all(i == 2 for _, i in base.monomial)
            for b, e in monomial
        )

    def squared(monomial: Monomial) -> bool:
        return any(isinstance(ring.bases[b], Reduction) and e == 2 for b, e in monomial)

    raw = ring.raw(value)
    return (
        not raw and any(second(m) for m in value.terms),
        not raw and any(squared(m) for m in value.terms),
    )


def squares_in_half(node: fx.Node) -> bool:
    """Whether a square is taken in float16, where it overflows beyond 256."""
    if not is_tensor(node) or dtype_of(node) != torch.float16:
        return False
    name = name_of(node)
    if name == "mul":
        return len(set(node.all_input_nodes)) == 1
    return name == "square" or (name == "pow" and arguments_of(node).get("exponent") == 2)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
