"""Walks over a graph from node to node."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TypeVar

from torch import fx

Item = TypeVar("Item", bound=Hashable)


def reached(start: Iterable[Item], steps: Callable[[Item], Iterable[Item]]) -> Iterator[Item]:
    """All that steps lead to from some items, these among it; each once, depth first.

    Args:
        start: where to begin.
        steps: what is one step from an item; asked when the walk goes on from there.
    """
    todo, seen = list(start), set[Item]()
    while todo:
        each = todo.pop()
        if each not in seen:
            seen.add(each)
            yield each
            todo += steps(each)


def computed_from(nodes: Iterable[fx.Node]) -> Iterator[fx.Node]:
    """Some nodes, and all that they are computed from."""
    return reached(nodes, lambda node: node.all_input_nodes)
