"""Linear maps with a weight: convolutions, transposed ones, ``linear``, products with a matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from bnrewrite.algebra.calls import arguments_of, is_tensor, name_of
from bnrewrite.kernels.folding import Outputs

from .nodes import aten

FORWARD = frozenset(("conv1d", "conv2d", "conv3d"))
TRANSPOSED = frozenset(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"))


@dataclass(frozen=True)
class LinearMap:
    """A linear map of a graph.

    Attributes:
        node: its result.
        x: what it is a map of.
        weight: a node.
        bias: a node with one number per output, or None.
        channel: the dimension of the result along which the outputs lie.
        outputs: where they stand in the weight.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    channel: int
    outputs: Outputs

    def called(self, x: fx.Node, weight: fx.Node, bias: fx.Node) -> fx.Node:
        """The same map with another weight and bias, at the place where its graph inserts."""
        graph = x.graph
        if name_of(self.node) in ("matmul", "mm", "addmm"):
            turned = graph.call_function(aten.t.default, (weight,))
            if "val" in weight.meta:
                turned.meta["val"] = weight.meta["val"].t()
            return graph.call_function(aten.linear.default, (x, turned, bias))
        given = {**arguments_of(self.node), "input": x, "weight": weight, "bias": bias}
        return graph.call_function(self.node.target, tuple(given.values()))  # type: ignore[arg-type]


def linear_map(node: fx.Node) -> LinearMap | None:
    """The linear map whose result a node is, if it is one."""
    if not isinstance(node.target, torch._ops.OpOverload) or not is_tensor(node):
        return None
    name, given = name_of(node), arguments_of(node)
    if name in ("matmul", "mm", "addmm"):
        return _product(node, name, given)
    convolution = name == "convolution"
    if not (convolution or name == "linear" or name in FORWARD | TRANSPOSED):
        return None
    x, weight, bias = (given[each] for each in ("input", "weight", "bias"))
    if not is_tensor(weight) or weight.meta["val"].dim() < 2 or _has_other_inputs(node, given):
        return None
    rank, spatial = node.meta["val"].dim(), weight.meta["val"].dim() - 2
    turned = name in TRANSPOSED or (convolution and given["transposed"])
    outputs = Outputs(1, given["groups"]) if turned else Outputs(0)
    channel = rank - 1 if name == "linear" else rank - spatial - 1
    return LinearMap(node, x, weight, bias, channel, outputs)


def _product(node: fx.Node, name: str, given: dict[str, Any]) -> LinearMap | None:
    """``x @ W`` with a matrix, ``b + x @ W`` with a vector."""
    bias = None
    if name == "addmm":
        bias, x, weight = (given[each] for each in ("self", "mat1", "mat2"))
        if given["beta"] != 1 or given["alpha"] != 1 or bias.meta["val"].dim() != 1:
            return None
        if bias.meta["val"].shape[0] != node.meta["val"].shape[-1]:
            return None
    else:
        x, weight = given["self"], given["other" if name == "matmul" else "mat2"]
    if weight.meta["val"].dim() != 2:
        return None
    return LinearMap(node, x, weight, bias, node.meta["val"].dim() - 1, Outputs(1))


def _has_other_inputs(node: fx.Node, given: dict[str, Any]) -> bool:
    """Whether a stride or a padding is known at run time only."""
    tensors = [given[each] for each in ("input", "weight", "bias")]
    return any(each not in tensors for each in node.all_input_nodes)
