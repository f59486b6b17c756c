"""Writes nodes into a graph: operations with their fake values, sizes, layouts, arithmetic."""

from __future__ import annotations

import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any, cast

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch.fx.experimental import _config as config

from bnrewrite.algebra.axes import Axis, Dims, Size, axes_of, product, size_of
from bnrewrite.algebra.calls import is_tensor
from bnrewrite.algebra.expression import Exponent, Number
from bnrewrite.kernels import KERNELS
from bnrewrite.walks import computed_from

aten = torch.ops.aten
Value = fx.Node | float | int
Sizes = dict[sympy.Expr, Value]

LARGEST = 2**63  # from which on operations take no integer

# Their eps and momentum are floats at run time; a symbolic one has no fake value to run with.
SCALAR_ARGUMENTS = (
    aten.batch_norm.default,
    aten.layer_norm.default,
    aten.group_norm.default,
    aten.rms_norm.default,
    *KERNELS,
)


class Unwritable(Exception):
    """A formula that has no form in nodes here; the site stays the user's code."""


def current(node: fx.Node) -> fx.Node:
    """A node, or what replaced it: the tensor of a norm may be the result of one before."""
    while "replaced_by" in node.meta:
        node = node.meta["replaced_by"]
    return node


class Nodes:
    """Writes nodes before one node of a graph.

    Args:
        before: new nodes go in front of this one and inherit its origin.
        layout: the dimensions that emitted tensors have, those that do not vary being of size 1.
        sizes: nodes for symbolic sizes; those that are written are added.
    """

    def __init__(self, before: fx.Node, layout: Dims, sizes: Sizes) -> None:
        self.before = before
        self.layout = layout
        self.sizes = sizes
        self._powers: dict[tuple[Value, Exponent], Value] = {}

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A new node, with its fake value."""
        graph = self.before.graph
        args, kwargs = fx.map_arg((args, kwargs), current)
        with graph.inserting_before(self.before):
            node = graph.call_function(target, args, kwargs)
        for key in ("stack_trace", "nn_module_stack"):
            if key in self.before.meta:
                node.meta[key] = self.before.meta[key]
        node.meta["val"] = fake_value(target, args, kwargs, self.before.meta.get("val"))
        return node

    def items(self, node: fx.Node, count: int) -> list[fx.Node]:
        """The results of an operation that has several."""
        return [self.call(operator.getitem, node, i) for i in range(count)]

    def extent(self, size: Size) -> Value:
        """A size as a number or a node."""
        if isinstance(size, int):
            return size
        if size.is_Integer:
            return int(size)
        if size in self.sizes:
            return self.sizes[size]
        if size.is_Mul or size.is_Add:
            combine = operator.mul if size.is_Mul else operator.add
            first, *others = (self.extent(cast(sympy.Expr, a)) for a in size.args)
            for other in others:
                first = self.call(combine, first, other)
            self.sizes[size] = first
            return first
        if isinstance(size, sympy.Pow) and size.exp.is_Integer and size.exp > 0:
            base = self.extent(cast(sympy.Expr, size.base))
            self.sizes[size] = self.call(operator.pow, base, int(size.exp))
            return self.sizes[size]
        raise Unwritable(f"the size {size} cannot be read from the norm's input")

    def sizes_of(self, node: fx.Node) -> None:
        """Learn the symbolic sizes of a tensor."""
        for dim, extent in enumerate(node.meta["val"].shape):
            if isinstance(extent, torch.SymInt) and not extent.node.expr.is_number:
                expression = extent.node.expr
                if expression not in self.sizes:
                    self.sizes[expression] = self.call(aten.sym_size.int, node, dim)

    def reshape(self, node: fx.Node, shape: list[Size]) -> fx.Node:
        """``reshape``, left out where the shape is that already."""
        current = [size_of(s) for s in node.meta["val"].shape]
        if current == shape:
            return node
        symbolic = [s for s in shape if not isinstance(s, int)]
        if len(symbolic) == 1 and not config.backed_size_oblivious:  # there -1 may become a number
            arguments: list[Any] = [s if isinstance(s, int) else -1 for s in shape]
        else:
            arguments = [self.extent(s) for s in shape]
        return self.call(aten.reshape.default, node, arguments)

    def place(self, node: fx.Node, index: Dims, layout: Dims | None = None) -> fx.Node:
        """A tensor whose dimensions run along ``index``, laid out along ``layout``."""
        layout = self.layout if layout is None else layout
        for dim, axes in enumerate(index):
            if not axes and size_of(node.meta["val"].shape[dim]) != 1:
                node = self.call(aten.slice.Tensor, node, dim, 0, 1)
        tokens = axes_of(index)
        present = [dim for dim in layout if set(dim) & set(tokens)]
        wanted = [axis for dim in present for axis in dim]
        if set(wanted) != set(tokens):
            raise Unwritable("a tensor varies along a part of a dimension")
        shape: list[Size] = [
            product(a.size for a in dim) if dim in present else 1 for dim in layout
        ]
        if wanted != tokens:
            split: list[Size] = [a.size for a in tokens]
            node = self.reshape(node, split)
            node = self.call(aten.permute.default, node, [tokens.index(a) for a in wanted])
        return self.reshape(node, shape)

    def power(self, node: Value, exponent: Exponent) -> Value:
        """Node ** exponent by the cheapest operation."""
        key = (node, exponent)
        if key not in self._powers:
            self._powers[key] = self._power(node, exponent)
        return self._powers[key]

    def _power(self, node: Value, exponent: Exponent) -> Value:
        if exponent == 1:
            return node
        if not isinstance(node, fx.Node) or not isinstance(node.meta["val"], torch.Tensor):
            return self._scalar(operator.pow, node, plain(exponent))
        named = {
            Fraction(1, 2): aten.sqrt.default,
            Fraction(-1, 2): aten.rsqrt.default,
            -1: aten.reciprocal.default,
        }
        if exponent in named:
            return self.call(named[exponent], node)
        return self.call(aten.pow.Tensor_Scalar, node, plain(exponent))

    def times(self, left: Value, right: Value | Number) -> Value:
        """Left * right."""
        right = right if isinstance(right, fx.Node) else plain(right)
        if not isinstance(left, fx.Node) and left == 1:
            return right
        if not isinstance(right, fx.Node) and abs(right - 1) < 4e-16:
            return left
        if not isinstance(right, fx.Node) and right == -1 and is_tensor(left):
            return self.call(aten.neg.default, left)
        return self._binary(aten.mul.Tensor, operator.mul, left, right)

    def plus(self, left: Value, right: Value) -> Value:
        """Left + right."""
        if not isinstance(left, fx.Node) and left == 0:
            return right
        if not isinstance(right, fx.Node) and right == 0:
            return left
        return self._binary(aten.add.Tensor, operator.add, left, right)

    def over(self, left: Value, right: Value) -> Value:
        """Left / right."""
        if is_tensor(right) and not is_tensor(left):
            return self.times(self.call(aten.reciprocal.default, right), left)
        return self._binary(aten.div.Tensor, operator.truediv, left, right)

    def _binary(self, target: Any, in_python: Any, left: Value, right: Value) -> Value:
        if not is_tensor(left) and not is_tensor(right):
            return self._scalar(in_python, left, right)
        if not is_tensor(left):
            if target is aten.sub.Tensor:
                return self.call(aten.rsub.Scalar, right, left)
            left, right = right, left
        return self.call(target, left, right)

    def _scalar(self, function: Any, left: Value, right: Value) -> Value:
        if not isinstance(left, fx.Node) and not isinstance(right, fx.Node):
            return plain(function(left, right))
        return self.call(function, left, right)


def fake_value(target: Any, args: Any, kwargs: Any, beside: object = None) -> Any:
    """What an operation makes of the fake values of nodes.

    Args:
        target: the operation.
        args: with nodes in them.
        kwargs: likewise.
        beside: a fake value of the same graph, as constants are none.
    """
    values, keywords = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
    if target in SCALAR_ARGUMENTS:
        values = tuple(0.5 if isinstance(v, torch.SymFloat) else v for v in values)
    mode = detect_fake_mode((values, beside))
    if mode is None:
        return target(*values, **keywords)
    with enable_python_dispatcher(), mode, torch.no_grad():
        return target(*values, **keywords)


def split_layout(dims: Dims, axes: frozenset[Axis]) -> Dims:
    """The layout in which every dimension that ``axes`` cuts is split into its axes."""
    result: list[tuple[Axis, ...]] = []
    for dim in dims:
        inside = set(dim) & axes
        if inside and inside != set(dim):
            result += [(axis,) for axis in dim]
        else:
            result.append(dim)
    return tuple(result)


def plain(value: Number) -> float | int:
    """A coefficient as an operation takes it: of the size of its integers, or floating."""
    return value if isinstance(value, int) and abs(value) < LARGEST else float(value)


def live_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that something is made of: what lowerings left behind goes with ``Cleanup``."""
    *_, output = graph.nodes
    return set(computed_from([output]))
