"""Drops what the replaced formulas leave behind, and checks the graph.

Before:  a graph with dead nodes.
After:   no dead nodes; every node after its inputs; reshapes that work for any strides.
Leaves alone: nodes with side effects.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .rewriting import Rewriting

# A view is bound to the strides that were traced; a replacement may have others.
VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)


@dataclass(frozen=True)
class Cleanup:
    """Dead code elimination and fx's own checks."""

    name: str = "cleanup"

    def run(self, rewriting: Rewriting) -> None:
        """Change the graph in place and recompile it."""
        for node in rewriting.graph.nodes:
            if node.target in VIEWS:
                node.target = torch.ops.aten.reshape.default
        rewriting.graph.eliminate_dead_code()
        rewriting.graph.lint()
        rewriting.canonical.module.recompile()
