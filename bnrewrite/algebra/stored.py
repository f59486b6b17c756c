"""Where a tensor comes from: parameters, buffers, or the graph's own inputs."""

from __future__ import annotations

from itertools import islice

from torch import fx

from bnrewrite.walks import computed_from

from .calls import CASTS, arguments_of, is_pointwise, name_of
from .parts import TAKES_APART

RENAMED = CASTS | {"view", "reshape", "unsqueeze", "squeeze", "expand", "expand_as"}
CUT = TAKES_APART | {"getitem"}
NEAR = 16  # how many nodes a coefficient is made of, at most
FAR = 64  # how many nodes a parametrised tensor is made of, at most


def path_of(node: fx.Node) -> str:
    """The qualified name of what a placeholder stands for; of another node its own."""
    return str(node.meta.get("path") or node.name)


def uncast(node: fx.Node) -> fx.Node:
    """The tensor that a node is, before casts and reshapes."""
    while name_of(node) in RENAMED:
        node = arguments_of(node)["self"]
    return node


def cut_from(node: fx.Node) -> fx.Node:
    """The tensor that a node is a part of, or is itself, before casts and reshapes."""
    node = uncast(node)
    while name_of(node) in CUT:
        node = uncast(node.all_input_nodes[0])
    return node


def is_stored(source: object) -> bool:
    """Whether a tensor is given to the graph, or made element by element of what is stored."""
    if not isinstance(source, fx.Node):
        return False
    if uncast(source).op in ("placeholder", "get_attr"):
        return True
    made = _origins(source, NEAR)
    return made is not None and all(
        is_pointwise(n) or name_of(n) in RENAMED | CUT
        if n.op == "call_function"
        else n.op == "get_attr" or n.meta.get("parameter") or n.meta.get("stored")
        for n in made
    )


def is_buffer(source: object) -> bool:
    """Whether a tensor is a buffer, as it is, rounded or reshaped, or a part of one."""
    return isinstance(source, fx.Node) and bool(cut_from(source).meta.get("stored"))


def is_parameter(node: fx.Node) -> bool:
    """Whether a tensor is computed from parameters alone."""
    made = _origins(node, FAR)
    return made is not None and all(n.meta.get("parameter") for n in made if n.op == "placeholder")


def _origins(node: fx.Node, limit: int) -> set[fx.Node] | None:
    """The nodes that a tensor is computed from; None where they are more than the limit."""
    made = set(islice(computed_from([node]), limit + 1))
    return made if len(made) <= limit else None
