"""Drops what the replaced formulas leave behind, and checks the graph.

Before:  a graph with dead nodes.
After:   no dead nodes; every node after its inputs; reshapes that work for any strides.
Leaves alone: nodes with side effects.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

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
            elif node.target is torch.ops.aten.copy.default:
                _differentiate_copy(node)
        rewriting.graph.eliminate_dead_code()
        rewriting.graph.lint()
        rewriting.canonical.module.recompile()


def _differentiate_copy(node: fx.Node) -> None:
    """``copy(target, source)`` has no derivative; the source in the target's shape has one.

    A clone of it: the user's copy does not share memory with its source.
    """
    target, source = node.args[:2]
    assert isinstance(target, fx.Node)
    assert isinstance(source, fx.Node)
    with node.graph.inserting_before(node):
        cast = node.graph.call_function(torch.ops.aten.to.dtype, (source, target.meta["val"].dtype))
        wide = node.graph.call_function(torch.ops.aten.expand_as.default, (cast, target))
        value = node.graph.call_function(
            torch.ops.aten.clone.default, (wide,), {"memory_format": _format(target.meta["val"])}
        )
    cast.meta, wide.meta, value.meta = dict(source.meta), dict(node.meta), dict(node.meta)
    node.replace_all_uses_with(value)


def _format(value: torch.Tensor) -> torch.memory_format:
    dense = value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if dense and not value.is_contiguous() else torch.contiguous_format
