"""Find the buffers that a traced call binds to a new tensor: `self.running_mean = ...`.

Dynamo keeps such an assignment: the new value is one more output of the graph, and the attribute is
set after the call. Which output belongs to which buffer is read from Dynamo's own record of side
effects, while the graph is being compiled; nothing is guessed from the formula.

Only an assignment that nobody can tell from an update in place is returned: the new value goes
nowhere else (is not returned, kept in a list, stored in a second attribute, alive across a graph
break), nor does the old tensor, and shape, dtype and device stay. Any other stays the user's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from bnrewrite.capture.aliases import outputs_of
from bnrewrite.capture.sources import locate, name_of, source_name
from bnrewrite.walks import computed_from

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rebinding:
    """Output number `output` of a Dynamo graph is the new value of the buffer `placeholder`.

    `history` tells whether the new value carries autograd history.
    """

    output: int
    placeholder: str
    history: bool


def find_rebindings(graph_module: fx.GraphModule) -> tuple[Rebinding, ...]:
    """The rebindings of buffers in the graph that Dynamo is compiling now.

    Returns nothing where Dynamo is not compiling, or where a release of torch keeps its record
    elsewhere: the assignments then stay as the user wrote them.
    """
    try:
        stores = list(_stores())
        escaping = _escaping(stores)
    except Exception:  # a private record: any change of torch's must leave the user's code as it is
        logger.debug("Dynamo's side effects could not be read", exc_info=True)
        return ()
    by_source = {
        source_name(node): node for node in graph_module.graph.nodes if node.op == "placeholder"
    }
    outputs = outputs_of(graph_module)
    found = []
    for store in stores:
        buffer, places = by_source.get(store.buffer), _places(store.node, outputs)
        if buffer is None or len(places) != 1:
            continue
        if not escaping.isdisjoint((store.value, store.buffer, buffer.name)):
            continue
        value = outputs[places[0]]
        if _is_replaceable(buffer.meta.get("example_value"), value.meta.get("example_value")):
            history = bool(value.meta["example_value"].requires_grad)
            found.append(Rebinding(places[0], buffer.name, history))
    return tuple(found)


def _places(node: fx.Node, outputs: Sequence[Any]) -> list[int]:
    """The outputs that are a node of Dynamo's graph.

    Under DDP Dynamo may cut its graph into one per bucket of gradients, with nodes of other names
    and the same fake values. A value that another of these graphs reads too is none of the outputs.
    """
    value = node.meta.get("example_value")
    alike = [
        i
        for i, each in enumerate(outputs)
        if isinstance(each, fx.Node)
        and value is not None
        and each.meta.get("example_value") is value
        and _readers(each) == _readers(node)
    ]
    named = [i for i in alike if outputs[i].name == node.name]
    return named if len(alike) > 1 else alike


def _readers(node: fx.Node) -> int:
    return sum(user.op != "output" for user in node.users)


def find_attribute_updates(graph_module: fx.GraphModule) -> tuple[tuple[str, fx.Node], ...]:
    """Plain tensor attributes of modules that are bound to a value computed from their old one.

    Returns:
        The qualified name of each attribute, and the node of its new value.
    """
    try:
        effects = _translator().output.side_effects
        stored = [
            (f"{name_of(owner.source)}.{name}", _node(value))
            for owner, attributes in effects.store_attr_mutations.items()
            for name, value in attributes.items()
        ]
    except Exception:  # a private record: any change of torch's must leave the user's code as it is
        logger.debug("Dynamo's side effects could not be read", exc_info=True)
        return ()
    nodes = {node.name: node for node in graph_module.graph.nodes}
    values = {name: node.meta.get("example_value") for name, node in nodes.items()}
    old = {source_name(node): node for node in nodes.values() if node.op == "placeholder"}
    return tuple(
        (locate(old[source])[1] or source, nodes[value.name])
        for source, value in stored
        if source in old
        and value is not None
        and value.name in nodes
        and values[value.name] is value.meta.get("example_value")  # not of a part of the graph
        and old[source] in computed_from(nodes[value.name].all_input_nodes)
    )


@dataclass(frozen=True)
class _Store:
    buffer: str  # name of the buffer's source, "L['self']._buffers['running_mean']"
    node: fx.Node  # of Dynamo's graph: what is assigned
    registry: Any  # the variable of the `_buffers` dictionary

    @property
    def value(self) -> str:
        return self.node.name


def _stores() -> Iterator[_Store]:
    """Each `_buffers[name] = <graph node>` among Dynamo's side effects."""
    effects = _translator().output.side_effects
    for variable in list(effects.id_to_variable.values()):
        source = name_of(variable.source)
        if source is None or not source.endswith("._buffers") or not effects.is_modified(variable):
            continue
        for key, value in variable.items.items():
            node = _node(value)
            if node is not None and node.op != "placeholder":
                name = getattr(key, "vt", key).as_python_constant()
                yield _Store(f"{source}[{name!r}]", node, variable)


def _escaping(stores: Iterable[_Store]) -> set[str]:
    """Nodes and sources, by name, that leave the call otherwise than through one of `stores`."""
    from torch._dynamo.variables.base import VariableTracker

    effects = _translator().output.side_effects
    registries = {id(store.registry): store.registry for store in stores}
    escaping: set[str] = set()

    def note(variable: Any) -> None:
        node = _node(variable)
        source = name_of(getattr(variable, "source", None))
        escaping.update({node.name} if node is not None else (), {source} if source else ())

    roots: list[Any] = [
        variable
        for variable in list(effects.id_to_variable.values())
        if id(variable) not in registries
        and _node(variable) is None  # a tensor is no place where another could be kept
        and effects.is_modified(variable)
    ]
    roots += [list(stored.values()) for stored in effects.store_attr_mutations.values()]
    translator: Any = _translator()
    while translator is not None:
        roots += [list(translator.stack), dict(translator.symbolic_locals)]
        translator = translator.parent
    VariableTracker.visit(note, roots, cache=dict(registries))
    for registry in registries.values():
        for key, value in registry.items.items():
            name = getattr(key, "vt", key).as_python_constant()
            source = name_of(getattr(value, "source", None))
            if source is not None and source != f"{name_of(registry.source)}[{name!r}]":
                note(value)  # the old tensor of one buffer is the new one of another
    stored = [store.value for store in stores]
    return escaping | {name for name in stored if stored.count(name) > 1}


def _translator() -> Any:
    from torch._dynamo.symbolic_convert import InstructionTranslator

    return InstructionTranslator.current_tx()


def _node(variable: Any) -> fx.Node | None:
    """The graph node behind one of Dynamo's variables, without realising a lazy one."""
    realized = getattr(variable, "is_realized", None)
    if realized is not None:
        if not realized():
            return None
        variable = variable.unwrap()
    node = getattr(getattr(variable, "proxy", None), "node", None)
    return node if isinstance(node, fx.Node) else None


def _is_replaceable(old: Any, new: Any) -> bool:
    """Whether `old.copy_(new)` leaves what `old = new` would."""
    return (
        isinstance(old, torch.Tensor)
        and isinstance(new, torch.Tensor)
        and old is not new  # updated in place already
        and not old.requires_grad
        and old.dtype == new.dtype
        and old.device == new.device
        and old.layout == new.layout == torch.strided
        and old.dim() == new.dim()
        and all(statically_known_true(a == b) for a, b in zip(old.shape, new.shape, strict=True))
    )
