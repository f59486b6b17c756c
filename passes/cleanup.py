"""Drops what the replaced formulas leave behind, and checks the graph.

Before:  a graph with dead nodes.
After:   no dead nodes; every node after its inputs.
Leaves alone: nodes with side effects.
"""

from __future__ import annotations

from dataclasses import dataclass

from .rewriting import Rewriting


@dataclass(frozen=True)
class Cleanup:
    """Dead code elimination and fx's own checks."""

    name: str = "cleanup"

    def run(self, rewriting: Rewriting) -> None:
        """Change the graph in place and recompile it."""
        rewriting.graph.eliminate_dead_code()
        rewriting.graph.lint()
        rewriting.canonical.module.recompile()
