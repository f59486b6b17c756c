"""Replaces each site by its lowering.

Before:  a graph and a decision per site.
After:   every rewritten site's node is replaced; its old formula may be dead.
Leaves alone: sites with a refusal; a site whose lowering cannot be written gets one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from bnrewrite.algebra.axes import Dims, Opaque, axes_of
from bnrewrite.algebra.calls import is_tensor, shape_of
from bnrewrite.algebra.expression import Polynomial, normalised
from bnrewrite.algebra.match import Match
from bnrewrite.algebra.stored import path_of

from .across import updates_of_means
from .composite import write_composite
from .counters import check_counters, count_all
from .emitter import Reusable
from .generated import write_generated
from .native import layout_of, write_native
from .nodes import Sizes, Unwritable
from .rewriting import Decision, Refusal, Rewriting
from .state import BatchState, Update, updates_of, write_updates
from .synchronise import (
    UNSYNCHRONISED,
    SynchronisedWriting,
    check_updates,
    group_of,
    note_leftovers,
    reductions_of,
)
from .writing import Writing


@dataclass(frozen=True)
class Lower:
    """Writes native, generated and composite lowerings."""

    name: str = "lower"

    def run(self, rewriting: Rewriting) -> None:
        """Change the graph site by site, in graph order."""
        if not rewriting.decisions:
            return
        statistics = _Statistics(rewriting)
        synchronised: dict[int, list[fx.Node]] = {}
        for number, decision in enumerate(rewriting.decisions):
            if decision.refusal is None and decision.lowering is None:
                continue  # nothing was planned for it
            if decision.refusal is None:
                _lower(rewriting, decision, statistics.before(decision.match.node))
            decision.record = rewriting.describe(decision)
            if decision.lowering == "synchronised":
                left = statistics.of_this_process.get(decision.match.node, [])
                synchronised[number] = reductions_of(statistics.reading, decision) + left
        note_leftovers(rewriting, synchronised)


class _Statistics:
    """The user's own small statistics, learnt in graph order: a later site may use them."""

    def __init__(self, rewriting: Rewriting) -> None:
        assert rewriting.reading is not None
        self.reading = rewriting.reading
        nodes = list(rewriting.graph.nodes)
        self.nodes = iter(nodes)
        self.place = {node: i for i, node in enumerate(nodes)}
        self.placeholders = {n.name: n for n in rewriting.placeholders()}
        self.known: Reusable = {}
        self.direct: set[fx.Node] = set()
        self.sizes: Sizes = {}
        self.of_this_process: dict[fx.Node, list[fx.Node]] = {}  # by site that is synchronised
        self.made_of = self._values(rewriting)

    def _values(self, rewriting: Rewriting) -> dict[Any, dict[fx.Node, fx.Node | None]]:
        """New values of buffers, with these, and returned values, by what they are made of."""
        reading = self.reading
        outputs = next(iter(reversed(rewriting.graph.nodes))).args[0]
        buffers: list[fx.Node | None] = [self.placeholders[n] for n in rewriting.canonical.mutated]
        buffers += [None] * (len(outputs) - len(buffers))
        result: dict[Any, dict[fx.Node, fx.Node | None]] = {}
        for buffer, value in zip(buffers, outputs, strict=True):
            meaning = reading.formula(value) if isinstance(value, fx.Node) else None
            if meaning is not None and (buffer or not reading.ring.differentiable(value)):
                for source in reading.ring.moments(meaning.value):
                    result.setdefault(source, {}).setdefault(value, buffer)
        return result

    def before(self, site: fx.Node) -> _Statistics:
        """Everything that stands before a site."""
        for node in self.nodes:
            if node is site:
                break
            self._learn(node)
        return self

    def _learn(self, node: fx.Node) -> None:
        ring, meaning = self.reading.ring, self.reading.meanings.get(node)
        size = node.meta.get("val")
        if isinstance(size, torch.SymInt):
            self.sizes.setdefault(size.node.expr, node)
        if meaning is None or node.op != "call_function" or not is_tensor(node):
            return
        value = meaning.value
        if any(s != 1 and not d for s, d in zip(shape_of(node), meaning.dims, strict=True)):
            return  # an expanded tensor; the one that was expanded is known already
        if not value.terms or value.constant is not None or not ring.moments(value):
            return
        if not ring.raw(value) & self.reading.anchors:
            lettered, names = ring.lettered(value, axes_of(meaning.dims))
            unit, lead = normalised(lettered)
            dims = tuple(tuple(names.get(a, a) for a in dim) for dim in meaning.dims)
            if self._is_direct(node):
                self.direct.add(node)
            entry = (node, dims, lead, node in self.direct)
            self.known.setdefault(unit.key, entry)

    def _is_direct(self, node: fx.Node) -> bool:
        """Whether a statistic is made by reductions of the tensor itself, with no copy between."""
        ring = self.reading.ring
        for argument in node.all_input_nodes:
            meaning = self.reading.formula(argument)
            if argument in self.direct or meaning is None:
                continue
            value = meaning.value
            of_tensor = ring.raw(value) & self.reading.anchors
            if ring.moments(value) or (of_tensor and not _is_plain(value)):
                return False
        return True


def _is_plain(value: Polynomial) -> bool:
    """Whether a value is one tensor as it is: reshaped, cast, not computed with."""
    return len(value.terms) == 1 and next(iter(value.terms))[0][1] == 1


def _lower(rewriting: Rewriting, decision: Decision, statistics: _Statistics) -> None:
    found = decision.match
    state = BatchState(_updates(rewriting, decision, statistics))
    try:
        replacement = _written(rewriting, decision, statistics, state)
    except (Unwritable, Opaque) as refusal:
        reason = str(refusal)
        if decision.lowering == "synchronised" and not reason.startswith(UNSYNCHRONISED):
            reason = f"{UNSYNCHRONISED}: {reason}"
        decision.refusal = Refusal(reason, found.node)
        return
    except GuardOnDataDependentSymNode:
        reason = "one of its sizes is read out of a tensor, and known only when the graph runs"
        decision.refusal = Refusal(reason, found.node)
        return
    replaced = decision.replaced
    replaced.replace_all_uses_with(replacement)
    replaced.meta["replaced_by"] = replacement
    for old, new in state.replaced.items():
        _replace_value(rewriting, old, new)
        statistics.made_of[found.linear.source].pop(old)
    buffers = [u.buffer for u in state.updates if u.buffer is not None]
    decision.state += map(path_of, buffers)


def _written(
    rewriting: Rewriting, decision: Decision, statistics: _Statistics, state: BatchState
) -> fx.Node:
    """The lowering of a decision, or the next best where its formula has no kernel."""
    found = decision.match
    assert rewriting.reading is not None
    while decision.lowering == "generated":
        try:
            writing = _writing(rewriting, decision.whole or found, statistics, None)
            return write_generated(writing, state, decision.epilogue)
        except (Unwritable, Opaque):
            state.replaced.clear()
            if decision.whole is None or not found.over:
                decision.lowering = decision.otherwise
            if not found.over:  # they were of the groups of the kernel
                state.updates.clear()
            decision.whole = decision.epilogue = None
    if decision.lowering == "synchronised":
        check_updates(statistics.made_of.get(found.linear.source, {}), state.updates)
        check_counters(rewriting, found, state.updates)
    elif decision.lowering == "native":
        layout = layout_of(rewriting.reading, found)
        return write_native(_writing(rewriting, found, statistics, layout), state)
    return _composite(rewriting, decision, statistics, state)


def _composite(
    rewriting: Rewriting, decision: Decision, statistics: _Statistics, state: BatchState
) -> fx.Node:
    """In the tensor's own layout, or split into all its axes where something cuts a dimension."""
    found, group = decision.match, group_of(rewriting)
    split = tuple((axis,) for axis in axes_of(found.linear.index))
    for layout in (None, split):
        if decision.lowering == "synchronised" and group:
            writing: Writing = SynchronisedWriting(
                rewriting, found, statistics.sizes, group, layout
            )
        else:
            writing = _writing(rewriting, found, statistics, layout)
        try:
            replacement = write_composite(writing)
            _write_state(writing, state)
            if isinstance(writing, SynchronisedWriting):
                counted, left = count_all(rewriting, writing)
                decision.state += map(path_of, counted)
                statistics.of_this_process[found.node] = left
            return replacement
        except Unwritable as refusal:
            reason = refusal
    raise reason


def _writing(
    rewriting: Rewriting, found: Match, statistics: _Statistics, layout: Dims | None
) -> Writing:
    assert rewriting.reading is not None
    known, sizes, eager = statistics.known, statistics.sizes, rewriting.options.stage == "eager"
    return Writing(rewriting.reading, found, known, sizes, layout, in_place=eager)


def _updates(rewriting: Rewriting, decision: Decision, statistics: _Statistics) -> list[Update]:
    """What the graph makes of a site's moments besides the norm: buffers, and returned values."""
    reading, found, finer = rewriting.reading, decision.match, decision.whole
    assert reading is not None
    candidates = statistics.made_of.get(found.linear.source, {})
    pairs = [(buffer, value) for value, buffer in candidates.items()]
    if found.over:
        updates = updates_of(reading, found, pairs)
    elif finer is not None and decision.lowering == "generated":
        updates = updates_of_means(reading, finer, pairs)
    else:
        return []
    place = statistics.place
    return [
        update
        for update in updates
        if all(place[s] < place[found.node] for s in reading.ring.raw(update.value))
    ]


def _write_state(writing: Writing, state: BatchState) -> None:
    """Buffers beside a composite norm, from its own moments."""
    if not state.updates or not writing.has_moments:
        return
    variance, mean = writing.moments()
    dims = tuple(() if set(d) & writing.match.over else d for d in writing.layout)
    write_updates(writing, state, mean, variance, dims)


def _replace_value(rewriting: Rewriting, old: fx.Node, new: fx.Node) -> None:
    """The new value of a buffer, where buffers take it; everywhere, if no gradient is lost."""
    assert rewriting.reading is not None
    *_, output = rewriting.graph.nodes
    if rewriting.reading.ring.differentiable(old):
        canonical, values = rewriting.canonical, list(output.args[0])
        count = len(canonical.mutated)
        names = [name for name, v in zip(canonical.mutated, values, strict=False) if v is old]
        if set(names) <= set(canonical.rebound):
            count = len(values)  # capture returns the buffer itself in the other places
        values[:count] = [new if v is old else v for v in values[:count]]
        output.args = (type(output.args[0])(values),)
        return
    for user in list(old.users):
        if new < user:
            user.replace_input_with(old, new)
