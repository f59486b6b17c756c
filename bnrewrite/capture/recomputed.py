"""Graphs with updates that are called under activation checkpointing from outside.

`checkpoint(optimised_model, x)` runs a graph again for the backward, and stops as soon as it has
all that was saved. Which updates of buffers happen twice depends on where they stand. So there the
user's own graph runs, with every update where the user's code makes it:

Before:  new = 0.9 * mean + m; y = f(x); return (new, y)                 (self.mean = 0.9 * ...)
After:   new = 0.9 * mean + m; mean.copy_(new); y = f(x); return (mean, y)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from bnrewrite.capture.aliases import is_updated, outputs_of, storage_of
from bnrewrite.capture.look import Look
from bnrewrite.capture.stage import Run
from bnrewrite.capture.targets import CALLS, is_in_place

_top_hooks = getattr(vars(torch._C)["_autograd"], "_top_saved_tensors_default_hooks", None)


def unless_recomputed(run: Run, own: Callable[[], Run]) -> Run:
    """A call that goes to another graph under activation checkpointing.

    Args:
        run: elsewhere.
        own: makes the user's own graph, when it is first needed.
    """
    made: list[Run] = []

    def chosen(*args: Any) -> Any:
        if not is_checkpointed():
            return run(*args)
        if not made:
            made.append(own())
        return made[0](*args)

    return chosen


def is_checkpointed() -> bool:
    """Whether `torch.utils.checkpoint` keeps what is saved now, or computes it again."""
    hooks: Any = None if _top_hooks is None else _top_hooks(False)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


def may_be_recomputed(look: Look) -> bool:
    """Whether it would show that a graph is run again."""
    inputs = (node for node in look.graph.graph.nodes if node.op == "placeholder")
    return torch.is_grad_enabled() and bool(
        look.rebindings or any(is_updated(each.meta.get("example_value")) for each in inputs)
    )


def users_graph(look: Look) -> fx.GraphModule:
    """A copy of the user's graph, with buffers updated in place as soon as they have a value."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(look.graph.graph, copies))
    module = fx.GraphModule(look.graph, graph)
    named = {node.name: node for node in look.graph.graph.nodes}
    results: list[fx.Node] = outputs_of(look.graph)
    returned = outputs_of(module)
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    updated, recurrent = _last_updates(look.graph.graph), look.recurrent
    for each in look.rebindings:
        placeholder, value = named[each.placeholder], results[each.output]
        if each.placeholder in recurrent or is_updated(placeholder.meta["example_value"]):
            continue  # the user's assignment is made
        buffer = copies[placeholder]
        readers = list(buffer.users)
        with graph.inserting_after(last):
            read = graph.call_function(torch.clone, (buffer,))
        for reader in readers:
            reader.replace_input_with(buffer, read)
        with graph.inserting_after(copies[updated.get(_memory(value), value)]):
            copied = graph.call_function(_update, (buffer, copies[value]))
        copied.meta = dict(value.meta)
        returned[each.output] = buffer
    next(iter(reversed(graph.nodes))).args = (tuple(returned),)
    module.recompile()
    return module


def _update(buffer: torch.Tensor, value: torch.Tensor) -> None:
    buffer.copy_(value.detach())


def _last_updates(graph: fx.Graph) -> dict[int | None, fx.Node]:
    """By memory, the node behind which its values do not change any more."""
    found: dict[int | None, fx.Node] = {}
    for node in graph.nodes:
        given = node.args[0] if node.op in CALLS and node.args else None
        if is_in_place(node) and isinstance(given, fx.Node):
            found[_memory(given)] = node
    return found


def _memory(node: fx.Node) -> int | None:
    return storage_of(node.meta.get("example_value"))
