"""One call of a graph, with its arguments by name whatever their spelling."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import fx

from .axes import Size, size_of

_OPERATORS: dict[Callable[..., Any], str] = {
    operator.add: "add", operator.sub: "sub", operator.mul: "mul", operator.truediv: "div",
    operator.pow: "pow", operator.neg: "neg", operator.getitem: "getitem",
    torch.sym_float: "sym_float",
}  # fmt: skip

# other words for the same operation, with the same arguments
_ALIASES = {
    "subtract": "sub", "multiply": "mul", "divide": "div", "true_divide": "div",
    "negative": "neg", "absolute": "abs",
}  # fmt: skip

CASTS = frozenset(("to", "_to_copy", "type_as"))

POOLS = frozenset((
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "avg_pool1d", "avg_pool2d", "avg_pool3d",
))  # fmt: skip

COUNTS = (torch.int64, torch.int32)  # a counter of one element is a number like any other

FLOATING_RANK = {torch.float16: 0, torch.bfloat16: 0, torch.float32: 1, torch.float64: 2}


def name_of(node: fx.Node) -> str:
    """The operator without namespace and overload: ``mean``, ``pow``."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        space, _, name = target._schema.name.partition("::")
        return _ALIASES.get(name, name) if space == "aten" else target._schema.name
    return _OPERATORS.get(target, "") if callable(target) else ""


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """All arguments by schema name, defaults filled in; operators have ``self`` and ``other``."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return dict(zip(("self", "other"), node.args, strict=False))
    bound: dict[str, Any] = {}
    for position, argument in enumerate(target._schema.arguments):
        if position < len(node.args):
            bound[argument.name] = node.args[position]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        else:
            bound[argument.name] = argument.default_value if argument.has_default_value() else None
    return bound


def is_pointwise(node: fx.Node) -> bool:
    """Whether each element of a node's result is made of the operands' elements in its place."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    known = target._schema.name.removeprefix("aten::") in _ALIASES  # these have no tags
    return known or torch.Tag.pointwise in target.tags


def is_tensor(node: object) -> TypeGuard[fx.Node]:
    """Whether this is a node that holds one tensor, not a size or a number."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def shape_of(node: fx.Node) -> tuple[Size, ...]:
    """The extents of a tensor node."""
    return tuple(size_of(s) for s in node.meta["val"].shape)


def dtype_of(node: fx.Node) -> torch.dtype:
    """The dtype of a tensor node."""
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype


def narrows(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether a cast loses floating-point digits or range."""
    if source == target:
        return False
    if source not in FLOATING_RANK or target not in FLOATING_RANK:
        return True
    return FLOATING_RANK[target] <= FLOATING_RANK[source]


def reduced_dims(node: fx.Node, dim: object) -> tuple[int, ...]:
    """The dimensions that a ``dim`` argument names: all for None and for an empty list."""
    rank = len(node.meta["val"].shape)
    if dim is None or dim == []:
        return tuple(range(rank))
    dims: Sequence[int] = [dim] if isinstance(dim, int) else list(dim)  # type: ignore[call-overload]
    return tuple(sorted(d % rank for d in dims)) if rank else ()


def pools_everything(node: fx.Node) -> bool:
    """Whether a pooling has one window, as large as what it pools: it is a mean."""
    a, name = arguments_of(node), name_of(node)
    extents = shape_of(a["self"])[-int(name.removesuffix("d")[-1]) :]
    if "output_size" in a:
        return all(s == 1 for s in a["output_size"])
    windows = [size_of(k.meta["val"]) if isinstance(k, fx.Node) else k for k in a["kernel_size"]]
    windows = windows * len(extents) if len(windows) == 1 else windows
    plain = a.get("divisor_override") is None and not any(a["padding"])
    return plain and windows == list(extents)
