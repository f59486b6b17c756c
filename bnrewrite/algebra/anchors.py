"""The tensors that statistics are taken of.

Walks from every reduction back through casts, squares and the subtraction of other statistics to
the tensor whose moments are taken. Only a choice of what to call an atom: a poor choice loses a
norm, it never makes a wrong one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from .calls import arguments_of, dtype_of, is_tensor, name_of, narrows

REDUCTIONS = frozenset((
    "mean", "sum", "var", "std", "var_mean", "std_mean", "norm", "linalg_vector_norm",
    "linalg_norm", "frobenius_norm", "amax", "max", "einsum", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "dot", "vdot",
))  # fmt: skip

SAME = frozenset((
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "permute", "transpose", "t",
    "movedim", "unsqueeze", "squeeze", "expand", "expand_as", "contiguous", "clone", "alias",
    "detach", "neg", "abs", "square", "lift_fresh_copy", "view_as", "swapaxes", "moveaxis",
    "reshape_as", "numpy_T", "mT",
))  # fmt: skip

MOVES = frozenset((
    "slice", "select", "narrow", "split", "split_with_sizes", "chunk", "unbind", "getitem", "cat",
    "index", "index_select", "masked_fill", "where", "roll", "flip", "constant_pad_nd", "pad",
))  # fmt: skip

FORWARD = 48  # how many nodes on a reduction is followed to the tensor that it scales
STEPS = 24  # how many tensors back a statistic is still about the tensor that it scales

CASTS = frozenset(("to", "_to_copy", "type_as"))


def anchors(graph: fx.Graph) -> frozenset[fx.Node]:
    """The bases of all reductions of a graph."""
    statistic: dict[
        fx.Node, float
    ] = {}  # reductions and what is computed from them: elements reduced
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        inputs = [n for n in node.all_input_nodes if is_tensor(n) or n in statistic]
        if name_of(node) in REDUCTIONS and not _is_product(node):
            for operand in _operands(node):
                base = _base(operand, statistic)
                if base is not None:
                    found.add(base)
            if _scales_more(node):
                statistic[node] = max((_extent(n) for n in _operands(node)), default=0)
            continue
        reduced = [statistic[n] for n in inputs if n in statistic]
        if reduced and (
            all(n in statistic or _extent(n) <= 1 for n in inputs) or _extent(node) < max(reduced)
        ):
            statistic[node] = max(reduced)
    return frozenset(found)


def _scales_more(reduction: fx.Node) -> bool:
    """Whether a reduction is later combined with a larger tensor, element by element.

    If it is not it is no statistic but a new tensor: a pooled one, a weighted sum.
    """
    own = max(_extent(reduction), 1)
    seen: set[fx.Node] = set()
    todo = list(reduction.users)
    while todo and len(seen) < FORWARD:
        node = todo.pop(0)
        if node in seen or not _is_elementwise(node):
            continue
        seen.add(node)
        if name_of(node) not in SAME and _extent(node) > own:
            return True
        todo += node.users
    return False


def _is_elementwise(node: fx.Node) -> bool:
    target = node.target
    pointwise = isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
    return pointwise or name_of(node) in SAME | CASTS | REDUCTIONS | {"getitem", "cat"}


def lineage(source: object) -> frozenset[object]:
    """A tensor and what it is made of element by element, a few steps back."""
    if not isinstance(source, fx.Node):
        return frozenset((source,))
    found: set[object] = {source}
    todo = [source]
    while todo and len(found) < STEPS:
        node = todo.pop(0)
        target = node.target
        pointwise = isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
        if pointwise or name_of(node) in MOVES | SAME | CASTS:
            todo += [n for n in node.all_input_nodes if n not in found]
            found.update(node.all_input_nodes)
    return frozenset(found)


def _is_product(node: fx.Node) -> bool:
    """An einsum that sums over nothing."""
    if name_of(node) != "einsum":
        return False
    inputs, arrow, output = str(node.args[0]).replace(" ", "").partition("->")
    return bool(arrow) and set(inputs) - {",", "."} <= set(output)


def _operands(node: fx.Node) -> list[fx.Node]:
    arguments = arguments_of(node)
    if name_of(node) == "einsum":
        return [n for n in arguments["tensors"] if isinstance(n, fx.Node)]
    first = arguments.get("self", arguments.get("input", node.args[0] if node.args else None))
    return [first] if isinstance(first, fx.Node) else []


def _base(node: fx.Node, statistic: dict[fx.Node, float]) -> fx.Node | None:
    """The tensor under a reduction's operand; None where it is itself a statistic."""
    if node in statistic:
        return None
    if node.op != "call_function":
        return node
    name = name_of(node)
    arguments = arguments_of(node)
    first = arguments.get("self")
    if not isinstance(first, fx.Node):
        return node
    if name in SAME:
        return _base(first, statistic)
    if name in CASTS:
        return node if narrows(dtype_of(first), dtype_of(node)) else _base(first, statistic)
    if name == "pow" and not isinstance(arguments.get("exponent"), fx.Node):
        return _base(first, statistic)
    if name in ("add", "sub", "rsub", "mul", "div"):
        return _base_of_binary(node, name, first, arguments.get("other"), statistic)
    return node


def _base_of_binary(
    node: fx.Node, name: str, left: fx.Node, right: Any, statistic: dict[fx.Node, float]
) -> fx.Node | None:
    if not isinstance(right, fx.Node) or not is_tensor(right):
        return _base(left, statistic)
    bases = [_base(n, statistic) for n in (left, right)]
    if name == "mul" and bases[0] is not None and bases[0] is bases[1]:
        return bases[0]
    if name in ("add", "sub", "rsub"):
        for full, small in ((left, right), (right, left)):
            if small in statistic and full not in statistic:
                return _base(full, statistic)
        if bases[0] is not None and bases[0] is bases[1]:
            return bases[0]
    return node


def _extent(node: fx.Node) -> float:
    """The number of elements, symbolic sizes by their example."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return 1
    sizes = [s.node.hint if isinstance(s, torch.SymInt) else s for s in value.shape]
    return math.prod(s or 2 for s in sizes)
