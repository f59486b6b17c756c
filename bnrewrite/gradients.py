"""Where a graph records gradients."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

GRAD_MODE = torch._C._set_grad_enabled
_DETACHING = frozenset({torch.ops.aten.detach.default, torch.ops.aten.detach_.default, "detach"})


def in_grad_mode(graph: fx.Graph, grad_enabled: bool) -> Iterator[tuple[fx.Node, bool]]:
    """The nodes of a graph, each with whether autograd records there.

    Args:
        graph: of Dynamo, or a canonical one; a node that sets the mode comes with what it sets.
        grad_enabled: the mode in which it begins.
    """
    for node in graph.nodes:
        if node.op == "call_function" and node.target is GRAD_MODE:
            grad_enabled = bool(node.args[0])
        yield node, grad_enabled


def differentiable_nodes(graph: fx.Graph, grad_enabled: bool) -> frozenset[fx.Node]:
    """Nodes that autograd may record, placeholders that require a gradient among them."""
    found: set[fx.Node] = set()
    for node, enabled in in_grad_mode(graph, grad_enabled):
        if node.op == "placeholder":
            value = node.meta.get("example_value")
            if node.meta.get("requires_grad", getattr(value, "requires_grad", False)):
                found.add(node)
        elif (
            enabled
            and node.op != "output"
            and node.target not in _DETACHING
            and not found.isdisjoint(node.all_input_nodes)
        ):
            found.add(node)
    return frozenset(found)
