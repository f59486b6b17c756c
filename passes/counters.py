"""Buffers that count samples, where statistics are those of all processes.

Before:  s' = s + k b                        b: the samples of this process, k: no tensor
After:   s' = s + k b + k (B - b)            B = N / r: the samples of all
Leaves alone: a buffer whose new value has the size of the batch in any other way.

A momentum n / (s + n) has sizes of all processes as soon as n is one of them, so s has to have
them too. What the others have is added to the user's own new value: an integer stays exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import fx

from bnrewrite.algebra import Match, Reading
from bnrewrite.algebra.calls import dtype_of
from bnrewrite.algebra.expression import Base, Extent, Polynomial
from bnrewrite.algebra.ring import Ring

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
            raise Unwritable(f"{UNSYNCHRONISED}: {name_of_buffer(buffer)} {OF_ITS_OWN}")


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


def name_of_buffer(buffer: fx.Node) -> str:
    """The qualified name of what a placeholder stands for."""
    return str(buffer.meta.get("path") or buffer.name)


def _counters(
    rewriting: Rewriting, reading: Reading, batch: Symbols
) -> Iterator[tuple[fx.Node, fx.Node, Polynomial]]:
    """Buffers whose new value has sizes of the batch and no statistic; the value and its formula.

    A value that has been replaced has no formula any more.
    """
    placeholders = {node.name: node for node in rewriting.placeholders()}
    *_, output = rewriting.graph.nodes
    for name, value in zip(rewriting.canonical.mutated, output.args[0], strict=False):
        meaning = reading.formula(value) if isinstance(value, fx.Node) else None
        if meaning is None or reading.ring.moments(meaning.value):
            continue
        if _has_size_of(reading.ring, meaning.value, batch):
            yield placeholders[name], value, meaning.value


def _samples(ring: Ring, value: Polynomial, batch: Symbols) -> Polynomial | None:
    """What is added to a counter, a multiple of the batch's size; None for another formula."""
    samples = {}
    for monomial, coefficient in value.terms.items():
        if _has_size_of(ring, Polynomial({monomial: 1}), batch):
            if not all(_is_size(ring.bases[base], batch) for base, _ in monomial):
                return None
            samples[monomial] = coefficient
    return Polynomial(samples)


def _has_size_of(ring: Ring, value: Polynomial, batch: Symbols) -> bool:
    return any(
        isinstance(base, Extent) and bool(symbols_of(base.size) & batch)
        for base in ring.within(value)
    )


def _is_size(base: Base, batch: Symbols) -> bool:
    """Whether this is a size, and where it is one of the batch, nothing but that."""
    if not isinstance(base, Extent):
        return False
    return base.size in batch or not symbols_of(base.size) & batch
