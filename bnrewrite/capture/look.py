"""One look at a graph: what it is in canonical form, which norms were found, what it updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from bnrewrite.capture.aliases import is_updated, outputs_of
from bnrewrite.capture.canonical import Canonical, canonicalise
from bnrewrite.capture.opaque import opaque_nodes
from bnrewrite.capture.provenance import source_line
from bnrewrite.capture.rebinding import Rebinding, find_attribute_updates, find_rebindings
from bnrewrite.capture.refusal import CaptureError, Inexact, Untraceable, sentence
from bnrewrite.capture.stretches import Stretch
from bnrewrite.options import Options
from bnrewrite.report.site import LEFT, Kept, Site

if TYPE_CHECKING:
    from bnrewrite.findings import Noticed


@dataclass(frozen=True)
class Look:
    """What was found in a Dynamo graph.

    Attributes:
        graph: the user's graph, untouched.
        canonical: the rewritten canonical graph; None where capture or a pass failed.
        before: text of the canonical graph before it was rewritten.
        sites: the norms.
        rebindings: outputs of the user's graph that are new values of buffers.
        attributes: plain tensor attributes that are updated by rebinding, and the new values.
        private: canonical names of inputs that only new values of inputs are computed from.
        failure: what went wrong where there is no canonical graph, or none of a part, a sentence.
        refusal: by which capture has refused the graph.
        kept: what is called as the user's graph has it.
        parts: the stretches of a graph that has no canonical form as a whole.
        bodies: the graphs that it checkpoints, or that other kept operations hold.
        noticed: what is wrong with its norms and statistics, where that was asked for.
    """

    graph: fx.GraphModule
    canonical: Canonical | None
    before: str
    sites: tuple[Site, ...]
    rebindings: tuple[Rebinding, ...]
    attributes: tuple[tuple[str, fx.Node], ...]
    private: frozenset[str]
    failure: str | None
    refusal: CaptureError | None = None
    kept: tuple[Kept, ...] = ()
    parts: tuple[Part, ...] = ()
    bodies: tuple[Body, ...] = ()
    noticed: Noticed | None = None

    @property
    def failed_at(self) -> fx.Node | None:
        """The node of the user's graph that has no canonical form, where one is known."""
        return self.refusal.node if isinstance(self.refusal, Untraceable) else None

    @property
    def is_changed(self) -> bool:
        """Whether anything is left to be run but the user's graph."""
        if self.parts or self.bodies:
            inner = [part.look for part in self.parts] + [body.look for body in self.bodies]
            return any(look.is_changed for look in inner)
        return self.canonical is not None and bool(
            self.is_rewritten or self.leaking - self.recurrent
        )

    @property
    def is_rewritten(self) -> bool:
        """Whether the canonical graph differs from the user's."""
        return any(site.status == "rewritten" for site in self.sites)

    @property
    def recurrent(self) -> frozenset[str]:
        """Inputs of the user's graph whose new value keeps its autograd history.

        A buffer may carry a recurrent state that is differentiated through time. Its history is
        dropped only where it cannot matter: a norm keeps its statistics there, or nothing but new
        values of buffers is ever computed from it.
        """
        return frozenset(self.leaking - self._statistics)

    @property
    def leaking(self) -> frozenset[str]:
        """Inputs of the user's graph whose new value carries autograd history."""
        updated = frozenset(
            node.name
            for node in self.graph.graph.nodes
            if node.op == "placeholder"
            and is_updated(node.meta.get("example_value"))
            and node.meta["example_value"].requires_grad
        )
        if self.canonical is not None:  # a part may read what another part updates
            names = self.canonical_names
            updated = frozenset(name for name in updated if names[name] in self.canonical.mutated)
        return updated | frozenset(each.placeholder for each in self.rebindings if each.history)

    @property
    def _statistics(self) -> frozenset[str]:
        if self.canonical is None:
            return frozenset().union(*(part.look._statistics for part in self.parts))
        paths = {path for site in self.sites for path in site.state}
        proved = {each.name for each in self.canonical.inputs if each.path in paths}
        names = self.canonical_names
        return frozenset(old for old, new in names.items() if new in proved | self.private)

    @property
    def canonical_names(self) -> dict[str, str]:
        """The canonical placeholder of each placeholder of the user's graph."""
        assert self.canonical is not None
        old = [node.name for node in self.graph.graph.nodes if node.op == "placeholder"]
        return dict(zip(old, (each.name for each in self.canonical.inputs), strict=True))


@dataclass(frozen=True)
class Part:
    """A stretch of a graph and what was found in it.

    Attributes:
        stretch: the nodes.
        look: at the graph of the stretch.
        rebound: outputs of the user's graph that are new values of buffers, made here.
    """

    stretch: Stretch
    look: Look
    rebound: tuple[int, ...]


@dataclass(frozen=True)
class Body:
    """A graph that is checkpointed, or held by another operation, and what was found in it.

    Attributes:
        node: of the user's graph, the call.
        look: at the graph that is called.
        updated: its placeholders that it updates, in the forward and again for the backward.
    """

    node: fx.Node
    look: Look
    updated: tuple[fx.Node, ...]


def examine(graph: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Look:
    """Capture a Dynamo graph and rewrite what was captured; the graph itself stays as it is.

    A graph with nodes that have no canonical form is captured in parts, around these nodes.
    """
    from bnrewrite.capture.partition import examine_in_parts  # which looks at each of the parts

    found = find_rebindings(graph), find_attribute_updates(graph)
    opaque = opaque_nodes(graph.graph, torch.is_grad_enabled())
    if opaque:
        return examine_in_parts(graph, example_inputs, *found, options, opaque)
    look = examine_whole(graph, example_inputs, *found, options)
    if look.refusal is None:
        return look
    target = None if look.failed_at is None else look.failed_at.target
    alike = [node for node in graph.graph.nodes if node.target == target]
    kept = dict.fromkeys(alike, str(look.refusal))
    parts = examine_in_parts(graph, example_inputs, *found, options, kept)
    if not kept and not parts.is_changed:
        return look
    return replace(parts, failure=look.failure if kept else parts.failure)


def examine_whole(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    rebindings: tuple[Rebinding, ...],
    attributes: tuple[tuple[str, fx.Node], ...],
    options: Options,
) -> Look:
    """Capture a graph as a whole, in the modes that are on, and rewrite it."""
    from bnrewrite.passes import rewrite  # the passes import this package

    before = ""
    try:
        canonical = canonicalise(graph, example_inputs, rebindings)
        private = _private(canonical)
        before = str(canonical.module.graph)
        sites = tuple(rewrite(canonical, options))
    except Exception as error:  # any failure means that the user's graph runs; the cause is told
        look = Look(graph, None, before, (), rebindings, attributes, frozenset(), sentence(error))
        at = error.node if isinstance(error, Untraceable) else None
        kept = Kept("a graph", sentence(error), "" if at is None else source_line(at))
        return replace(
            look,
            failure=None if isinstance(error, Inexact) else look.failure,
            refusal=error if isinstance(error, CaptureError) else None,
            kept=(kept,),
        )
    look = Look(graph, canonical, before, sites, rebindings, attributes, private, None)
    return replace(look, noticed=canonical.noticed)


def left(look: Look, reason: str) -> Look:
    """A look at a graph that stays the user's after all; its norms say why."""
    return replace(
        look,
        canonical=None,
        sites=tuple(
            site
            if site.status == LEFT
            else replace(site, status=LEFT, reason=reason, lowering=None)
            for site in look.sites
        ),
        parts=tuple(replace(part, look=left(part.look, reason)) for part in look.parts),
        bodies=tuple(replace(body, look=left(body.look, reason)) for body in look.bodies),
    )


def _private(canonical: Canonical) -> frozenset[str]:
    """Inputs from which only new values of inputs are computed."""
    graph = canonical.module.graph
    users = set(outputs_of(canonical.module)[len(canonical.mutated) :])
    reaching: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node in users or (node.op != "output" and not reaching.isdisjoint(node.users)):
            reaching.add(node)
    return frozenset(
        node.name for node in graph.nodes if node.op == "placeholder" and node not in reaching
    )
