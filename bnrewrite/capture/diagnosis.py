"""Pathologies that show in how a model keeps its statistics, not in a formula."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from bnrewrite.capture.aliases import outputs_of
from bnrewrite.capture.look import Look
from bnrewrite.capture.provenance import source_line
from bnrewrite.capture.sources import locate
from bnrewrite.report.findings import pathology
from bnrewrite.report.site import Finding

_OF_BATCHES = frozenset({"batch_norm", "general"})


def diagnose(looks: Sequence[Look], model: Any) -> list[Finding]:
    """What the graphs of one call say about the model's state."""
    found = [finding for look in looks for finding in _of_graph(look)]
    if isinstance(model, nn.Module) and model.training:
        found += _never_updated(looks, model)
        found += [finding for look in looks for finding in _normalised_by_state(look)]
    return list(dict.fromkeys(found))


def _of_graph(look: Look) -> Iterator[Finding]:
    nodes = {node.name: node for node in look.graph.graph.nodes}
    outputs = outputs_of(look.graph)
    for rebinding in look.rebindings:
        path = locate(nodes[rebinding.placeholder])[1] or rebinding.placeholder
        yield pathology("buffer-rebound", source_line(outputs[rebinding.output]), path)
    for name in sorted(look.leaking - look.recurrent):
        value = next(
            (outputs[each.output] for each in look.rebindings if each.placeholder == name),
            _last_user(nodes[name]),
        )
        path = locate(nodes[name])[1] or name
        yield pathology("statistic-with-history", source_line(value), path)
    for body in look.bodies:
        for node in body.updated:
            kind, buffer = locate(node)
            if kind == "buffer":
                yield pathology("two-updates-per-step", source_line(_last_user(node)), str(buffer))
    for path, value in look.attributes:
        yield pathology("statistic-not-a-buffer", source_line(value), path)


def _never_updated(looks: Sequence[Look], model: nn.Module) -> Iterator[Finding]:
    """Buffers of a training norm that still hold their first value and take no part in the call."""
    seen = {
        locate(node)[1]
        for look in looks
        for node in _live(look.graph.graph)
        if node.op == "placeholder"
    }
    for look in looks:
        for site in look.sites:
            if site.kind not in _OF_BATCHES:
                continue
            owner = _owner(model, site.module)
            if owner is None:
                continue
            for name, buffer in owner.named_buffers(recurse=False):
                path = f"{site.module}.{name}" if site.module else name
                if path not in seen and _is_initial(buffer):
                    yield pathology("statistics-never-updated", site.source, path)


def _owner(model: nn.Module, path: str) -> nn.Module | None:
    """The module of a name; None for one that hangs on the model without being registered."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _normalised_by_state(look: Look) -> Iterator[Finding]:
    """Norms that divide by the statistics that they have just updated."""
    for site in look.sites:
        names = {str(symbol) for symbol in site.formula.free_symbols}
        used = [path for path in site.state if path.rpartition(".")[2] in names]
        if site.kind == "general" and used:
            yield pathology("normalises-with-running-statistics", site.source, ", ".join(used))


def _live(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that an output or an update in place is made of."""
    live: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        in_place = node.op == "call_method" and str(node.target).endswith("_")
        written = (
            in_place or "out" in node.kwargs or str(node.target).startswith("<built-in function i")
        )
        if node.op == "output" or written or node in live:
            live.add(node)
            live.update(node.all_input_nodes)
    return live


def _is_initial(buffer: torch.Tensor) -> bool:
    """All zeros or all ones."""
    floating = buffer.is_floating_point() and buffer.numel() > 0
    return floating and bool((buffer == 0).all() or (buffer == 1).all())


def _last_user(node: fx.Node) -> fx.Node:
    return list(node.users)[-1] if node.users else node
