"""The state that the passes share: a canonical graph, its reading, and a decision per site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, fx

from bnrewrite.algebra import Match, Reading, chain, formula
from bnrewrite.algebra.anchors import REDUCTIONS
from bnrewrite.algebra.calls import name_of
from bnrewrite.capture.canonical import Canonical
from bnrewrite.options import Options
from bnrewrite.report.site import LEFT, REWRITTEN, Site

from .origin import module_of, source_of


@dataclass(frozen=True)
class Refusal:
    """Why a site stays the user's code: one sentence, and where."""

    reason: str
    at: fx.Node


@dataclass(frozen=True)
class Epilogue:
    """What follows a norm, element by element.

    Attributes:
        activation: its name.
        residual: what is added before it, or None.
        last: the node whose value the kernel computes.
    """

    activation: str
    residual: fx.Node | None
    last: fx.Node


@dataclass
class Decision:
    """A recognised norm and what becomes of it.

    Attributes:
        match: the norm.
        lowering: "native", "generated", "composite" or "synchronised" once planned, "fold" once
            folded.
        otherwise: what it is where the formula has no kernel.
        whole: the site and what scales and shifts it further, as one formula, for a kernel.
        epilogue: what follows that, which a kernel may compute too.
        refusal: why it stays, where it stays.
        notes: what the report says besides, as what becomes more accurate.
        state: paths of the buffers that are updated from the site's moments.
        record: the report's entry, from when it is written.
    """

    match: Match
    lowering: str | None = None
    otherwise: str | None = None
    whole: Match | None = None
    epilogue: Epilogue | None = None
    refusal: Refusal | None = None
    notes: list[str] = field(default_factory=list)
    state: list[str] = field(default_factory=list)
    record: Site | None = None

    @property
    def replaced(self) -> fx.Node:
        """The node that the lowering takes the place of; a kernel takes what follows along."""
        if self.lowering != "generated":
            return self.match.node
        return self.epilogue.last if self.epilogue is not None else (self.whole or self.match).node


class Rewriting:
    """One run of the pipeline over one graph.

    Args:
        canonical: the graph.
        options: what may be done.
        constants: values of parameters and buffers by the names of their placeholders, where they
            never change any more; None where they may.
    """

    def __init__(
        self,
        canonical: Canonical,
        options: Options,
        constants: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.canonical = canonical
        self.options = options
        self.constants = constants
        self.reading: Reading | None = None
        self.decisions: list[Decision] = []
        self.natives: list[Match] = []  # which become sites if they are folded
        for node, given in zip(self.placeholders(), canonical.inputs, strict=True):
            node.meta["parameter"] = given.kind == "parameter"
            node.meta["stored"] = given.kind in ("buffer", "attribute")
            node.meta["path"] = given.path

    @property
    def graph(self) -> fx.Graph:
        """The graph that is rewritten."""
        return self.canonical.module.graph

    def placeholders(self) -> list[fx.Node]:
        """The inputs in order."""
        return [n for n in self.graph.nodes if n.op == "placeholder"]

    def records(self) -> tuple[Site, ...]:
        """What the report says of each site."""
        for decision in self.decisions:
            if decision.record is None:
                reason = "the passes that would rewrite it are switched off"
                decision.refusal = decision.refusal or Refusal(reason, decision.match.node)
                decision.record = self.describe(decision)
        return tuple(d.record for d in self.decisions if d.record is not None)

    def _origin(self, found: Match) -> fx.Node:
        """The node that says where a norm is: what follows its statistics may be elsewhere."""
        assert self.reading is not None
        statistics = [n for n in chain(self.reading, found) if name_of(n) in REDUCTIONS]
        if not statistics or module_of(statistics[-1]) == module_of(found.node):
            return found.node
        return statistics[-1]

    def describe(self, decision: Decision) -> Site:
        """The record of a decision; called before the graph is changed."""
        assert self.reading is not None
        found = decision.match
        refusal = decision.refusal
        dims = found.linear.index
        origin = self._origin(found)
        return Site(
            kind=found.kind,
            status=LEFT if refusal else REWRITTEN,
            reason=refusal.reason if refusal else found.reason,
            formula=formula(self.reading.ring, found),
            axes=tuple(i for i, d in enumerate(dims) if set(d) & found.over),
            eps=found.eps,
            module=module_of(origin),
            source=source_of(origin),
            lowering=None if refusal else decision.lowering,
            notes=tuple(decision.notes),
            state=tuple(decision.state),
        )


class Pass(Protocol):
    """A step of the pipeline."""

    @property
    def name(self) -> str:
        """The name by which a user switches the pass off."""
        ...

    def run(self, rewriting: Rewriting) -> None:
        """Change the rewriting in place."""
        ...
