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

from bnrewrite.gradients import differentiable_nodes, in_grad_mode

from .anchors import anchors, is_power, lineage
from .axes import Axis, Dim, Dims, Opaque, align, axes_of, fresh_dims, size_of, substitute
from .calls import arguments_of, is_pointwise, is_tensor, name_of, shape_of
from .duplicates import duplicates
from .expression import Polynomial, number
from .joined import JOINS, Joined, read_joined
from .ring import Ring
from .stored import is_parameter


@dataclass(frozen=True)
class Meaning:
    """A formula and the axes along which the tensor's dimensions run."""

    dims: Dims
    value: Polynomial


@dataclass
class Reading:
    """The meanings of one graph.

    Attributes:
        ring: what formulas are made in.
        meanings: what consumers of a node see.
        outputs: of nodes with several results, what each of these means.
        sealed: nodes that round (a narrowing cast): their meaning before rounding. Consumers see
            an atom, since what follows happens in the lower precision.
        narrowed: nodes at which a statistic was rounded to a lower precision.
        anchors: the bases of the statistics.
        joined: the pieces of nodes that pack statistics into one tensor.
        piece: while a rule is applied to a concatenation: the operands' pieces.
        same: nodes that repeat an earlier one, with that one.
        chains: by site and tensor: the nodes that make its statistics.
        gone: by node: tensors that it is computed from and that its formula lacks, ``0 * x``.
        read: the operands of the node that is read at present.
        sums: the user's sums without statistics, by each tensor inside; None until asked for.
    """

    ring: Ring
    meanings: dict[fx.Node, Meaning] = field(default_factory=dict)
    outputs: dict[fx.Node, tuple[Meaning | Joined | None, ...]] = field(default_factory=dict)
    sealed: dict[fx.Node, Meaning] = field(default_factory=dict)
    narrowed: set[fx.Node] = field(default_factory=set)
    anchors: frozenset[fx.Node] = frozenset()
    joined: dict[fx.Node, Joined] = field(default_factory=dict)
    piece: dict[fx.Node, Meaning] = field(default_factory=dict)
    same: dict[fx.Node, fx.Node] = field(default_factory=dict)
    chains: dict[tuple[fx.Node, fx.Node], list[fx.Node]] = field(default_factory=dict)
    gone: dict[fx.Node, frozenset[object]] = field(default_factory=dict)
    read: set[fx.Node] = field(default_factory=set)
    sums: dict[object, list[fx.Node]] | None = None
    _lineage: dict[object, frozenset[object]] = field(default_factory=dict)
    _parameters: dict[fx.Node, bool] = field(default_factory=dict)

    def formula(self, node: fx.Node) -> Meaning | None:
        """The meaning of a node itself (before rounding, where it rounds)."""
        return self.sealed.get(node) or self.meanings.get(node)

    def sources(self, node: fx.Node) -> frozenset[object]:
        """The tensors that a node's formula is about, reduced or not; all its results together."""
        return self._sources(node, self.formula(node))

    def _sources(self, node: fx.Node, formula: Meaning | None) -> frozenset[object]:
        values = [formula.value] if formula is not None else []
        for result in self.outputs.get(node, ()):
            if isinstance(result, Meaning):
                values.append(result.value)
        if node in self.joined:
            values += [piece.value for piece in self.joined[node].pieces]
        return frozenset().union(*(self.ring.moments(v) | self.ring.raw(v) for v in values))

    def vanish(self, node: fx.Node) -> bool:
        """Note what cancels at a node; returns whether its formula may stand for it nevertheless.

        ``0 * w``, ``w - w`` and ``w ** 0`` have a gradient of zero, not none, and are NaN where w
        is infinite. A tensor may vanish from a statistic, ``E[x - E[x]] = 0``, and come back: a
        site is checked for it, and what the graph returns.
        """
        before = [self._read_of(n, node) for n in self.read]
        before += [self.gone.get(n, frozenset()) for n in node.all_input_nodes
                   if n not in self.sealed]  # fmt: skip
        gone = frozenset().union(*before) - self.sources(node)
        if not gone:
            return True
        self.gone[node] = gone
        formula = self.formula(node)
        raw = self.ring.raw(formula.value) if formula is not None else frozenset()
        returned = any(user.op == "output" for user in node.users)
        return gone <= self.anchors and not raw and not returned

    def _read_of(self, operand: fx.Node, node: fx.Node) -> frozenset[object]:
        """The tensors that an operand brings to a node.

        Packed statistics are read as one tensor or as their pieces, of which a part may be taken.
        """
        if operand not in self.joined or node in self.joined:
            return self._sources(operand, self.meanings.get(operand))
        whole = self.meanings.get(operand)
        found = frozenset() if whole is None else self.ring.raw(whole.value)
        return found if found & self.sources(node) else frozenset()

    def repeat(self, node: fx.Node) -> None:
        """Give a node that repeats an earlier one what is known of that one."""
        first = self.same[node]
        for table in self._tables():
            if first in table:
                table[node] = table[first]
        if first in self.narrowed:
            self.narrowed.add(node)

    def forget(self, node: fx.Node) -> None:
        """Drop what is known of a node."""
        for table in self._tables():
            table.pop(node, None)

    def _tables(self) -> tuple[dict[fx.Node, Any], ...]:
        return self.meanings, self.outputs, self.sealed, self.joined, self.gone

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

    def is_parameter(self, node: fx.Node) -> bool:
        """Whether a tensor is computed from parameters alone."""
        if node not in self._parameters:
            self._parameters[node] = is_parameter(node)
        return self._parameters[node]

    def operand(self, value: Any) -> Meaning:
        """The meaning of an argument: a node or a number."""
        if isinstance(value, fx.Node):
            self.read.add(value)
            if value in self.piece:
                return self.piece[value]
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

    ever = any(grad for _, grad in in_grad_mode(graph, grad_enabled))
    gradients = differentiable_nodes(graph, grad_enabled) if ever else frozenset()
    same = duplicates(graph, grad_enabled=grad_enabled)
    own = anchors(graph)
    bases = frozenset(same.get(n, n) for n in own)
    same = {n: f for n, f in same.items() if n in own or not (f in bases and is_power(n, bases))}
    reading = Reading(Ring(lambda source: source in gradients), anchors=bases, same=same)
    for node, grad in in_grad_mode(graph, grad_enabled):
        _read_node(reading, node, SEMANTICS, stopped=ever and not grad)
    return reading


def _read_node(
    reading: Reading, node: fx.Node, semantics: dict[str, Semantics], *, stopped: bool
) -> None:
    value = node.meta.get("val")
    reading.read = set()
    if node in reading.same:
        reading.repeat(node)
        return
    known = _size_or_constant(reading, node)
    if known is not None:
        reading.meanings[node] = known
        return
    result = _computed(reading, node, semantics, stopped=stopped)
    if isinstance(result, tuple):
        reading.outputs[node] = result
    elif result is not None:
        (reading.sealed if node in reading.anchors else reading.meanings)[node] = result
    tables = (reading.outputs, reading.sealed, reading.meanings, reading.joined)
    if any(node in table for table in tables) and not reading.vanish(node):
        reading.forget(node)
        if isinstance(value, torch.Tensor):
            reading.meanings[node] = reading.atom(node)
    if node in reading.meanings or node in reading.outputs:
        return
    if isinstance(value, torch.Tensor):
        reading.meanings[node] = _opaque(reading, node)
    elif isinstance(value, (torch.SymFloat, float)):
        reading.meanings[node] = Meaning((), reading.ring.atom(node, ()))


def _size_or_constant(reading: Reading, node: fx.Node) -> Meaning | None:
    """What is a number of the graph: a size, a constant of one element."""
    value = node.meta.get("val")
    if isinstance(value, torch.SymInt):
        return Meaning((), reading.ring.extent(size_of(value)))
    return _constant(node) if node.op == "get_attr" else None


def _computed(
    reading: Reading, node: fx.Node, semantics: dict[str, Semantics], *, stopped: bool
) -> Meaning | tuple[Meaning | Joined | None, ...] | None:
    """What an operation makes of the formulas of its operands; None where that is not known."""
    name = name_of(node) if node.op == "call_function" else ""
    rule = semantics.get(name)
    if reading.joined or name in JOINS:
        packed = read_joined(reading, node, rule, stopped=stopped)
        if packed is not None:
            return packed
    if rule is None:
        return None
    try:
        result = rule(reading, node, arguments_of(node))
        if stopped and isinstance(result, Meaning):
            return Meaning(result.dims, reading.ring.stop(result.value))
    except Opaque:
        return None
    return result


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
    """An atom; an unknown elementwise function of statistics alone still counts as a statistic.

    Not so where further statistics are taken of it: then it is the tensor that they are about.
    """
    if node in reading.anchors:
        return reading.atom(node)
    if is_pointwise(node):
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
