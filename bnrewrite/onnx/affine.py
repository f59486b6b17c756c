"""A scale and a shift of channels in half precision: a norm with stored statistics.

Before:  y = (x - m) a + b        x of three dimensions or more; m, a, b stored, along the second
After:   y = batch_norm(x, a, b, m, 1)      computed in float32, rounded once
Leaves alone: other dtypes, which have their operation already, and bfloat16, for which no provider
has a kernel; matrices; values between that are used elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from bnrewrite.passes.nodes import Nodes

aten = torch.ops.aten
EPS = 1e-5  # the least that every version of cuDNN takes


@dataclass(frozen=True)
class _Affine:
    """(x - mean) scale + shift."""

    x: fx.Node
    mean: fx.Node | None
    scale: fx.Node
    shift: fx.Node | None


def join_affines(graph: fx.Graph) -> None:
    """Change the graph in place, the last operation of each affine first."""
    for node in reversed(list(graph.nodes)):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dtype == torch.float16 and value.dim() > 2:
            found = _affine(node)
            if found is not None and (found.mean or found.shift):
                node.replace_all_uses_with(_batch_norm(node, found))
    graph.eliminate_dead_code()


def _affine(node: fx.Node) -> _Affine | None:
    if node.target is aten.addcmul.default:  # as the passes write it
        taken, shift = _taken(node, node.args[1:]), node.args[0]
    else:
        outer = _operands(node, aten.add.Tensor)
        inner, shift = (node, None) if outer is None or len(outer[0].users) > 1 else outer
        taken = _operands(inner, aten.mul.Tensor)
    if taken is None or (isinstance(shift, fx.Node) and not _is_along_channels(shift, node)):
        return None
    x, scale = taken
    centred = None if len(x.users) > 1 else _operands(x, aten.sub.Tensor)
    if centred is None or centred[0] is not x.args[0]:  # m - x is another formula
        return _Affine(x, None, scale, shift)  # type: ignore[arg-type]
    return _Affine(centred[0], centred[1], scale, shift)  # type: ignore[arg-type]


def _operands(node: fx.Node, target: Any) -> tuple[fx.Node, fx.Node] | None:
    return _taken(node, node.args) if node.target is target else None


def _taken(node: fx.Node, operands: Any) -> tuple[fx.Node, fx.Node] | None:
    """The tensor and the vector that an operation is of, in this order."""
    if node.kwargs or len(operands) != 2 or not all(isinstance(n, fx.Node) for n in operands):
        return None
    first, second = operands
    for x, vector in ((first, second), (second, first)):
        before, after = x.meta["val"], node.meta["val"]
        same = before.dtype == after.dtype and before.shape == after.shape
        if same and _is_along_channels(vector, node):
            return x, vector
    return None


def _is_along_channels(vector: fx.Node, like: fx.Node) -> bool:
    value, x = vector.meta.get("val"), like.meta["val"]
    if not isinstance(value, torch.Tensor) or value.dtype != x.dtype or not _is_stored(vector):
        return False
    shape = [1] * (x.dim() - value.dim()) + list(value.shape)
    return shape == [1, x.shape[1], *[1] * (x.dim() - 2)]


def _is_stored(node: fx.Node) -> bool:
    if node.op == "call_function":
        inputs = node.all_input_nodes
        return bool(inputs) and all(map(_is_stored, inputs))
    return "value" in node.meta


def _batch_norm(node: fx.Node, found: _Affine) -> fx.Node:
    call = Nodes(node, (), {}).call
    scale = call(aten.reshape.default, found.scale, [-1])
    zeros, rest = call(aten.zeros_like.default, scale), call(aten.full_like.default, scale, 1 - EPS)
    shift, mean = (
        zeros if each is None else call(aten.reshape.default, each, [-1])
        for each in (found.shift, found.mean)
    )
    given = (found.x, scale, shift, mean, rest)
    return call(aten.batch_norm.default, *given, False, 0.0, EPS, True)
