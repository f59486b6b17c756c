"""A norm over the batch with the moments of all processes.

Before:  y = any spelling of x * scale + shift, the moments of x over the batch in scale and shift
After:   V, M, N = synchronised_moments(x);  A, B = small tensors of V, M and N;  y = x * A + B
Leaves alone: other statistics of the batch than the mean and the variance.

A size of the batch b that stands in the formula (a correction n / (n - 1), a sum) becomes that of
all processes: with n = b r elements here and N everywhere, b is N / r.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import sympy
import torch.distributed as dist
from torch import fx

from bnrewrite.algebra import Match, chain
from bnrewrite.algebra.anchors import REDUCTIONS
from bnrewrite.algebra.axes import Size, product
from bnrewrite.algebra.calls import is_tensor, name_of
from bnrewrite.algebra.expression import Base, Extent, Function, Polynomial, Reduction
from bnrewrite.algebra.meaning import Reading
from bnrewrite.algebra.ring import Ring
from bnrewrite.algebra.stored import path_of
from bnrewrite.kernels import synchronised_moments

from .emitter import Emitter
from .nodes import Nodes, Unwritable, Value, aten, live_nodes
from .rewriting import Decision, Rewriting
from .state import Update
from .writing import Writing

Symbols = frozenset[sympy.Symbol]
UNSYNCHRONISED = "its statistics stay those of this process"
ELSEWHERE = "a statistic of it is used elsewhere too, and is that of this process there"


def group_of(rewriting: Rewriting) -> str | None:
    """The name of the group over which statistics are synchronised; None for no or one process."""
    group = rewriting.options.sync_stats
    if group is None or not dist.is_initialized():
        return None
    if group == "":
        return None if dist.get_world_size() == 1 else str(dist.group.WORLD.group_name)  # type: ignore[union-attr]
    return group


def batch_symbols(rewriting: Rewriting) -> Symbols:
    """The sizes of leading dimensions of the graph's inputs: they vary between processes."""
    found: set[sympy.Symbol] = set()
    for node, given in zip(rewriting.placeholders(), rewriting.canonical.inputs, strict=True):
        if given.kind == "input" and is_tensor(node) and node.meta["val"].dim():
            found |= symbols_of(node.meta["val"].shape[0])
    return frozenset(found)


def is_of_batch(reading: Reading, found: Match, batch: Symbols) -> bool:
    """Whether statistics of a site are taken over samples."""
    if not batch:
        return _is_of_leading(reading, found)
    values = (found.linear.scale, found.linear.shift)
    return any(_is_over(base, batch) for base in _reductions(reading.ring, values))


def _is_of_leading(reading: Reading, found: Match) -> bool:
    """Whether statistics of what is no parameter are taken over its leading dimension."""
    index = found.linear.index
    return (
        bool(index)
        and bool(set(index[0]) & found.over)
        and not reading.is_parameter(found.linear.source)
    )


def why_not(reading: Reading, found: Match, batch: Symbols) -> str | None:
    """Why the statistics of a site over the batch cannot be synchronised; None where they can."""
    ring = reading.ring
    if not batch:
        return f"{UNSYNCHRONISED}: the batch has a fixed size in this graph"
    if not found.over:
        return f"{UNSYNCHRONISED}: they are not of the whole tensor"
    if _batch_of(product(axis.size for axis in found.over), batch) is None:
        return f"{UNSYNCHRONISED}: the batch is no factor of what they are taken over"
    known = _moments(ring, found)
    values = (found.linear.scale, found.linear.shift)
    if any(_is_over(b, batch) and b.id not in known for b in _reductions(ring, values)):
        return f"{UNSYNCHRONISED}: they are not the mean and the variance"
    return None


def check_updates(candidates: dict[fx.Node, fx.Node | None], updates: Iterable[Update]) -> None:
    """Raise where a buffer would keep statistics of this process alone.

    Raises:
        Unwritable: with the buffer.
    """
    written = {update.node for update in updates}
    for value, buffer in candidates.items():
        if buffer is not None and value not in written:
            raise Unwritable(f"{UNSYNCHRONISED}: {path_of(buffer)} is not computed from them alone")


class SynchronisedWriting(Writing):
    """Writes a composite norm whose moments are those of all processes."""

    def __init__(
        self, rewriting: Rewriting, match: Match, sizes: Any, group: str, layout: Any
    ) -> None:
        assert rewriting.reading is not None
        eager = rewriting.options.stage == "eager"
        self.batch = batch_symbols(rewriting)
        self.group = group
        self._total: fx.Node | None = None
        super().__init__(rewriting.reading, match, {}, sizes, layout, in_place=eager)
        self.emitter = self._emitter(self.layout, dict(sizes))
        self.emitter.sizes_of(match.linear.source)
        self._give_all()

    @property
    def has_fast_norm(self) -> bool:
        """Whether norms of the input are made by ``vector_norm``: that is of this process."""
        return False

    def measure(self) -> None:
        """Norms of the input are written from the moments."""

    def moments(self, stopped: bool = False) -> tuple[fx.Node, fx.Node]:
        """V and E[x] of all processes in the layout; ``stopped``: without a gradient."""
        if False not in self._moments:
            made = self.emitter.call(synchronised_moments, self.input(), self.reduced, self.group)
            variance, mean, self._total = self.emitter.items(made, 3)
            self._moments[False] = variance, mean
        if stopped not in self._moments:
            variance, mean = (
                self.emitter.call(aten.detach.default, each) for each in self._moments[False]
            )
            self._moments[stopped] = variance, mean
        return self._moments[stopped]

    def square(self, stopped: bool = False) -> fx.Node:
        """E[x^2] = V + E[x]^2 in the layout."""
        if stopped not in self._square:
            variance, mean = self.moments(stopped)
            squared = self.emitter.call(aten.mul.Tensor, mean, mean)
            self._square[stopped] = self.emitter.call(aten.add.Tensor, variance, squared)
        return self._square[stopped]

    def along(self, dims: Any) -> Emitter:
        """An emitter for tensors that run along some of the axes only."""
        return self._emitter(dims, self.emitter.sizes)

    @property
    def own_batch(self) -> sympy.Symbol:
        """The size of the batch that the moments are taken over."""
        symbol = _batch_of(product(axis.size for axis in self.match.over), self.batch)
        assert symbol is not None
        return symbol

    def whole(self, nodes: Nodes, size: Size) -> Value:
        """A size of the formula, with the batch of all processes."""
        symbol = self.own_batch
        if symbols_of(size) & self.batch != {symbol} or size != symbol:
            raise Unwritable(f"{UNSYNCHRONISED}: the size {size} in them is none of the batch")
        self.moments()
        assert self._total is not None
        own = product(axis.size for axis in self.match.over)
        rest = sympy.sympify(own) / symbol
        return nodes.over(self._total, nodes.extent(rest))

    def _emitter(self, dims: Any, sizes: Any) -> Emitter:
        return _Emitter(self, dims, sizes)


class _Emitter(Emitter):
    """Writes sizes of the batch, and statistics over it, as those of all processes."""

    def __init__(self, writing: SynchronisedWriting, dims: Any, sizes: Any) -> None:
        super().__init__(writing.reading, writing.match.node, dims, writing.dtype, {}, sizes)
        self.writing = writing

    def _base(self, base: Base) -> Value:
        if isinstance(base, Extent) and symbols_of(base.size) & self.writing.batch:
            return self.writing.whole(self, base.size)
        if isinstance(base, Reduction) and _is_over(base, self.writing.batch):
            raise Unwritable(f"{UNSYNCHRONISED}: they are not the mean and the variance")
        return super()._base(base)

    def _function(self, base: Function) -> Value:
        if base.name != "root":
            return super()._function(base)
        value = self.tensor(base.argument)
        assert isinstance(value, fx.Node)
        zero = self.call(aten.eq.Scalar, value, 0)
        root = self.call(aten.sqrt.default, self.call(aten.masked_fill.Scalar, value, zero, 1))
        return self.call(aten.masked_fill.Scalar, root, zero, 0)  # its gradient is zero there


def note_leftovers(rewriting: Rewriting, statistics: dict[int, list[fx.Node]]) -> None:
    """Note the sites of which the user's own statistics are still read.

    Args:
        rewriting: with its decisions written.
        statistics: the user's reductions, by the number of the decision.
    """
    live = live_nodes(rewriting.graph)
    for number, nodes in statistics.items():
        decision = rewriting.decisions[number]
        if decision.refusal is None and not live.isdisjoint(nodes):
            decision.notes.append(ELSEWHERE)
            assert decision.record is not None
            decision.record = replace(decision.record, notes=tuple(decision.notes))


def reductions_of(reading: Reading, decision: Decision) -> list[fx.Node]:
    """The user's nodes that make the statistics of a site."""
    return [n for n in chain(reading, decision.match) if name_of(n) in REDUCTIONS]


def _batch_of(own: Size, batch: Symbols) -> sympy.Symbol | None:
    """The one size of the batch that a number of elements is a multiple of."""
    inside = symbols_of(own) & batch
    if len(inside) != 1:
        return None
    (symbol,) = inside
    return symbol if symbol not in (sympy.sympify(own) / symbol).free_symbols else None


def _moments(ring: Ring, found: Match) -> set[int]:
    both = (found.moments.mean, found.moments.square)
    return {b for p in both for value in (p, ring.stop(p)) for b in value.bases()}


def _is_over(base: Reduction, batch: Symbols) -> bool:
    sizes = (axis.size for axis in base.bound)
    return any(symbols_of(size) & batch for size in sizes)


def _reductions(ring: Ring, values: Iterable[Polynomial]) -> list[Reduction]:
    return [b for b in ring.within(*values, reduced=True) if isinstance(b, Reduction)]


def symbols_of(size: Any) -> Symbols:
    """The symbols in a size."""
    expression = getattr(getattr(size, "node", None), "expr", size)
    return frozenset(
        s for s in sympy.sympify(expression).free_symbols if isinstance(s, sympy.Symbol)
    )
