"""Pathologies of a norm's formula."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import fx

from bnrewrite.algebra import Match, Reading, cancels, chain, squares_in_half
from bnrewrite.algebra.axes import Opaque, product
from bnrewrite.algebra.expression import (
    ZERO,
    Atom,
    Base,
    Function,
    Polynomial,
    Sum,
)
from bnrewrite.algebra.frozen import frozen
from bnrewrite.algebra.match import denominator
from bnrewrite.algebra.ring import Ring
from bnrewrite.algebra.stored import path_of, uncast
from bnrewrite.capture.provenance import source_line
from bnrewrite.report.findings import pathology
from bnrewrite.report.site import Finding

from .averages import Average
from .noticed import BatchStatistics, StoredStatistics


def of_norm(reading: Reading, found: Match, running: Sequence[Average]) -> Iterator[Finding]:
    """What is wrong with one norm.

    Args:
        reading: the meanings of the graph.
        found: the norm.
        running: the running statistics that the graph updates.
    """
    own = [each for each in running if each.source is found.linear.source]
    where = source_line(found.node)
    used = _divides_by(reading.ring, found, {each.buffer for each in own})
    if used:
        name = "normalises-with-running-statistics"
        yield pathology(name, where, ", ".join(map(path_of, used)))
    if has_no_eps(reading, found):
        yield pathology("no-eps", where)
    made = chain(reading, found)
    for name, is_so in (
        ("cancellation", lambda node: cancels(reading, node)),
        ("float16-overflow", squares_in_half),
    ):
        at = next((node for node in made if is_so(node)), None)
        if at is not None:
            yield pathology(name, source_line(at))
    if own and _is_frozen(reading.ring, found):
        yield pathology(
            "frozen-but-updated", where, ", ".join(path_of(each.buffer) for each in own)
        )


def has_no_eps(reading: Reading, found: Match) -> bool:
    """Whether a norm divides by a statistic that nothing keeps from zero."""
    if not found.part:
        return False
    try:
        by = denominator(reading.ring, found.linear, found.part, found.moments, found.over)
    except Opaque:
        return False
    return by is not None and by.outside is None and by.inside == ZERO


def stored_statistics(reading: Reading, found: Match) -> StoredStatistics | None:
    """The buffers that a norm takes in the place of statistics, if it does."""
    parts = frozen(reading.ring, found.linear) if found.kind == "affine" else None
    if parts is None:
        return None
    paths = []
    for atom in (parts.mean, parts.variance):
        node = uncast(atom.source) if isinstance(atom.source, fx.Node) else None
        if node is None or not node.meta.get("stored") or not node.meta.get("path"):
            return None
        paths.append(path_of(node))
    mean, variance = paths
    return StoredStatistics(mean, variance, source_line(found.node))


def batch_statistics(found: Match) -> BatchStatistics | None:
    """The norm as one over the batch, if it is."""
    first = found.linear.index[0] if found.linear.index else ()
    if not found.over or not set(first) <= found.over or not first:
        return None
    kept = product(a.size for d in found.linear.index for a in d if a not in found.over)
    channels = kept if isinstance(kept, int) else None
    return BatchStatistics(_module_of(found.node), channels, source_line(found.node))


def _module_of(node: fx.Node) -> str:
    """The qualified name of the module whose code made a node, "" for the root."""
    stack: Any = node.meta.get("nn_module_stack") or {0: ("", None)}
    name, _ = list(stack.values())[-1]
    return str(name)


def _divides_by(ring: Ring, found: Match, updated: set[fx.Node]) -> list[fx.Node]:
    """The buffers of those updated that stand, as they are or as part of a sum, under the root."""
    used: list[fx.Node] = []
    for monomial in found.linear.scale.terms:
        for base_id, exponent in monomial:
            base = ring.bases[base_id]
            inside = _under_root(base) if exponent in (-1, Fraction(-1, 2)) else None
            if inside is None:
                continue
            for inner in inside.terms:
                atom = ring.bases[inner[0][0]] if len(inner) == 1 and inner[0][1] == 1 else None
                node = atom.source if isinstance(atom, Atom) else None
                if isinstance(node, fx.Node) and uncast(node) in updated and node not in used:
                    used.append(uncast(node))
    return used


def _under_root(base: Base) -> Polynomial | None:
    if isinstance(base, Sum):
        return base.polynomial
    if isinstance(base, Function):
        return base.arguments[0] if base.name == "root" else None
    return Polynomial({((base.id, 1),): 1}) if isinstance(base, Atom) else None


def _is_frozen(ring: Ring, found: Match) -> bool:
    """Whether a norm has parameters, none of which is trained, in a graph that trains others."""
    coefficients = ring.raw(found.linear.scale) | ring.raw(found.linear.shift)
    nodes = {uncast(each) for each in coefficients if isinstance(each, fx.Node)}
    own = [node for node in nodes if node.meta.get("parameter")]
    trained = [
        node
        for node in found.node.graph.nodes
        if node.op == "placeholder" and node.meta.get("parameter") and node.meta["requires_grad"]
    ]
    return bool(own) and bool(trained) and torch.is_grad_enabled() and not set(own) & set(trained)
