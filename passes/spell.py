"""PyTorch's batch norms in evaluation, read as the affine that they are.

Before:  y = batch_norm(conv(x), w, b, m, v, training=False)
After:   the same; what reads the graph in between sees (conv(x) - m) (v + eps)^(-1/2) w + b
Leaves alone: a norm that could not go into a linear map before it: it is native already.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import fx

from bnrewrite.algebra.anchors import elements

from .costs import fewest
from .linear_maps import linear_map
from .nodes import Nodes, aten
from .rewriting import Rewriting

BATCH_NORMS = (
    aten.batch_norm.default,
    aten._native_batch_norm_legit_no_training.default,
    aten._native_batch_norm_legit.no_stats,
)


@dataclass(frozen=True)
class BatchNorm:
    """A call: mean and variance are None where they are those of the batch."""

    x: fx.Node
    weight: fx.Node | None
    bias: fx.Node | None
    mean: fx.Node | None
    variance: fx.Node | None
    eps: float

    @property
    def given(self) -> list[fx.Node]:
        """What it is given beside x."""
        found = (self.weight, self.bias, self.mean, self.variance)
        return [each for each in found if each is not None]


def batch_norm_of(node: fx.Node) -> BatchNorm:
    """The arguments of one of ``BATCH_NORMS``, by their meaning."""
    args: Any = node.args
    x, weight, bias = args[:3]
    if node.target is aten._native_batch_norm_legit_no_training.default:
        return BatchNorm(x, weight, bias, args[3], args[4], args[6])
    if node.target is aten._native_batch_norm_legit.no_stats:
        return BatchNorm(x, weight, bias, None, None, args[5])
    mean, variance = (None, None) if args[5] else args[3:5]
    return BatchNorm(x, weight, bias, mean, variance, args[7])


@contextmanager
def spelled(rewriting: Rewriting) -> Iterator[dict[fx.Node, fx.Node]]:
    """Inside, batch norms that may be folded are formulas.

    Yields:
        The batch norm of each formula; afterwards it is in its place again.
    """
    found: dict[fx.Node, fx.Node] = {}
    if _may_fold(rewriting):
        for node in list(rewriting.graph.nodes):
            if node.target in BATCH_NORMS and _is_foldable(rewriting, norm := batch_norm_of(node)):
                result = _result(node)
                users = list(result.users)
                formula = _formula(norm, result)
                for user in users:
                    user.replace_input_with(result, formula)
                found[formula] = result
    yield found
    for formula, result in found.items():
        formula.replace_all_uses_with(result)
        formula.meta["replaced_by"] = result


def _may_fold(rewriting: Rewriting) -> bool:
    options = rewriting.options
    if options.disable & {"fold", "affine"} or options.only is not None:
        return False
    return rewriting.constants is not None or (
        options.stage == "eager" and options.kernels == "auto"
    )


def _is_foldable(rewriting: Rewriting, norm: BatchNorm) -> bool:
    """What can be told before the graph is read."""
    found = linear_map(norm.x)
    if found is None or norm.mean is None or len(norm.x.users) > 1:
        return False
    values = [each.meta["val"] for each in (*norm.given, found.weight)]
    if not all(each.meta.get("parameter") or each.meta.get("stored") for each in norm.given):
        return False
    if any(each.dtype != norm.x.meta["val"].dtype for each in values):
        return False
    if rewriting.constants is not None:
        return True
    trained = rewriting.canonical.grad_enabled and any(each.requires_grad for each in values)
    on_cpu = values[0].device.type == "cpu"
    return on_cpu and not trained and elements(norm.x) >= fewest(found.weight)


def _result(node: fx.Node) -> fx.Node:
    """The normalised tensor; a call may have statistics as further results."""
    results = [each for each in node.users if each.target is operator.getitem]
    return next((each for each in results if each.args[1] == 0), node)


def _formula(norm: BatchNorm, result: fx.Node) -> fx.Node:
    """(x - mean) (variance + eps)^(-1/2) weight + bias, right behind the norm."""
    call = Nodes(result.next, (), {}).call
    shape = [-1, *[1] * (norm.x.meta["val"].dim() - 2)]

    def along(vector: fx.Node | None) -> fx.Node:
        return call(aten.reshape.default, vector, shape)

    y = call(aten.sub.Tensor, norm.x, along(norm.mean))
    spread = call(aten.add.Scalar, along(norm.variance), norm.eps)
    y = call(aten.mul.Tensor, y, call(aten.rsqrt.default, spread))
    if norm.weight is not None:
        y = call(aten.mul.Tensor, y, along(norm.weight))
    y = y if norm.bias is None else call(aten.add.Tensor, y, along(norm.bias))
    _say_origin(result, y)
    return y


def _say_origin(result: fx.Node, formula: fx.Node) -> None:
    """What is behind a node is where the user wrote that."""
    node = result
    while node is not formula:
        node = node.next
        for key in ("stack_trace", "nn_module_stack"):
            node.meta.pop(key, None)
            if key in result.meta:
                node.meta[key] = result.meta[key]
