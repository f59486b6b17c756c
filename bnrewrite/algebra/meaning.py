"""What each tensor of a graph means.

``read(graph)`` walks a canonical graph once. A tensor whose operation the algebra knows gets the
formula of its inputs; any other is an atom. So is the base of every statistic (``anchors``): a
norm's formula is about the tensor that it normalises, not about how that tensor was made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .anchors import anchors, lineage
from .axes import Axis, Dim, Dims, Opaque, align, axes_of, fresh_dims, size_of, substitute
from .calls import arguments_of, is_tensor, name_of, shape_of
from .expression import Polynomial, number
from .ring import Ring


@dataclass(frozen=True)
class Meaning:
    """A formula and the axes along which the tensor's dimensions run."""

    dims: Dims
    value: Polynomial


@dataclass
class Reading:
    """The meanings of one graph.

    Attributes:
        meanings: what consumers of a node see.
        sealed: nodes that round (a narrowing cast): their meaning before rounding. Consumers see
            an atom, since what follows happens in the lower precision.
        narrowed: nodes at which a statistic was rounded to a lower precision.
        anchors: the bases of the statistics.
    """

    ring: Ring
    meanings: dict[fx.Node, Meaning] = field(default_factory=dict)
    outputs: dict[fx.Node, tuple[Meaning, ...]] = field(default_factory=dict)
    sealed: dict[fx.Node, Meaning] = field(default_factory=dict)
    narrowed: set[fx.Node] = field(default_factory=set)
    anchors: frozenset[fx.Node] = frozenset()
    _lineage: dict[object, frozenset[object]] = field(default_factory=dict)

    def formula(self, node: fx.Node) -> Meaning | None:
        """The meaning of a node itself (before rounding, where it rounds)."""
        return self.sealed.get(node) or self.meanings.get(node)

    def derived(self, statistics: frozenset[object]) -> frozenset[object]:
        """The tensors that statistics are taken of, and what those are made of element by element.

        So a statistic of a slice, a masked copy or a concatenation is one of the whole tensor.
        """
        found: set[object] = set()
        for source in statistics:
            if source not in self._lineage:
                self._lineage[source] = lineage(source)
            found |= self._lineage[source]
        return frozenset(found)

    def operand(self, value: Any) -> Meaning:
        """The meaning of an argument: a node or a number."""
        if isinstance(value, fx.Node):
            if value not in self.meanings:
                raise Opaque(f"{value.name} has no meaning")
            return self.meanings[value]
        if isinstance(value, (bool, int, float)):
            return Meaning((), number(value))
        raise Opaque(f"an argument of type {type(value).__name__}")

    def atom(self, node: fx.Node) -> Meaning:
        """A tensor that is not understood."""
        dims = fresh_dims(shape_of(node))
        return Meaning(dims, self.ring.atom(node, dims))

    def broadcast(self, *operands: Meaning) -> tuple[Dims, list[Polynomial]]:
        """Put operands on common dimensions, renaming and splitting axes where they differ.

        The operand with the most axes keeps its names, then the one that holds a statistic: so
        everything about one norm ends in the axes of its tensor.
        """
        rank = max(len(m.dims) for m in operands)
        common: list[Dim] = [()] * rank
        values: dict[int, Polynomial] = {}

        def rank_of(position: int) -> tuple[int, bool]:
            value = operands[position].value
            known = self.ring.moments(value) or self.ring.raw(value) & self.anchors
            return -len(axes_of(operands[position].dims)), not known

        for position in sorted(range(len(operands)), key=rank_of):
            meaning = operands[position]
            dims: list[Dim] = [()] * (rank - len(meaning.dims)) + list(meaning.dims)
            moves: dict[Axis, Dim] = {}
            for i, dim in enumerate(dims):
                if not dim or not common[i]:
                    continue
                left, right = align(common[i], dim)
                common = list(substitute(tuple(common), left))
                values = {k: self.ring.substitute(v, left) for k, v in values.items()}
                moves.update(right)
            taken = set(axes_of(tuple(common)))
            for i, dim in enumerate(dims):
                if dim and not common[i]:
                    new = tuple(Axis(a.size) if a in taken else a for a in dim)
                    moves.update({a: (b,) for a, b in zip(dim, new, strict=True) if a is not b})
                    common[i] = new
            values[position] = self.ring.substitute(meaning.value, moves)
        return tuple(common), [values[i] for i in range(len(operands))]


Semantics = Callable[[Reading, fx.Node, dict[str, Any]], "Meaning | tuple[Meaning, ...]"]


def read(graph: fx.Graph, *, grad_enabled: bool = True) -> Reading:
    """The meaning of every tensor of a canonical graph.

    Args:
        graph: functional pre-autograd ATen with fake values in ``meta["val"]``.
        grad_enabled: whether gradients were recorded when the graph was captured.
    """
    from .semantics import SEMANTICS  # the table imports this module's types

    ever = grad_enabled or any(
        n.target is torch._C._set_grad_enabled and n.args[0] for n in graph.nodes
    )
    gradients = _differentiable(graph, grad_enabled, ever)
    reading = Reading(Ring(lambda source: source in gradients), anchors=anchors(graph))
    grad = grad_enabled
    for node in graph.nodes:
        if node.op == "call_function" and node.target is torch._C._set_grad_enabled:
            grad = bool(node.args[0])
            continue
        _read_node(reading, node, SEMANTICS, stopped=ever and not grad)
    return reading


def _read_node(
    reading: Reading, node: fx.Node, semantics: dict[str, Semantics], *, stopped: bool
) -> None:
    value = node.meta.get("val")
    if isinstance(value, torch.SymInt):
        reading.meanings[node] = Meaning((), reading.ring.extent(size_of(value)))
        return
    if node.op == "get_attr":
        constant = _constant(node)
        if constant is not None:
            reading.meanings[node] = constant
            return
    result: Meaning | tuple[Meaning, ...] | None = None
    rule = semantics.get(name_of(node)) if node.op == "call_function" else None
    if rule is not None:
        try:
            result = rule(reading, node, arguments_of(node))
            if stopped and isinstance(result, Meaning):
                result = Meaning(result.dims, reading.ring.stop(result.value))
        except Opaque:
            result = None
    if node in reading.anchors and isinstance(result, Meaning):
        reading.sealed[node] = result
        result = None
    if isinstance(result, tuple):
        reading.outputs[node] = result
    elif result is not None:
        reading.meanings[node] = result
    elif isinstance(value, torch.Tensor):
        reading.meanings[node] = _opaque(reading, node)
    elif isinstance(value, (torch.SymFloat, float)):
        reading.meanings[node] = Meaning((), reading.ring.atom(node, ()))


def _constant(node: fx.Node) -> Meaning | None:
    """A tensor constant of one element is a number."""
    module = node.graph.owning_module
    value = getattr(module, str(node.target), None) if module is not None else None
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        return None
    if not value.dtype.is_floating_point or value.requires_grad:
        return None
    return Meaning(((),) * value.dim(), number(float(value)))


def _opaque(reading: Reading, node: fx.Node) -> Meaning:
    """An atom; an unknown elementwise function of statistics alone still counts as a statistic."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags:
        tensors = [reading.meanings.get(n) for n in node.all_input_nodes if is_tensor(n)]
        known = [m for m in tensors if m is not None]
        moments = frozenset().union(*(reading.ring.moments(m.value) for m in known))
        raw = frozenset().union(*(reading.ring.raw(m.value) for m in known))
        if moments and len(known) == len(tensors) and not raw & reading.anchors:
            try:
                dims, _ = reading.broadcast(*known)
            except Opaque:
                return reading.atom(node)
            return Meaning(dims, reading.ring.atom(node, dims, moments=moments))
    return reading.atom(node)


def _differentiable(graph: fx.Graph, grad_enabled: bool, ever: bool) -> frozenset[fx.Node]:
    """The nodes that carry a gradient."""
    found: set[fx.Node] = set()
    grad = grad_enabled
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder":
            if ever and isinstance(value, torch.Tensor) and node.meta["requires_grad"]:
                found.add(node)
        elif node.op == "call_function":
            if node.target is torch._C._set_grad_enabled:
                grad = bool(node.args[0])
            elif grad and name_of(node) != "detach" and not found.isdisjoint(node.all_input_nodes):
                found.add(node)
    return frozenset(found)
