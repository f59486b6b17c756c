"""Cut a Dynamo graph into stretches between the nodes that are kept as they are.

    Graph:      a = f(x);  b = g(a);  c = scan(b, w);  d = g(c);  return d
    Stretches:  [a, b]                                 [d]

A stretch is a graph of its own: what it reads are its placeholders, what is read of it elsewhere
are its outputs. Its nodes stand side by side in the user's graph, so running it at its place keeps
every value and the order of every effect.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._C._functorch import is_functorch_wrapped_tensor

from bnrewrite.capture.aliases import is_updated, storage_of
from bnrewrite.capture.autocast import ENTER, EXIT, autocast_kept, enter_autocast
from bnrewrite.capture.targets import CALLS, is_in_place
from bnrewrite.gradients import GRAD_MODE


@dataclass(frozen=True)
class Modes:
    """The modes in which a node of a graph runs.

    Attributes:
        grad_enabled: whether autograd records.
        autocast: the nodes that have entered autocast and have not left it, outermost first;
            autocast around the whole graph is not among them.
    """

    grad_enabled: bool
    autocast: tuple[fx.Node, ...] = ()

    def after(self, node: fx.Node) -> Modes:
        """The modes behind a node."""
        if node.target is GRAD_MODE:
            return Modes(bool(node.args[0]), self.autocast)
        if node.target is ENTER:
            return Modes(self.grad_enabled, (*self.autocast, node))
        if node.target is EXIT:
            return Modes(
                self.grad_enabled, tuple(e for e in self.autocast if e is not node.args[0])
            )
        return self

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Be in these modes."""
        with autocast_kept(), torch.set_grad_enabled(self.grad_enabled):
            for node in self.autocast:
                enter_autocast(*node.args)  # type: ignore[arg-type]
            yield


@dataclass(frozen=True)
class Stretch:
    """Neighbouring nodes of a graph, and the same nodes as a graph of their own.

    Attributes:
        nodes: of the user's graph, in order.
        inputs: the nodes of the user's graph that are read, one for each placeholder.
        outputs: the nodes of the stretch that are read elsewhere, one for each output.
        modes: in which the stretch begins, and ends.
        module: the graph.
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    modes: Modes
    module: fx.GraphModule

    def is_shared(self, node: fx.Node, behind: bool) -> bool:
        """Whether nodes outside (only those behind the first one of it) read a value's memory."""
        memory, begun = storages([node]), not behind
        mine = set(self.nodes)
        for each in node.graph.nodes:
            begun = begun or each in mine
            outside = begun and each not in mine and each.op != "output"
            if outside and not memory.isdisjoint(storages(each.all_input_nodes)):
                return True
        return False


def stretches(
    graph_module: fx.GraphModule,
    kept: Collection[fx.Node],
    grad_enabled: bool,
    rebound: Mapping[fx.Node, fx.Node],
    statistics: Collection[fx.Node],
) -> Iterator[Stretch]:
    """The stretches of a graph between its `kept` nodes, in order.

    Left out are those that read or give what no graph can be called with.

    Args:
        graph_module: the graph.
        kept: nodes that are in no stretch.
        grad_enabled: the gradient mode in which the graph begins.
        rebound: new values of buffers, and the placeholders of these; which are inputs of the
            stretch that the new value is made in, read there or not.
        statistics: placeholders that have no autograd history until the graph updates them.
    """
    for run, modes in _runs(graph_module.graph, kept, grad_enabled, storages(statistics)):
        for nodes, begin in _balanced(run, modes):
            stretch = _stretch(graph_module, nodes, begin, rebound)
            if stretch is not None:
                yield stretch


def itself(node: fx.Node) -> fx.Node:
    """The node whose very tensor a node returns: x for `x.add_(1)`, and for `x.contiguous()`."""
    given = node.args[0] if node.op in CALLS and node.args else None
    value = node.meta.get("example_value")
    if not isinstance(given, fx.Node) or not isinstance(value, torch.Tensor):
        return node
    return itself(given) if value is given.meta.get("example_value") else node


def _runs(
    graph: fx.Graph, kept: Collection[fx.Node], grad_enabled: bool, statistics: Set[int]
) -> list[tuple[list[fx.Node], Modes]]:
    """The nodes between the kept ones, and the modes in which they begin.

    An update of a value with autograd history that is older than its run is kept too. An element
    of a tuple belongs to where the tuple was made.
    """
    modes = Modes(grad_enabled)
    runs: list[tuple[list[fx.Node], Modes]] = [([], modes)]
    home: dict[fx.Node, list[fx.Node] | None] = {}
    older: set[int] = set()  # the memory of what was made before the run at hand
    fresh: set[int] = set()
    for node in graph.nodes:
        modes = modes.after(node)
        run = runs[-1][0]
        if node.op not in CALLS:
            older |= storages([node])
        elif _is_element(node) and node.args[0] in home:
            owner = home[node] = home[node.args[0]]
            if owner is not None:
                owner.append(node)
            if owner is run:
                fresh |= storages([node]) - older
            else:
                older |= storages([node])
        elif node in kept or _updates_history(node, older - statistics):
            home[node] = None
            runs.append(([], modes))
            older |= fresh | storages([node])
            fresh = set()
        else:
            home[node] = run
            run.append(node)
            fresh |= storages([node]) - older
    return [(run, begin) for run, begin in runs if run]


def _updates_history(node: fx.Node, older: Collection[int]) -> bool:
    """Whether a node updates a value with autograd history that was made before its run."""
    given = node.args[0] if node.args else None
    if not isinstance(given, fx.Node):
        return False
    value = given.meta.get("example_value")
    if not is_updated(value) or not value.requires_grad:
        return False
    return storage_of(value) in older and (is_in_place(node) or itself(node) is not node)


def _is_element(node: fx.Node) -> bool:
    if node.target is not operator.getitem or not isinstance(node.args[0], fx.Node):
        return False
    return not isinstance(node.args[0].meta.get("example_value"), torch.Tensor)


def _balanced(nodes: Sequence[fx.Node], begin: Modes) -> Iterator[tuple[Sequence[fx.Node], Modes]]:
    """Cut a run at changes of a mode, so that each piece ends in the modes in which it begins."""
    if nodes and nodes[0].target is GRAD_MODE:
        yield from _balanced(nodes[1:], begin.after(nodes[0]))
        return
    entered = {node for node in nodes if node.target is ENTER}
    left = {node.args[0]: node for node in nodes if node.target is EXIT}
    cuts = {node for node in entered if node not in left}
    cuts |= {node for entry, node in left.items() if entry not in entered}
    grad = begin.grad_enabled
    modes = [(node, bool(node.args[0])) for node in nodes if node.target is GRAD_MODE]
    if modes and modes[-1][1] != grad:
        after = [node for node, enabled in modes if enabled == grad]
        away = modes[0][0] if not after else modes[[n for n, _ in modes].index(after[-1]) + 1][0]
        cuts.add(away)
    piece: list[fx.Node] = []
    pieces, current = [(piece, begin)], begin
    for node in nodes:
        current = current.after(node)
        if node in cuts:
            piece = []
            pieces.append((piece, current))
        else:
            piece.append(node)
    for piece, start in pieces:
        if cuts:
            yield from _balanced(piece, start)
        elif piece:
            yield piece, start


def _stretch(
    graph_module: fx.GraphModule,
    nodes: Sequence[fx.Node],
    modes: Modes,
    rebound: Mapping[fx.Node, fx.Node],
) -> Stretch | None:
    mine = set(nodes)
    inputs: dict[fx.Node, None] = {}
    for node in nodes:
        inputs.update((each, None) for each in node.all_input_nodes if each not in mine)
    inputs.update((rebound[node], None) for node in nodes if node in rebound)
    constants = [each for each in inputs if each.op == "get_attr"]
    given = [each for each in inputs if each.op != "get_attr"]
    read = {
        itself(node): None
        for node in nodes
        if any(user not in mine for user in node.users) and itself(node) in mine
    }
    outputs = list(read)
    if not outputs or len(nodes) < 2 or not all(map(_is_passable, (*given, *outputs))):
        return None
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for each in given:
        copies[each] = graph.placeholder(each.name)
        copies[each].meta = _meta_of_input(each)
        source = getattr(each, "_dynamo_source", None)
        if source is not None:
            copies[each]._dynamo_source = source
    for each in (*constants, *nodes):
        copies[each] = graph.node_copy(each, copies.__getitem__)
    graph.output(tuple(copies[each] for each in outputs))
    module = fx.GraphModule(graph_module, graph)
    return Stretch(tuple(nodes), tuple(given), tuple(outputs), modes, module)


def _is_passable(node: fx.Node) -> bool:
    """Whether a value can be an input or an output of a graph."""
    value = node.meta.get("example_value")
    if isinstance(value, torch.SymInt):
        return True
    return (
        isinstance(value, torch.Tensor)
        and not is_functorch_wrapped_tensor(value)
        and value.layout == torch.strided
    )


def _meta_of_input(node: fx.Node) -> dict[str, Any]:
    """What is known of a value that is computed elsewhere: a fake tensor without history."""
    meta = dict(node.meta)
    value = meta.get("example_value")
    if node.op != "placeholder" and isinstance(value, torch.Tensor):
        meta = {"example_value": value.detach().requires_grad_(value.requires_grad)}
    return meta


def storages(nodes: Iterable[fx.Node]) -> set[int]:
    """The memory of the tensors that nodes give."""
    found: set[int] = set()
    for node in nodes:
        value = node.meta.get("example_value")
        values = value if isinstance(value, list | tuple) else [value]
        found.update(s for s in map(storage_of, values) if s is not None)
    return found
