"""Pathologies that show in how a model keeps its statistics, and those of its formulas."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from bnrewrite.capture.aliases import outputs_of
from bnrewrite.capture.look import Look
from bnrewrite.capture.provenance import source_line
from bnrewrite.capture.sources import locate
from bnrewrite.report.findings import pathology
from bnrewrite.report.site import Finding

if TYPE_CHECKING:
    from bnrewrite.findings import Noticed, StoredStatistics


def diagnose(looks: Sequence[Look], model: Any) -> list[Finding]:
    """What the graphs of one call say about the model's norms and their statistics."""
    found = [finding for look in looks for finding in _of_graph(look)]
    noticed = list(noticed_in(looks))
    found += [finding for each in noticed for finding in each.findings]
    if isinstance(model, nn.Module):
        shared = _shares_buffers(model)
        while isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module  # whose call is what Dynamo sees: names are those in it
        seen = set(_read_or_written(looks))
        if model.training:
            found += _never_updated(noticed, seen, model)
        found += _never_loaded(noticed, model)
        found += _of_replicas(noticed, model)
        if shared:
            found += _of_one_domain(noticed, seen, model)
    return list(dict.fromkeys(found))


def noticed_in(looks: Sequence[Look]) -> Iterator[Noticed]:
    """What was noticed in graphs, and in their parts and bodies."""
    for look in looks:
        if look.noticed is not None:
            yield look.noticed
        yield from noticed_in([part.look for part in look.parts])
        yield from noticed_in([body.look for body in look.bodies])


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


def _read_or_written(looks: Sequence[Look]) -> Iterator[str | None]:
    """The qualified names of what a call has to do with."""
    for look in looks:
        for node in _live(look.graph.graph):
            if node.op == "placeholder":
                yield locate(node)[1]


def _never_updated(
    noticed: Sequence[Noticed], seen: set[str | None], model: nn.Module
) -> Iterator[Finding]:
    """Buffers of a training norm that still hold their first value and take no part in the call."""
    for batch in (batch for each in noticed for batch in each.batches):
        owner = _owner(model, batch.module)
        if owner is None:
            continue
        for name, buffer in owner.named_buffers(recurse=False):
            path = f"{batch.module}.{name}" if batch.module else name
            fits = batch.channels in (None, buffer.numel())
            if fits and path not in seen and _is_initial(buffer):
                yield pathology("statistics-never-updated", batch.source, path)


def _never_loaded(noticed: Sequence[Noticed], model: nn.Module) -> Iterator[Finding]:
    """Norms with stored statistics, of which none has ever been stored."""
    for stored in (stored for each in noticed for stored in each.stored):
        names = f"{stored.mean}, {stored.variance}"
        updated = {name for each in noticed for name in each.updated}
        if not updated & {stored.mean, stored.variance} and _is_unset(model, stored):
            yield pathology("never-updated-statistics-used", stored.source, names)


def _is_unset(model: nn.Module, stored: StoredStatistics) -> bool:
    """Whether a mean is zero, and a variance one or zero, in every channel."""
    mean, variance = (_tensor(model, path) for path in (stored.mean, stored.variance))
    if mean is None or variance is None or not mean.numel():
        return False
    return _is_initial(variance) and bool((mean == 0).all())


def _shares_buffers(model: nn.Module) -> bool:
    """Whether a wrapper gives every process, or replica, the buffers of the first."""
    return any(
        isinstance(each, nn.DataParallel)
        or (isinstance(each, nn.parallel.DistributedDataParallel) and each.broadcast_buffers)
        for each in model.modules()
    )


def _of_replicas(noticed: Sequence[Noticed], model: nn.Module) -> Iterator[Finding]:
    """Wrappers that run a replica per device, and buffers in them that the call updates.

    One without devices counts: it waits for a machine that has some.
    """
    updated = sorted({path for each in noticed for path in each.updated})
    for name, wrapper in model.named_modules():
        if isinstance(wrapper, nn.DataParallel) and len(wrapper.device_ids) != 1:
            inside = f"{name}.module.".lstrip(".")
            own = [path for path in updated if path.startswith(inside)]
            if own:
                more = f" and {len(own) - 1} more" if own[1:] else ""
                source = _place(noticed, own[0].rpartition(".")[0])
                yield pathology("replica-statistics-discarded", source, f"{own[0]}{more}")


def _of_one_domain(
    noticed: Sequence[Noticed], seen: set[str | None], model: nn.Module
) -> Iterator[Finding]:
    """Norms side by side, of which the call updates some and has nothing to do with the others."""
    updated = sorted({path for each in noticed for path in each.updated})
    for module, paths in groupby(updated, key=lambda path: path.rpartition(".")[0]):
        parent, _, own = module.rpartition(".")
        names = [path.rpartition(".")[2] for path in paths]
        owner, norm = _owner(model, parent), _owner(model, module)
        if owner is None or norm is None or not own:
            continue
        others = [
            path
            for name, other in owner.named_children()
            for path in (f"{parent}.{name}".lstrip("."),)
            if type(other) is type(norm)
            and not any(f"{path}.{key}" in seen for key in other.state_dict())
            and all(_alike(norm, other, each) for each in names)
        ]
        if others:
            yield pathology(
                "domain-statistics-broadcast",
                _place(noticed, module),
                f"{module} is updated, {', '.join(others)} not",
            )


def _alike(norm: nn.Module, other: nn.Module, name: str) -> bool:
    """Whether two norms have a buffer of the same name and shape."""
    mine, theirs = (dict(each.named_buffers(recurse=False)).get(name) for each in (norm, other))
    return mine is not None and theirs is not None and mine.shape == theirs.shape


def _place(noticed: Sequence[Noticed], module: str) -> str:
    """Where a norm is written; its name where it is PyTorch's own."""
    batches = [batch for each in noticed for batch in each.batches]
    return next((each.source for each in batches if each.module == module), module)


def _owner(model: nn.Module, path: str) -> nn.Module | None:
    """The module of a name; None for one that hangs on the model without being registered."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _tensor(model: nn.Module, path: str) -> torch.Tensor | None:
    """The tensor of a qualified name."""
    module, _, name = path.rpartition(".")
    found = getattr(_owner(model, module), name, None)
    return found if isinstance(found, torch.Tensor) else None


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
    """All zeros or all ones, where it has values."""
    floating = buffer.is_floating_point() and buffer.numel() > 0 and not buffer.is_meta
    return floating and bool((buffer == 0).all() or (buffer == 1).all())


def _last_user(node: fx.Node) -> fx.Node:
    return list(node.users)[-1] if node.users else node
