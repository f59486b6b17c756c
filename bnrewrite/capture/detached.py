"""Updates in place that autograd does not see where the updated value is read.

    x.data.copy_(y)                       with torch.no_grad(): x.mul_(2)

From then on x has another value and the autograd history that it had before. A functional graph has
a new value of x instead. That says the same where x has no history, as long as the new value gets
none either: what is written through `x.data` or `x.detach()` is detached first, unless that alias
is read with its history afterwards. Any other such update has no functional form.
"""

from __future__ import annotations

from collections.abc import Iterator, Set

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from bnrewrite.capture.aliases import storage_of
from bnrewrite.capture.targets import CALLS, is_in_place, target_name
from bnrewrite.gradients import in_grad_mode

_OF_HISTORY = "a value with autograd history is updated where autograd is off"
_READ_WITH_HISTORY = "a value is written through a detached alias that is read with its history"


def hidden_updates(graph: fx.Graph, grad_enabled: bool) -> dict[fx.Node, str]:
    """The updates without a functional form, with the aliases that they go through, and why.

    Args:
        graph: as Dynamo made it.
        grad_enabled: the gradient mode in which it begins.
    """
    found: dict[fx.Node, str] = {}
    for node, target, enabled in _updates(graph, grad_enabled):
        through = list(_way(target))
        aliases = [each for each in through if _is_detached(each)]
        if any(_has_history(_base(each)) for each in aliases) or (
            not enabled and any(map(_has_history, through))
        ):
            found.update(dict.fromkeys((node, *_up_to_base(through)), _OF_HISTORY))
        elif enabled and aliases and _writes_history(node) and _is_read_behind(aliases[0], node):
            found.update(dict.fromkeys((node, *_up_to_base(through)), _READ_WITH_HISTORY))
    return found


def detached_updates(graph: fx.Graph, grad_enabled: bool) -> Set[fx.Node]:
    """The updates in place whose new value must be detached, as they go through such an alias."""
    return {
        node
        for node, target, enabled in _updates(graph, grad_enabled)
        if enabled and any(map(_is_detached, _way(target))) and _writes_history(node)
    }


def _updates(graph: fx.Graph, grad_enabled: bool) -> Iterator[tuple[fx.Node, fx.Node, bool]]:
    """The updates in place, each value that they update, and the gradient mode at that place."""
    for node, enabled in in_grad_mode(graph, grad_enabled):
        if node.op in CALLS:
            for target in _updated(node):
                yield node, target, enabled


def _updated(node: fx.Node) -> list[fx.Node]:
    targets = [node.kwargs.get("out")]
    if is_in_place(node) and node.args:
        targets.append(node.args[0])
    return [each for each in tree_leaves(targets) if isinstance(each, fx.Node)]


def _way(node: fx.Node) -> Iterator[fx.Node]:
    """A node, and what it is a view or an alias of, and so on."""
    memory = storage_of(node.meta.get("example_value"))
    while memory is not None:
        yield node
        given = _first(node)
        if given is not None and isinstance(given.meta.get("example_value"), tuple | list):
            given = _first(given)  # one of several views
        if given is None or storage_of(given.meta.get("example_value")) != memory:
            return
        node = given


def _first(node: fx.Node) -> fx.Node | None:
    given = node.args[0] if node.op in CALLS and node.args else None
    return given if isinstance(given, fx.Node) else None


def _up_to_base(through: list[fx.Node]) -> list[fx.Node]:
    """The part of a way that leads through the last alias without history."""
    last = max((i for i, each in enumerate(through) if _is_detached(each)), default=-1)
    return through[: last + 1]


def _base(alias: fx.Node) -> fx.Node:
    given = _first(alias)
    assert given is not None
    return given


def _is_detached(node: fx.Node) -> bool:
    """Whether a node is `x.data` or `x.detach()`."""
    if _first(node) is None:
        return False
    if node.op == "call_method":
        return node.target == "detach"
    return node.op == "call_function" and (
        (node.target is getattr and node.args[1:2] == ("data",))
        or target_name(node) in ("detach", "_get_data_attr")
    )


def _is_read_behind(alias: fx.Node, update: fx.Node) -> bool:
    """Whether an alias, or a view of it, is read behind an update, other than to update it."""
    family, is_behind = {alias}, False
    for node in alias.graph.nodes:
        is_behind = is_behind or node is update
        if _is_detached(node) or family.isdisjoint(node.all_input_nodes):
            continue
        if not family.isdisjoint(list(_way(node))[1:]):
            family.add(node)
        elif is_behind and not family.isdisjoint(set(node.all_input_nodes) - set(_updated(node))):
            return True
    return False


def _writes_history(node: fx.Node) -> bool:
    """Whether what is written has autograd history."""
    updated = _updated(node)
    return any(_has_history(each) for each in node.all_input_nodes if each not in updated)


def _has_history(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.requires_grad
