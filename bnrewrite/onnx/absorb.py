"""Casts and affines around a norm that are part of the standard operation.

    LayerNormalization(x, w, b) = cast_T(standardise(cast_float32(x))) * w + b       x, w, b in T
    RMSNormalization(x, w)      = cast_T(x / rms(cast_float32(x))) * w

is how ONNX defines both (`stash_type` is float32): code that takes its statistics in float32, goes
back to half precision and scales there is one operation.

Before:  y = w * to_half(rms_norm(to_float(x)))
After:   y = rms_norm(x, w)
Leaves alone: a scale in float32 before the cast back; a norm whose inner values are used elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

NORMS = (aten.layer_norm.default, aten.rms_norm.default)
CASTS = (aten.to.dtype, aten._to_copy.default)
HALVES = (torch.float16, torch.bfloat16)
WEIGHT, BIAS = 2, 3  # positions of arguments


def absorb(graph: fx.Graph) -> None:
    """Draw casts and affines into the norms of a graph."""
    for node in list(graph.nodes):
        if node.target in NORMS:
            _complete(node)
            norm = _without_casts(node)
            norm = _with_factor(norm)
            if norm.target is aten.layer_norm.default:
                _with_summand(norm)
    graph.eliminate_dead_code()


def _complete(norm: fx.Node) -> None:
    """All arguments by position, defaults included."""
    arguments = norm.target._schema.arguments  # type: ignore[union-attr]
    given = [*norm.args, *(None for _ in arguments[len(norm.args) :])]
    for i in range(len(norm.args), len(arguments)):
        given[i] = norm.kwargs.get(arguments[i].name, arguments[i].default_value)
    norm.args, norm.kwargs = tuple(given), {}


def _without_casts(norm: fx.Node) -> fx.Node:
    """The norm in half precision, where it is cast up before and back behind."""
    x, cast = norm.args[0], _only_user(norm)
    plain = all(each is None for each in norm.args[WEIGHT : _affine_end(norm)])
    if not (plain and cast is not None and _is_cast(cast) and isinstance(x, fx.Node)):
        return norm
    if not (_is_cast(x) and isinstance(x.args[0], fx.Node)):
        return norm
    half = x.args[0]
    if _dtype(half) not in HALVES or _dtype(cast) != _dtype(half) or _dtype(x) != torch.float32:
        return norm
    return _replace(cast, norm, (half, *norm.args[1:]))


def _with_factor(norm: fx.Node) -> fx.Node:
    user = _only_user(norm)
    bias = norm.args[BIAS] if norm.target is aten.layer_norm.default else None
    if user is None or user.target is not aten.mul.Tensor or bias is not None:
        return norm
    factor = _vector(norm, user)
    if factor is None or norm.args[WEIGHT] is not None:
        return norm
    return _replace(user, norm, _with(norm, WEIGHT, factor))


def _with_summand(norm: fx.Node) -> None:
    user = _only_user(norm)
    if user is None or user.target is not aten.add.Tensor or user.kwargs or norm.args[BIAS]:
        return
    summand = _vector(norm, user)
    if summand is not None:
        _replace(user, norm, _with(norm, BIAS, summand))


def _vector(norm: fx.Node, user: fx.Node) -> fx.Node | None:
    """The other operand of a user, as a tensor of exactly the normalised shape."""
    others = [each for each in user.args if each is not norm]
    if len(others) != 1 or not isinstance(others[0], fx.Node) or _dtype(user) != _dtype(norm):
        return None
    other = others[0]
    value, shape = other.meta.get("val"), list(_shape(norm))
    if not isinstance(value, torch.Tensor) or value.dtype != _dtype(norm):
        return None
    sizes = list(value.shape)
    if any(not isinstance(s, int) for s in (*sizes, *shape)) or "value" not in _root(other).meta:
        return None
    if list(user.meta["val"].shape) != list(norm.meta["val"].shape):
        return None
    if sizes == shape:
        return other
    if [s for s in sizes if s != 1] != [s for s in shape if s != 1] or len(sizes) < len(shape):
        return None
    if sizes[len(sizes) - len(shape) :] != shape:
        return None
    with norm.graph.inserting_before(user):
        made = norm.graph.call_function(aten.reshape.default, (other, shape))
    made.meta["val"] = value.reshape(shape)
    return made


def _root(node: fx.Node) -> fx.Node:
    """Through views and casts to what they are made of: a scale that is stored."""
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node


def _replace(old: fx.Node, norm: fx.Node, args: Sequence[Any]) -> fx.Node:
    """A norm with other arguments in the place of what followed it."""
    with old.graph.inserting_before(old):
        made = old.graph.call_function(norm.target, tuple(args), norm.kwargs)  # type: ignore[arg-type]
    made.meta = {**old.meta, "val": old.meta["val"]}
    old.replace_all_uses_with(made)
    return made


def _with(norm: fx.Node, position: int, value: fx.Node) -> list[Any]:
    args = list(norm.args)
    args[position] = value
    return args


def _shape(norm: fx.Node) -> Sequence[Any]:
    shape: Any = norm.args[1]
    return list(shape)


def _affine_end(norm: fx.Node) -> int:
    return BIAS + 1 if norm.target is aten.layer_norm.default else WEIGHT + 1


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].op == "call_function" else None


def _is_cast(node: fx.Node) -> bool:
    """A conversion of the dtype and of nothing else."""
    return node.target in CASTS and set(node.kwargs) <= {"dtype"}


def _dtype(node: fx.Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None
