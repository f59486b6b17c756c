"""A few calls in the form that providers have the best kernels for.

Before:  x * 1.0; batch_norm of a matrix by stored statistics; batch_norm by its batch's statistics
After:   x; x * scale + shift; moments and one multiply-add
Leaves alone: batch_norm of images by stored statistics, which is one operation.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode

from bnrewrite.kernels.frozen import is_small

aten = torch.ops.aten
NEUTRAL = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)


def make_plain(graph: fx.Graph) -> None:
    """Change the graph in place."""
    for node in list(graph.nodes):
        if node.target in NEUTRAL and _is_neutral(node):
            node.replace_all_uses_with(node.args[0])
        elif node.target is aten.batch_norm.default:
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
    x, weight, bias, _mean, _variance, training, _, eps, *_ = node.args
    value = x.meta["val"]  # type: ignore[union-attr]
    writing = _Writing(node)
    if training:
        dims = [0, *range(2, value.dim())]
        both = writing(aten.var_mean.correction, x, dims, correction=0, keepdim=True)
        found, centre = (writing(operator.getitem, both, i) for i in range(2))
        centred = writing(aten.sub.Tensor, x, centre)
        scale = writing(aten.rsqrt.default, writing(aten.add.Scalar, found, eps))
        if weight is not None:
            scale = writing(aten.mul.Tensor, scale, _along(writing, weight, value.dim()))
        result = writing(aten.mul.Tensor, centred, scale)
        if bias is not None:
            result = writing(aten.add.Tensor, result, _along(writing, bias, value.dim()))
    elif value.dim() == 2 and _is_stored(node):
        result = _matrix(writing, node)
    else:
        return
    node.replace_all_uses_with(result)


def _matrix(writing: Callable[..., fx.Node], node: fx.Node) -> fx.Node:
    """Scale and shift in float64, which are constants later."""
    x, weight, bias, mean, variance, _, _, eps, *_ = node.args
    dtype = node.meta["val"].dtype

    def wide(value: Any) -> fx.Node:
        return writing(aten.to.dtype, value, torch.float64)

    scale = writing(aten.rsqrt.default, writing(aten.add.Scalar, wide(variance), eps))
    scale = scale if weight is None else writing(aten.mul.Tensor, scale, wide(weight))
    shift = None if bias is None else wide(bias)
    values = [each.meta["value"].detach().cpu().double() for each in (mean, variance)]  # type: ignore[union-attr]
    if is_small(*values, float(eps)):  # type: ignore[arg-type]
        product = writing(aten.mul.Tensor, wide(mean), scale)
        negative = writing(aten.neg.default, product)
        shift = negative if shift is None else writing(aten.add.Tensor, shift, negative)
    else:
        x = writing(aten.sub.Tensor, x, writing(aten.to.dtype, wide(mean), dtype))
    y = writing(aten.mul.Tensor, x, writing(aten.to.dtype, scale, dtype))
    if shift is None:
        return y
    return writing(aten.add.Tensor, y, writing(aten.to.dtype, shift, dtype))


def _is_stored(node: fx.Node) -> bool:
    given = [each for each in node.args[1:5] if each is not None]
    return all(isinstance(each, fx.Node) and "value" in each.meta for each in given)


def _along(writing: Callable[..., fx.Node], vector: Any, rank: int) -> fx.Node:
    return writing(aten.reshape.default, vector, [-1, *[1] * (rank - 2)])


class _Writing:
    """Writes nodes in front of one, with their fake values."""

    def __init__(self, before: fx.Node) -> None:
        self.before = before

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        with self.before.graph.inserting_before(self.before):
            made = self.before.graph.call_function(target, args, kwargs)
        values, keywords = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        mode = detect_fake_mode(values)
        if mode is None:
            made.meta["val"] = target(*values, **keywords)
        else:
            with mode, torch.no_grad():
                made.meta["val"] = target(*values, **keywords)
        for key in ("stack_trace", "nn_module_stack"):
            if key in self.before.meta:
                made.meta[key] = self.before.meta[key]
        return made
