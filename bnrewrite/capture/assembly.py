"""Put the rewritten parts of a graph back to where they stood.

Before:  the user's graph; canonical graphs of some of its stretches and of checkpointed graphs.
After:   one graph: the canonical nodes in the place of these stretches, all others as they were.
Leaves alone: a stretch without a rewritten norm; one whose updates cannot be made at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from bnrewrite.capture.aliases import outputs_of
from bnrewrite.capture.autocast import DEVICES, ENTER, EXIT
from bnrewrite.capture.look import Look, Part
from bnrewrite.capture.stretches import itself
from bnrewrite.capture.writeback import Around

Rewritten = Callable[[Look, bool], tuple[fx.GraphModule, Around]]


def assemble(
    look: Look, differentiated_later: bool, rewritten: Rewritten
) -> tuple[fx.GraphModule, Around, frozenset[int]]:
    """The graph of a look that has parts.

    Args:
        look: at the user's graph, which stays as it is.
        differentiated_later: whether the stage after traces a backward of its own.
        rewritten: gives the graph of a part in the form in which Dynamo calls it.

    Returns:
        The graph, the updates that are left to be made around it, and the outputs that are new
        values of buffers and that the graph has written there.
    """
    graphs = [
        (part, *rewritten(part.look, differentiated_later))
        for part in look.parts
        if part.look.is_changed
    ]
    written = {output for part, *_ in graphs for output in part.rebound}
    is_whole = all(
        each.output in written or each.placeholder in look.recurrent for each in look.rebindings
    )
    assembly = _Assembly(look.graph)
    for part, module, around in graphs:
        if not around.inputs or (is_whole and _are_its_own(part, around)):
            assembly.replace(part, module, around)
        else:
            written -= set(part.rebound)
    for body in look.bodies:
        if body.look.is_changed:
            inner, around, _ = assemble(body.look, differentiated_later, rewritten)
            assert not around.inputs, "a checkpointed graph with updates stays the user's"
            inner.meta = dict(body.look.graph.meta)
            assembly.bodies[body.node] = inner
    return *assembly.build(), frozenset(written)


def _are_its_own(part: Part, around: Around) -> bool:
    """Whether what is updated around a graph is used in one of its parts only."""
    inputs = [part.stretch.inputs[i] for i in around.inputs]
    return all(
        node.op == "placeholder" and not part.stretch.is_shared(node, behind=False)
        for node in inputs
    )


class _Assembly:
    """A graph in the making, node by node of the user's."""

    def __init__(self, users: fx.GraphModule) -> None:
        self.users = users
        self.bodies: dict[fx.Node, fx.GraphModule] = {}
        self._parts: dict[fx.Node, tuple[Part, fx.GraphModule, Around]] = {}  # by first node
        self._replaced: set[fx.Node] = set()
        self._graph = fx.Graph()
        self._attributes: dict[str, Any] = {}
        self._made: dict[fx.Node, fx.Node] = {}  # by node of the user's graph
        self._later: dict[fx.Node, fx.Node] = {}  # new values of placeholders, by theirs
        self._live: dict[fx.Node, fx.Node] = {}  # outputs that are such placeholders

    def replace(self, part: Part, module: fx.GraphModule, around: Around) -> None:
        """Let a graph stand in the place of a part."""
        self._parts[part.stretch.nodes[0]] = part, module, around
        self._replaced.update(part.stretch.nodes)

    def build(self) -> tuple[fx.GraphModule, Around]:
        """The graph, and the updates that are left to be made around it."""
        nodes = list(self.users.graph.nodes)
        for node in nodes:
            if node in self._parts:
                self._inline(*self._parts[node])
            elif node not in self._replaced and node.op != "output":
                self._value(node)
        placeholders = [node for node in nodes if node.op == "placeholder"]
        outputs = outputs_of(self.users)
        results = fx.map_arg(tuple(outputs), self._value)
        self._graph.output((*results, *self._later.values()))
        around = Around(
            inputs=tuple(placeholders.index(node) for node in self._later),
            returned=tuple(
                (i, placeholders.index(self._live[node]))
                for i, node in enumerate(outputs)
                if node in self._live
            ),
        )
        return fx.GraphModule(self._attributes, self._graph), around

    def _value(self, node: fx.Node) -> fx.Node:
        """The node that gives the value of one of the user's, copied where it must be."""
        if node not in self._made:
            same = itself(node)
            if same is not node and node in self._replaced:
                return self._value(same)
            self._made[node] = self._copy(node)
        return self._made[node]

    def _copy(self, node: fx.Node) -> fx.Node:
        if node.op in ("get_attr", "call_module"):
            self._attributes[str(node.target)] = attribute(self.users, str(node.target))
        copied = self._graph.node_copy(node, self._value)
        body = self.bodies.get(node)
        if body is not None:
            name = f"rewritten_{node.args[0]}"
            with self._graph.inserting_before(copied):
                copied.args = (self._attribute(name, body), *copied.args[1:])
        return copied

    def _attribute(self, name: str, value: Any) -> fx.Node:
        self._attributes[name] = value
        return self._graph.get_attr(name)

    def _inline(self, part: Part, module: fx.GraphModule, around: Around) -> None:
        """Copy the nodes of a part's graph, with autocast off: their casts are nodes."""
        with part.stretch.modes.entered():
            devices = [each for each in DEVICES if torch.is_autocast_enabled(each)]
        inner: dict[fx.Node, fx.Node] = {}
        given = iter(part.stretch.inputs)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                inner[node] = self._value(next(given))
        off = [self._graph.call_function(ENTER, (each, None, False, True)) for each in devices]
        for node in module.graph.nodes:
            if node.op == "get_attr":
                name = f"part_{len(self._attributes)}_{node.target}"
                inner[node] = self._attribute(name, attribute(module, str(node.target)))
                inner[node].meta = dict(node.meta)
            elif node.op not in ("placeholder", "output"):
                inner[node] = self._graph.node_copy(node, inner.__getitem__)
        for entered in reversed(off):
            self._graph.call_function(EXIT, (entered,))
        stretch = part.stretch
        results = [None if each is None else inner[each] for each in outputs_of(module)]
        inputs = [stretch.inputs[i] for i in around.inputs]
        for node, result in zip(stretch.outputs, results, strict=False):
            if result is not None:
                self._made[node] = result
        new = [each for each in results[len(stretch.outputs) :] if each is not None]
        self._later.update(zip(inputs, new, strict=True))
        for output, i in around.returned:
            self._live[stretch.outputs[output]] = stretch.inputs[i]
            self._made[stretch.outputs[output]] = self._value(stretch.inputs[i])


def attribute(module: fx.GraphModule, path: str) -> Any:
    """What a path of names leads to: a body, a constant."""
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name)
    return value
