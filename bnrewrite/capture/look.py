"""One look at a graph: what it is in canonical form, which norms were found, what it updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import fx

from bnrewrite.capture.aliases import is_updated, outputs_of
from bnrewrite.capture.canonical import Canonical, canonicalise
from bnrewrite.capture.rebinding import Rebinding, find_attribute_updates, find_rebindings
from bnrewrite.options import Options

if TYPE_CHECKING:
    from bnrewrite.report.site import Site


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
        failure: why there is no canonical graph, a sentence.
    """

    graph: fx.GraphModule
    canonical: Canonical | None
    before: str
    sites: tuple[Site, ...]
    rebindings: tuple[Rebinding, ...]
    attributes: tuple[tuple[str, fx.Node], ...]
    private: frozenset[str]
    failure: str | None

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
        return updated | frozenset(each.placeholder for each in self.rebindings if each.history)

    @property
    def _statistics(self) -> frozenset[str]:
        if self.canonical is None:
            return frozenset()
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


def examine(graph: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Look:
    """Capture a Dynamo graph and rewrite what was captured; the graph itself stays as it is."""
    from bnrewrite.passes import rewrite  # the passes import this package

    rebindings, attributes = find_rebindings(graph), find_attribute_updates(graph)
    before = ""
    try:
        canonical = canonicalise(graph, example_inputs, rebindings)
        private = _private(canonical)
        before = str(canonical.module.graph)
        sites = tuple(rewrite(canonical, options))
    except Exception as error:  # any failure means that the user's graph runs; the cause is told
        reason = sentence(error)
        return Look(graph, None, before, (), rebindings, attributes, frozenset(), reason)
    return Look(graph, canonical, before, sites, rebindings, attributes, private, None)


def sentence(error: Exception) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


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
