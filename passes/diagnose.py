"""Names what is wrong with the norms of a graph and with its running statistics.

Before:  a graph and a decision per norm.
After:   the same; ``canonical.noticed`` has what was found.
Leaves alone: everything; graphs that are not looked at by ``explain``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from bnrewrite.findings import notice

from .rewriting import Rewriting


@dataclass(frozen=True)
class Diagnose:
    """Asks for the pathologies of a graph."""

    name: str = "diagnose"

    def run(self, rewriting: Rewriting) -> None:
        """Fill ``canonical.noticed``."""
        if not rewriting.options.diagnose or rewriting.reading is None:
            return
        for node, given in zip(rewriting.placeholders(), rewriting.canonical.inputs, strict=True):
            node.meta["kind"] = given.kind
        named = {node.name: node for node in rewriting.placeholders()}
        *_, output = rewriting.graph.nodes
        updates = [
            (named[name], value)
            for name, value in zip(rewriting.canonical.mutated, output.args[0], strict=False)
            if isinstance(value, fx.Node)
        ]
        norms = [decision.match for decision in rewriting.decisions]
        rewriting.canonical.noticed = notice(rewriting.reading, norms, updates)
