"""Buffers that count samples, where statistics are those of all processes.

Before:  s' = s + k b                        b: the samples of this process, k: no tensor
After:   s' = s + k b + k (B - b)            B = N / r: the samples of all
Leaves alone: a buffer whose new value has the size of the batch in any other way.

A momentum n / (s + n) has sizes of all processes as soon as n is one of them, so s has to have
them too. What the others have is added to the user's own new value: an integer stays exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from bnrewrite.algebra import Match, Reading
from bnrewrite.algebra.calls import dtype_of
from bnrewrite.algebra.expression import Base, Extent, Polynomial
from bnrewrite.algebra.ring import Ring
from bnrewrite.algebra.stored import path_of

from .emitter import Emitter
from .nodes import Nodes, Unwritable, aten
from .rewriting import Rewriting
from .state import Update
from .synchronise import UNSYNCHRONISED, Symbols, SynchronisedWriting, batch_symbols, symbols_of

OF_ITS_OWN = "counts samples of this process"


def check_counters(rewriting: Rewriting, found: Match, updates: Sequence[Update]) -> None:
    """Raise where a site is made of a buffer that would count samples of this process alone.

    Raises:
        Unwritable: with the buffer.
    """
    reading, batch = rewriting.reading, batch_symbols(rewriting)
    assert reading is not None
    values = [found.linear.scale, found.linear.shift, *(update.value for update in updates)]
    used = {source for value in values for source in reading.ring.raw(value)}
    for buffer, _, value in _counters(rewriting, reading, batch):
        if buffer in used and _samples(reading.ring, value, batch) is None:
            raise Unwritable(f"{UNSYNCHRONISED}: {path_of(buffer)} {OF_ITS_OWN}")
    if any(_is_of_process(source, batch, samples=True) for source in used):
        raise Unwritable(
            f"{UNSYNCHRONISED}: a tensor in them is made of its samples or their number"
        )


def count_all(
    rewriting: Rewriting, writing: SynchronisedWriting
) -> tuple[list[fx.Node], list[fx.Node]]:
    """Let the buffers of a graph that count samples count those of all processes.

    Args:
        rewriting: of which a site has been written.
        writing: of the site; buffers that have another argument's batch in them are left.

    Returns:
        The placeholders of the buffers, and what still uses the number of this process.

    Raises:
        Unwritable: another size in a counter is not known here.
    """
    ring, batch = writing.reading.ring, frozenset({writing.own_batch})
    counted: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    left: list[fx.Node] = []
    for buffer, own, value in _counters(rewriting, writing.reading, batch):
        if not _has_size_of(ring, value, batch):
            continue
        samples = _samples(ring, value, batch)
        if samples is None:
            left.append(own)
        else:
            counted[buffer] = own, _of_others(writing, samples, dtype_of(buffer))
    for own, others in counted.values():  # all of them can be written
        behind = Nodes(own.next if others < own else others.next, (), {})
        new = behind.call(aten.add.Tensor, own, others)
        for user in [each for each in own.users if each is not new]:
            if new < user:
                user.replace_input_with(own, new)
            else:
                left.append(user)
    return list(counted), left


def _of_others(writing: SynchronisedWriting, samples: Polynomial, dtype: torch.dtype) -> fx.Node:
    """What the samples of the other processes add to a counter."""
    site, sizes, call = writing.match.node, dict(writing.emitter.sizes), writing.emitter.call
    own = Emitter(writing.reading, site, (), writing.dtype, None, sizes)
    others = call(aten.sub.Tensor, writing.along(()).tensor(samples), own.tensor(samples))
    if not dtype.is_floating_point:
        others = call(aten.round.default, others)
    return call(aten.to.dtype, others, dtype)


def _counters(
    rewriting: Rewriting, reading: Reading, batch: Symbols
) -> Iterator[tuple[fx.Node, fx.Node, Polynomial]]:
    """Buffers with sizes of the batch, and no moments, in their new value; that and its formula.

    A value that has been replaced has no formula any more.
    """
    placeholders = {node.name: node for node in rewriting.placeholders()}
    *_, output = rewriting.graph.nodes
    for name, value in zip(rewriting.canonical.mutated, output.args[0], strict=False):
        meaning = reading.formula(value) if isinstance(value, fx.Node) else None
        if meaning is None or reading.ring.moments(meaning.value):
            continue
        sources = reading.ring.raw(meaning.value)
        if _has_size_of(reading.ring, meaning.value, batch) or any(
            _is_of_process(source, batch, samples=True) for source in sources
        ):
            yield placeholders[name], value, meaning.value


def _samples(ring: Ring, value: Polynomial, batch: Symbols) -> Polynomial | None:
    """What is added to a counter, a multiple of the batch's size; None for another formula."""
    if any(_is_of_process(source, batch, samples=True) for source in ring.raw(value)):
        return None
    samples = {}
    for monomial, coefficient in value.terms.items():
        if _has_size_of(ring, Polynomial({monomial: 1}), batch):
            if not all(_is_size(ring.bases[base], batch) for base, _ in monomial):
                return None
            samples[monomial] = coefficient
    return Polynomial(samples)


def _has_size_of(ring: Ring, value: Polynomial, batch: Symbols) -> bool:
    sizes = (base.size for base in ring.within(value) if isinstance(base, Extent))
    return any(symbols_of(size) & batch for size in sizes) or any(
        _is_of_process(source, batch) for source in ring.raw(value)
    )


def _is_of_process(source: Any, batch: Symbols, samples: bool = False) -> bool:
    """Whether a tensor of no samples is made of their number, as ``torch.tensor(n)`` is.

    Args:
        source: what a formula has as it is.
        batch: sizes of the batch.
        samples: whether to ask for what is made of the samples themselves too.
    """
    todo, seen = [source] if isinstance(source, fx.Node) else [], {source}
    while todo:
        node = todo.pop()
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt | torch.SymFloat):
            if symbols_of(value) & batch:
                return True
        elif not isinstance(value, torch.Tensor):
            continue
        elif any(symbols_of(extent) & batch for extent in value.shape):
            if samples and node is not source:
                return True
            continue
        todo += [each for each in node.all_input_nodes if each not in seen]
        seen.update(node.all_input_nodes)
    return False


def _is_size(base: Base, batch: Symbols) -> bool:
    """Whether this is a size, and where it is one of the batch, nothing but that."""
    if not isinstance(base, Extent):
        return False
    return base.size in batch or not symbols_of(base.size) & batch
