"""Nodes that compute what another computed before: the same operation of the same tensors.

A slice that is taken twice is one tensor, and ``x[:4]`` is the first part of ``x.split(4)``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from bnrewrite.gradients import in_grad_mode

from .parts import part_of


def duplicates(graph: fx.Graph, *, grad_enabled: bool) -> dict[fx.Node, fx.Node]:
    """Each node that repeats an earlier one, with the first of its kind."""
    first: dict[Any, fx.Node] = {}
    same: dict[fx.Node, fx.Node] = {}
    for node, grad in in_grad_mode(graph, grad_enabled):
        key = _key(node, same) if node.op == "call_function" else None
        if key is None:
            continue
        try:
            found = first.setdefault((key, grad), node)
        except TypeError:  # an argument that cannot be compared
            continue
        if found is not node:
            same[node] = found
    return same


def _key(node: fx.Node, same: dict[fx.Node, fx.Node]) -> Any:
    """What a node computes; None where that is not a function of its arguments alone."""
    part = part_of(node)
    if part is not None:
        return (same.get(part[0], part[0]), part[1])
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        if target.namespace != "aten" or torch.Tag.nondeterministic_seeded in target.tags:
            return None
    elif getattr(target, "__module__", "") != "_operator":
        return None
    if not node.args or not node.all_input_nodes:
        return None
    keywords = tuple((k, _argument(v, same)) for k, v in node.kwargs.items())
    return (target, _argument(node.args, same), keywords)


def _argument(value: Any, same: dict[fx.Node, fx.Node]) -> Any:
    if isinstance(value, fx.Node):
        return same.get(value, value)
    if isinstance(value, (tuple, list)):
        return tuple(_argument(v, same) for v in value)
    if isinstance(value, (float, complex)):
        return (type(value), repr(value))  # 0.0 and -0.0 are equal
    return (type(value), value)  # 1, 1.0 and True are equal, but not the same argument
