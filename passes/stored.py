"""What of a graph is computed from parameters and buffers alone, and parts of it as own graphs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from bnrewrite.algebra.calls import is_tensor
from bnrewrite.algebra.meaning import Reading
from bnrewrite.algebra.stored import path_of
from bnrewrite.kernels import KERNELS
from bnrewrite.walks import reached

from .rewriting import Rewriting

NOT_STORED = "it is not made of parameters and buffers alone"


class Stored:
    """The nodes that have the same value in every call, as long as nobody changes the model.

    Parameters and buffers that carry no gradient here and that the graph does not update, and
    tensors computed from these.
    """

    def __init__(self, rewriting: Rewriting, reading: Reading) -> None:
        self._reading = reading
        self._updated = frozenset(rewriting.canonical.mutated)
        self._nodes: set[fx.Node] = set()
        for node in rewriting.graph.nodes:
            if self._is_given(node) or self._is_computed(node):
                self._nodes.add(node)

    def __contains__(self, node: fx.Node) -> bool:
        return node in self._nodes

    def objection(self, nodes: Iterable[object]) -> str | None:
        """Why these are not all constant, a clause; None where they are."""
        for node in nodes:
            if node not in self._nodes:
                return self._why(node) if isinstance(node, fx.Node) else NOT_STORED
        return None

    def _why(self, node: fx.Node) -> str:
        for current in reached([node], self._other_inputs):
            if current.op == "placeholder" and (
                current.meta["parameter"] or current.meta["stored"]
            ):
                if current.name in self._updated:
                    return f"the graph itself updates {path_of(current)}"
                return f"{path_of(current)} requires a gradient here"
        return NOT_STORED

    def _other_inputs(self, node: fx.Node) -> list[fx.Node]:
        return [each for each in node.all_input_nodes if each not in self._nodes]

    def _is_given(self, node: fx.Node) -> bool:
        if node.op == "get_attr":
            return is_tensor(node)
        return (
            node.op == "placeholder"
            and bool(node.meta["parameter"] or node.meta["stored"])
            and is_tensor(node)
            and node.name not in self._updated
            and not self._reading.ring.differentiable(node)
        )

    def _is_computed(self, node: fx.Node) -> bool:
        target = node.target
        if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor | tuple):
            return False
        if isinstance(target, torch._ops.OpOverload):
            random = torch.Tag.nondeterministic_seeded in target.tags
            if random or target._schema.is_mutable or target.namespace != "aten":
                return False  # a custom operator may have state of its own
        elif target is not operator.getitem and target not in KERNELS:
            return False
        return all(each in self._nodes for each in node.all_input_nodes)


def leaves_of(outputs: Iterable[fx.Node], inner: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """The nodes that these are computed from, with nothing but inner nodes between; in order."""
    made = reached(outputs, lambda node: node.all_input_nodes if inner(node) else [])
    return sorted(node for node in made if not inner(node))


def extracted(
    outputs: Sequence[fx.Node | None] | fx.Node,
    inner: Callable[[fx.Node], bool],
    inputs: Sequence[fx.Node],
) -> fx.Graph:
    """A part of a graph as a graph of its own.

    Args:
        outputs: what it returns, one node or several.
        inner: which nodes are copied.
        inputs: what it is given; all that is not copied must be among these.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = {"val": node.meta.get("val")}
    ends = [outputs] if isinstance(outputs, fx.Node) else [n for n in outputs if n is not None]
    needed = reached(ends, lambda node: [] if node in copies else node.all_input_nodes)
    for node in sorted(node for node in needed if node not in copies):
        assert inner(node), f"{node} is neither copied nor given"
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(
        fx.map_arg(outputs if isinstance(outputs, fx.Node) else tuple(outputs), copies.get)
    )
    return graph


@dataclass(frozen=True)
class Recipe:
    """A part of a graph that is run node by node: it runs seldom, and code takes time to make."""

    owner: fx.GraphModule
    graph: fx.Graph

    def __call__(self, given: Sequence[Any]) -> Any:
        """What the part returns."""
        return fx.Interpreter(self.owner, graph=self.graph).run(*given)
