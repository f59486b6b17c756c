"""When a stretch of a graph stays the user's: memory that it shares is updated elsewhere.

Within a stretch updates in place are new values. That is not the user's code any more where

- a value that the stretch makes is updated behind it: the stretch's own operations may keep that
  value for their backward, where the user's do not;
- a value that it reads is updated behind it, and its operations may keep that one;
- it updates one of its inputs, and another input is a view of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import fx

from bnrewrite.capture.aliases import is_updated
from bnrewrite.capture.canonical import Canonical
from bnrewrite.capture.lifetime import outlives
from bnrewrite.capture.stretches import Stretch, itself, storages
from bnrewrite.capture.targets import CALLS, is_in_place, target_name
from bnrewrite.gradients import differentiable_nodes


def updates_of(graph: fx.Graph, kept: Collection[fx.Node]) -> dict[fx.Node, set[int]]:
    """The memory that each node of a graph may update, and that was there before it.

    What an operation does to a tensor shows in the version of the fake tensor that Dynamo ran it
    with; not when. So an input of the graph that has been updated counts as updated by each of its
    readers, and by a kept node every value that it is given.
    """
    placeholders = storages(node for node in graph.nodes if node.op == "placeholder")
    found: dict[fx.Node, set[int]] = {}
    for node in graph.nodes:
        if node.op not in CALLS:
            continue
        given = node.all_input_nodes
        versioned = storages(each for each in given if _is_versioned(each))
        updated = versioned if node in kept else versioned & placeholders
        if target_name(node) == "triton_kernel_wrapper_mutation":
            updated = storages(given)
        first = node.args[0] if node.args else None
        if isinstance(first, fx.Node) and (
            is_in_place(node) or (itself(node) is not node and _is_versioned(first))
        ):
            updated = updated | storages([first])
        if isinstance(node.kwargs.get("out"), fx.Node):
            updated = updated | storages([node.kwargs["out"]])
        schema = getattr(node.target, "_schema", None)
        if schema is not None and getattr(schema, "is_mutable", False):
            updated = updated | storages(given)
        if updated:
            found[node] = updated
    return found


def updated_behind(stretch: Stretch, updates: Mapping[fx.Node, set[int]]) -> set[int]:
    """The memory that nodes outside a stretch update after it has begun."""
    mine, behind = set(stretch.nodes), False
    found: set[int] = set()
    for node in stretch.nodes[0].graph.nodes:
        behind = behind or node in mine
        if behind and node not in mine:
            found |= updates.get(node, set())
    return found


def conflict(stretch: Stretch, canonical: Canonical | None, behind: Collection[int]) -> str | None:
    """Why the canonical graph of a stretch cannot stand in its place; None where it can."""
    if not storages(stretch.outputs).isdisjoint(behind):
        return "its result is updated in place by code that is kept as it is"
    if canonical is None:
        return None
    inputs = dict(zip((each.name for each in canonical.inputs), stretch.inputs, strict=True))
    nodes = {node.name: node for node in canonical.module.graph.nodes}
    read_before = [
        name
        for name in inputs
        if name not in canonical.mutated  # of those a copy is read
        and not storages([inputs[name]]).isdisjoint(behind)
    ]
    for name in read_before:
        nodes[name].meta["requires_grad"] = True  # it may, by then
    differentiable = differentiable_nodes(canonical.module.graph, canonical.grad_enabled)
    if any(outlives(nodes[name], differentiable) for name in read_before):
        return "what it reads is updated in place by code that is kept as it is"
    for name in canonical.mutated:
        others = (each for each in stretch.inputs if each is not inputs[name])
        if not storages([inputs[name]]).isdisjoint(storages(others)):
            return "it updates a value in place and reads a view of that value"
    return None


def _is_versioned(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return any(map(is_updated, value if isinstance(value, list | tuple) else [value]))
