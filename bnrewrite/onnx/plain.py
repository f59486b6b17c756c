"""A few calls in the form that providers have the best kernels for.

Before:  x * 1.0; batch_norm of a matrix by stored statistics; batch_norm by its batch's statistics
After:   x; x * scale + shift; moments and one multiply-add; means that are the same look the same
Leaves alone: batch_norm of images by stored statistics, which is one operation.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from bnrewrite.kernels.frozen import is_small
from bnrewrite.passes.nodes import Nodes
from bnrewrite.passes.spell import BATCH_NORMS, BatchNorm, batch_norm_of

aten = torch.ops.aten
NEUTRAL = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)


def make_plain(graph: fx.Graph) -> None:
    """Change the graph in place."""
    for node in list(graph.nodes):
        if node.target in NEUTRAL and _is_neutral(node):
            node.replace_all_uses_with(node.args[0])
        elif node.target is aten.mean.dim and node.args[1]:
            rank = node.args[0].meta["val"].dim()
            node.args = (node.args[0], sorted(d % rank for d in node.args[1]), *node.args[2:])
        elif node.target in BATCH_NORMS:
            _batch_norm(node)
    graph.eliminate_dead_code()


def _is_neutral(node: fx.Node) -> bool:
    """Whether a product or quotient with 1 changes neither dtype nor shape: then no value."""
    x, factor = node.args[:2]
    if not isinstance(x, fx.Node) or isinstance(factor, fx.Node) or factor != 1:
        return False
    before, after = x.meta["val"], node.meta["val"]
    same = before.dtype == after.dtype and before.shape == after.shape
    return same and "rounding_mode" not in node.kwargs


def _batch_norm(node: fx.Node) -> None:
    call, writing = batch_norm_of(node), Nodes(node, (), {}).call
    if call.mean is None:
        result = _by_batch(writing, call)
    elif call.x.meta["val"].dim() == 2 and _is_stored(call):
        result = _matrix(writing, call)
    else:
        return
    _replace(node, result)


def _replace(node: fx.Node, result: fx.Node) -> None:
    if node.target is aten.batch_norm.default:
        node.replace_all_uses_with(result)
        return
    for user in list(node.users):  # of several results, of which the others are statistics
        if user.target is operator.getitem and user.args[1] == 0:
            user.replace_all_uses_with(result)


def _by_batch(writing: Callable[..., fx.Node], call: BatchNorm) -> fx.Node:
    rank = call.x.meta["val"].dim()
    dims = [0, *range(2, rank)]
    both = writing(aten.var_mean.correction, call.x, dims, correction=0, keepdim=True)
    variance, mean = (writing(operator.getitem, both, i) for i in range(2))
    centred = writing(aten.sub.Tensor, call.x, mean)
    scale = writing(aten.rsqrt.default, writing(aten.add.Scalar, variance, call.eps))
    if call.weight is not None:
        scale = writing(aten.mul.Tensor, scale, _along(writing, call.weight, rank))
    result = writing(aten.mul.Tensor, centred, scale)
    if call.bias is not None:
        result = writing(aten.add.Tensor, result, _along(writing, call.bias, rank))
    return result


def _matrix(writing: Callable[..., fx.Node], call: BatchNorm) -> fx.Node:
    """Scale and shift in float64, which are constants later."""
    x, dtype = call.x, call.x.meta["val"].dtype
    assert call.mean is not None
    assert call.variance is not None

    def wide(value: Any) -> fx.Node:
        return writing(aten.to.dtype, value, torch.float64)

    scale = writing(aten.rsqrt.default, writing(aten.add.Scalar, wide(call.variance), call.eps))
    scale = scale if call.weight is None else writing(aten.mul.Tensor, scale, wide(call.weight))
    shift = None if call.bias is None else wide(call.bias)
    mean, variance = (
        each.meta["value"].detach().cpu().double() for each in (call.mean, call.variance)
    )
    if is_small(mean, variance, call.eps):
        product = writing(aten.mul.Tensor, wide(call.mean), scale)
        negative = writing(aten.neg.default, product)
        shift = negative if shift is None else writing(aten.add.Tensor, shift, negative)
    else:
        x = writing(aten.sub.Tensor, x, writing(aten.to.dtype, call.mean, dtype))
    y = writing(aten.mul.Tensor, x, writing(aten.to.dtype, scale, dtype))
    if shift is None:
        return y
    return writing(aten.add.Tensor, y, writing(aten.to.dtype, shift, dtype))


def _is_stored(call: BatchNorm) -> bool:
    return all("value" in each.meta for each in call.given)


def _along(writing: Callable[..., fx.Node], vector: Any, rank: int) -> fx.Node:
    return writing(aten.reshape.default, vector, [-1, *[1] * (rank - 2)])
