"""Look at a graph in parts: the stretches between the nodes that are kept, and checkpointed graphs.

A kept node is called exactly as the user's graph calls it. Of activation checkpointing the graph
inside is looked at as a graph of its own; it is still checkpointed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from bnrewrite.capture.aliases import gains_history, outputs_of
from bnrewrite.capture.checkpointing import body_of, sourced, why_left
from bnrewrite.capture.conflicts import conflict, updated_behind, updates_of
from bnrewrite.capture.held import held_graphs
from bnrewrite.capture.look import Body, Look, Part, examine_whole, left
from bnrewrite.capture.numbering import counted_on, numbered_on
from bnrewrite.capture.opaque import opaque_nodes, what_is_kept
from bnrewrite.capture.rebinding import Rebinding
from bnrewrite.capture.stretches import Modes, Stretch, storages, stretches
from bnrewrite.options import Options
from bnrewrite.report.site import Site

logger = logging.getLogger(__name__)

ATTEMPTS = 4  # how often a graph is cut at a node more because tracing fails there


def examine_in_parts(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    rebindings: tuple[Rebinding, ...],
    attributes: tuple[tuple[str, fx.Node], ...],
    options: Options,
    kept: Mapping[fx.Node, str],
    attempts: int = ATTEMPTS,
) -> Look:
    """Look at the stretches of a graph around its `kept` nodes, in the modes that are on.

    Args:
        graph: from Dynamo, or one that such a graph calls.
        example_inputs: of the graph; None where there is none.
        rebindings: outputs that are new values of buffers.
        attributes: as in `Look`.
        options: what the passes may do.
        kept: the nodes that are in no stretch, and why.
        attempts: how often more nodes may be kept because tracing fails at them.
    """
    for reason in dict.fromkeys(kept.values()):
        logger.info("kept as the user's graph has it: %s", reason)
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    real = dict(zip(placeholders, example_inputs, strict=False))
    parts: list[Part] = []
    bodies: list[Body] = []
    sites: list[Site] = []
    failure: str | None = None
    for piece, modes in _pieces(graph, kept, real, rebindings):
        numbered = counted_on(options, len(sites))
        if isinstance(piece, fx.Node):
            with modes.entered():
                found = list(_examine_held(graph, piece, real, numbered, kept))
            bodies += found
            looks = [body.look for body in found]
        else:
            part = _examine_stretch(piece, graph, real, rebindings, numbered, kept)
            if part.look.failed_at is not None and attempts:
                at = next(node for node in piece.nodes if node.name == part.look.failed_at.name)
                more = {node for node in graph.graph.nodes if node.target == at.target}
                wider = {**kept, **dict.fromkeys(more, str(part.look.refusal))}
                again = examine_in_parts(
                    graph, example_inputs, rebindings, attributes, options, wider, attempts - 1
                )
                return replace(again, failure=part.look.failure or again.failure)
            parts.append(part)
            looks = [part.look]
        for look in looks:
            failure = failure or look.failure
            sites += numbered_on(look.sites, options, len(sites))
    looks = [part.look for part in parts] + [body.look for body in bodies]
    mine = {node: kept[node] for node in kept if body_of(graph, node) is None}
    before = "\n".join(look.before for look in looks if look.before)
    return Look(
        graph,
        None,
        before,
        tuple(sites),
        rebindings,
        attributes,
        frozenset(),
        failure,
        kept=(*what_is_kept(graph.graph, mine), *(each for look in looks for each in look.kept)),
        parts=tuple(parts),
        bodies=tuple(bodies),
    )


def _pieces(
    graph: fx.GraphModule,
    kept: Mapping[fx.Node, str],
    real: Mapping[fx.Node, Any],
    rebindings: Sequence[Rebinding],
) -> list[tuple[Stretch | fx.Node, Modes]]:
    """The stretches and the calls of checkpointed graphs, in the order of the graph."""
    outputs = outputs_of(graph)
    named = {node.name: node for node in graph.graph.nodes}
    rebound = {outputs[each.output]: named[each.placeholder] for each in rebindings}
    statistics = [
        node for node in real if gains_history(node.meta.get("example_value"), real[node])
    ]
    found: list[tuple[Stretch | fx.Node, Modes]] = [
        (stretch, stretch.modes)
        for stretch in stretches(graph, kept, torch.is_grad_enabled(), rebound, statistics)
    ]
    modes = Modes(torch.is_grad_enabled())
    for node in graph.graph.nodes:
        modes = modes.after(node)
        if isinstance(node.target, torch._ops.HigherOrderOperator) and node in kept:
            found.append((node, modes))
    place = {node: i for i, node in enumerate(graph.graph.nodes)}
    return sorted(
        found,
        key=lambda each: place[each[0].nodes[0] if isinstance(each[0], Stretch) else each[0]],
    )


def _examine_stretch(
    stretch: Stretch,
    graph: fx.GraphModule,
    real: Mapping[fx.Node, Any],
    rebindings: Sequence[Rebinding],
    options: Options,
    kept: Mapping[fx.Node, str],
) -> Part:
    outputs = outputs_of(graph)
    named = {node.name: node for node in graph.graph.nodes}
    mine = [
        each
        for each in rebindings
        if _may_update(stretch, outputs[each.output], named[each.placeholder])
    ]
    inner = tuple(
        replace(each, output=stretch.outputs.index(outputs[each.output])) for each in mine
    )
    examples = [real.get(node) for node in stretch.inputs]
    with stretch.modes.entered():
        look = examine_whole(stretch.module, examples, inner, (), options)
    if look.canonical is not None:
        elsewhere = {
            given.name
            for given, node in zip(look.canonical.inputs, stretch.inputs, strict=True)
            if not set(node.users) <= set(stretch.nodes)
        }
        look = replace(look, private=look.private - elsewhere)
        behind = updated_behind(stretch, updates_of(graph.graph, kept))
        reason = conflict(stretch, look.canonical, behind)
        gaining = [
            node
            for node in stretch.inputs
            if gains_history(node.meta.get("example_value"), real.get(node))
        ]
        if any(stretch.is_shared(node, behind=False) for node in gaining):
            reason = "a buffer gains autograd history in it and is used outside of it"
        if reason is not None:
            look = left(look, reason)
    return Part(stretch, look, tuple(each.output for each in mine))


def _examine_held(
    graph: fx.GraphModule,
    call: fx.Node,
    real: Mapping[fx.Node, Any],
    options: Options,
    kept: Mapping[fx.Node, str],
) -> Iterator[Body]:
    """Look at the graphs that a kept operation holds, in the modes that are on."""
    if body_of(graph, call) is not None:
        yield _examine_body(graph, call, real, options)
        return
    for held in held_graphs(graph, call):
        look = examine_whole(held, (), (), (), options)
        if look.canonical is not None:  # else the report has the operation alone
            yield Body(call, left(look, kept[call]), ())


def _examine_body(
    graph: fx.GraphModule, call: fx.Node, real: Mapping[fx.Node, Any], options: Options
) -> Body:
    """Look at a checkpointed graph, in the modes that are on."""
    body = sourced(graph, call)
    grad_enabled = torch.is_grad_enabled()
    kept = opaque_nodes(body.graph, grad_enabled)
    examples = [real.get(given) for given in call.args[1:] if isinstance(given, fx.Node)]
    look = examine_in_parts(body, examples, (), (), options, kept)
    placeholders = [node for node in body.graph.nodes if node.op == "placeholder"]
    memory = set().union(*updates_of(body.graph, kept).values(), *_updated(look))
    updated = tuple(node for node in placeholders if not memory.isdisjoint(storages([node])))
    updated = updated if grad_enabled else ()  # else it runs once
    reason = why_left(body, bool(updated))
    return Body(call, look if reason is None else left(look, reason), updated)


def _updated(look: Look) -> Iterator[set[int]]:
    """The memory that the parts of a graph update."""
    for part in look.parts:
        if part.look.canonical is not None:
            inputs = zip(part.look.canonical.inputs, part.stretch.inputs, strict=True)
            mutated = part.look.canonical.mutated
            yield storages(node for given, node in inputs if given.name in mutated)


def _may_update(stretch: Stretch, value: fx.Node, placeholder: fx.Node) -> bool:
    """Whether a stretch may update a buffer that the user's code rebinds to a value at the end."""
    users = {user for user in value.users if user.op != "output"}
    return (
        value in stretch.outputs
        and users <= set(stretch.nodes)
        and not stretch.is_shared(placeholder, behind=True)
    )
