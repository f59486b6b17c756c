"""Put the new values of buffers back where they belong, at the end of a graph.

Before:  return (new_running_mean, y)
After:   copy_(running_mean, new_running_mean), without gradients; return (y,)

What a backward needs of an updated buffer is a copy that is taken first, never the live buffer: two
forwards before a backward, or a `load_state_dict` between them, stay as legal as they were when the
buffer was rebound.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from bnrewrite.capture.aliases import outputs_of

_COPY = torch.ops.aten.copy_.default
_CLONE = torch.ops.aten.clone.default
_DETACHING = frozenset({torch.ops.aten.detach.default, torch.ops.aten.detach_.default, "detach"})


@dataclass(frozen=True)
class Update:
    """A placeholder that gets a new value.

    Attributes:
        placeholder: its name.
        value: position of the new value among the outputs.
        history: keep the autograd history of the new value; otherwise it is dropped.
    """

    placeholder: str
    value: int
    history: bool = False


def write_back(
    module: fx.GraphModule,
    updates: Sequence[Update],
    outputs: Sequence[int | str],
    grad_enabled: bool,
) -> None:
    """Replace the outputs of a graph by updates of its inputs and the outputs of the user's code.

    Args:
        module: changed in place.
        updates: copied into their placeholders at the end of the graph.
        outputs: what is returned instead: the position of an old output, or a placeholder's name.
        grad_enabled: the gradient mode in which the graph is called.
    """
    graph = module.graph
    placeholders = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    values = outputs_of(module)
    output = next(node for node in graph.nodes if node.op == "output")
    output.args = (tuple(values),)
    updated = [placeholders[update.placeholder] for update in updates]
    copies = _read_through_copies(graph, updated, grad_enabled)
    values = outputs_of(module)  # some may be reads of an updated placeholder
    with graph.inserting_before(output):
        for update in updates:
            if update.history:
                _copy(graph, placeholders[update.placeholder], values[update.value])
        dropping = [update for update in updates if not update.history]
        if dropping and grad_enabled:
            graph.call_function(torch._C._set_grad_enabled, (False,))
        for update in dropping:
            _copy(graph, placeholders[update.placeholder], values[update.value])
        if dropping and grad_enabled:
            graph.call_function(torch._C._set_grad_enabled, (True,))
    output.args = (
        tuple(values[each] if isinstance(each, int) else placeholders[each] for each in outputs),
    )
    assert all(copy.users for copy in copies)
    module.recompile()


def _copy(graph: fx.Graph, placeholder: fx.Node, value: fx.Node) -> None:
    node = graph.call_function(_COPY, (placeholder, value))
    node.meta["val"] = placeholder.meta.get("val")


def _read_through_copies(
    graph: fx.Graph, updated: Iterable[fx.Node], grad_enabled: bool
) -> list[fx.Node]:
    """Let reads of updated placeholders that may outlive the call see a copy of the old value."""
    differentiable = _differentiable(graph, grad_enabled)
    last = [node for node in graph.nodes if node.op == "placeholder"][-1:]
    copies = []
    for placeholder in updated:
        if not _outlives(placeholder, differentiable):
            continue
        users = list(placeholder.users)
        with graph.inserting_after(*last):
            copy = graph.call_function(_CLONE, (placeholder,))
        copy.meta = dict(placeholder.meta)
        for user in users:
            user.replace_input_with(placeholder, copy)
        copies.append(copy)
    return copies


def _outlives(node: fx.Node, differentiable: Mapping[fx.Node, bool]) -> bool:
    """Whether a value, or a view of it, may be saved for a backward or returned."""
    return any(
        user.op == "output"
        or differentiable[user]
        or (_may_alias(user) and _outlives(user, differentiable))
        for user in node.users
    )


def _differentiable(graph: fx.Graph, grad_enabled: bool) -> dict[fx.Node, bool]:
    """For each node whether autograd may record it."""
    enabled, found = grad_enabled, {}
    for node in graph.nodes:
        if node.op == "placeholder":
            value = node.meta.get("val", node.meta.get("example_value"))
            found[node] = isinstance(value, torch.Tensor) and value.requires_grad
        elif node.target is torch._C._set_grad_enabled:
            enabled = bool(node.args[0])
            found[node] = False
        else:
            recorded = any(found[each] for each in node.all_input_nodes)
            found[node] = enabled and recorded and node.target not in _DETACHING
    return found


def _may_alias(node: fx.Node) -> bool:
    """Whether a node's value may share the memory of its input."""
    schema: Any = getattr(node.target, "_schema", None)
    if schema is None:
        return True  # a method or function of a graph that is not canonical
    return any(returned.alias_info is not None for returned in schema.returns)
