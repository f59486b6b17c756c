"""Finds the norm sites of a graph by algebra.

Before:  a canonical graph.
After:   the same graph; ``rewriting.decisions`` has one entry per site.
Leaves alone: norms that are native calls already, complex and integer arithmetic. Native batch norms
that may be folded are in ``rewriting.natives``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx

from bnrewrite.algebra import Match, Reading, chain, find, read, remarks, shares_its_errors
from bnrewrite.algebra.expression import exact

from .rewriting import Decision, Refusal, Rewriting
from .spell import spelled


@dataclass(frozen=True)
class Recognise:
    """Reads the meaning of every tensor, and picks the sites."""

    name: str = "recognise"

    def run(self, rewriting: Rewriting) -> None:
        """Fill ``rewriting.reading`` and ``rewriting.decisions``."""
        _drop_assertions(rewriting.graph)
        with spelled(rewriting) as natives:
            reading = read(rewriting.graph, grad_enabled=rewriting.canonical.grad_enabled)
            sites = find(reading, rewriting.graph)
        rewriting.reading = reading
        rewriting.natives = [found for found in sites if found.node in natives]
        rewriting.decisions = [
            _decision(reading, found)
            for found in sites
            if found.node not in natives and not is_native(reading, found)
        ]


def _decision(reading: Reading, found: Match) -> Decision:
    """A site as it is found; what only looks like a norm is refused at once."""
    if found.left:
        return Decision(found, refusal=Refusal(str(found.reason), found.node))
    if shares_its_errors(reading, found):
        reason = "it is not centred, and a statistic that would become more accurate is used beside"
        return Decision(found, refusal=Refusal(reason, found.node))
    return Decision(found, notes=remarks(reading, found))


def _drop_assertions(graph: fx.Graph) -> None:
    """Assertions on dtypes that tracing left behind keep dead formulas alive."""
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)


def is_native(reading: Reading, found: Match) -> bool:
    """Whether a site is a call of ``F.normalize``, which has no ATen op of its own, as it is."""
    ring = reading.ring
    if found.order is None or found.bias.terms:
        return False
    length = ring.power(ring.count(found.over), exact(1 / found.order))
    factors = (found.weight.constant, ring.multiply(found.weight, length).constant)
    if not any(f is not None and math.isclose(float(f), 1, rel_tol=1e-9) for f in factors):
        return False  # times a weight, or a number: an RMS norm, mostly
    functions = [
        entry[1]
        for node in chain(reading, found)
        for entry in node.meta.get("source_fn_stack") or ()
    ]
    return torch.nn.functional.normalize in functions
