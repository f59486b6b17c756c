"""The graphs that kept operations hold: read for the report, never changed."""

from __future__ import annotations

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from bnrewrite.capture.aliases import outputs_of


def held_graphs(graph: fx.GraphModule, node: fx.Node) -> list[fx.GraphModule]:
    """Copies of the graphs that an operation may run forward, each with a flat output."""
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return []
    names = [str(each.target) for each in node.all_input_nodes if each.op == "get_attr"]
    found = [each for name in names for path, each in graph.named_modules() if path == name]
    if node.target is torch.ops.higher_order.autograd_function_apply:
        found = found[:1]  # behind it stands its backward
    return [_flat(each) for each in found if isinstance(each, fx.GraphModule)]


def _flat(held: fx.GraphModule) -> fx.GraphModule:
    copied = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    copied.graph_copy(held.graph, copies)
    leaves = tree_leaves(outputs_of(held))
    copied.output(tuple(copies[each] for each in leaves if isinstance(each, fx.Node)))
    return fx.GraphModule(held, copied)
