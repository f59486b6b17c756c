"""A program's graph in the form in which Dynamo would give it.

Before:  %y = wrap_with_set_grad_enabled(False, graph, %x)
After:   _set_grad_enabled(False); the nodes of that graph; _set_grad_enabled(True)
Leaves alone: operations that hold graphs for another reason (cond, checkpointing).
"""

from __future__ import annotations

import operator
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._higher_order_ops.wrap import wrap_with_autocast
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.experimental import _config

from bnrewrite.capture.autocast import ENTER, EXIT, autocast_kept
from bnrewrite.capture.sources import ORIGIN, Kind
from bnrewrite.capture.targets import is_in_place
from bnrewrite.gradients import GRAD_MODE

_GRADIENTS = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST: Any = wrap_with_autocast
UPDATES = {
    InputKind.BUFFER: OutputKind.BUFFER_MUTATION,
    InputKind.PARAMETER: OutputKind.PARAMETER_MUTATION,
    InputKind.USER_INPUT: OutputKind.USER_INPUT_MUTATION,
}
_KINDS: dict[InputKind, Kind] = {InputKind.PARAMETER: "parameter", InputKind.BUFFER: "buffer"}


def users_graph(program: ExportedProgram) -> tuple[fx.GraphModule, list[Any]]:
    """A copy of a program's graph with modes as nodes, and the values that stand for its inputs."""
    writing = _Writing()
    made: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        if node.op != "output":
            made[node] = writing.write(node, made)
    writing.end(*_results(program, made))
    graph = fx.GraphModule(writing.attributes, writing.graph)
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for node, given in zip(placeholders, program.graph_signature.input_specs, strict=True):
        kind = _KINDS.get(given.kind, "input")
        node.meta[ORIGIN] = kind, None if kind == "input" else given.target
    examples = _differentiated(placeholders)
    _run_on_fakes(graph, examples)
    return graph, examples


def any_size() -> Any:
    """Inside, tracing does not ask whether a size is 0 or 1 where it can do without."""
    config: Any = _config
    return config.patch(backed_size_oblivious=True)


def _results(
    program: ExportedProgram, made: dict[fx.Node, Any]
) -> tuple[list[tuple[fx.Node, fx.Node]], list[fx.Node]]:
    """What is updated by which value, and the values of the user's; numbers are no values."""
    signature = program.graph_signature
    inputs = [node for node in program.graph.nodes if node.op == "placeholder"]
    owners = {
        given.target if given.target is not None else node.name: made[node]
        for node, given in zip(inputs, signature.input_specs, strict=True)
    }
    updates, users = [], []
    values: Any = fx.map_arg(program.graph.output_node().args[0], made.__getitem__)
    for spec, value in zip(signature.output_specs, values, strict=True):
        if spec.kind in UPDATES.values():
            updates.append((owners[spec.target], value))
        elif isinstance(value, fx.Node):
            users.append(value)
    return updates, users


def _run_on_fakes(graph: fx.GraphModule, examples: list[Any]) -> None:
    """Note at each node what it gives: with the memory that it shares, as Dynamo would.

    The values that a program keeps are read from its file: there each has a memory of its own.
    """
    mode = detect_fake_mode(examples)
    enabled = torch.is_grad_enabled()
    modes = nullcontext() if mode is None else mode, enable_python_dispatcher()
    with modes[0], modes[1], autocast_kept(), torch.set_grad_enabled(enabled):
        _Noting(graph).run(*map(_another, examples))


def _differentiated(placeholders: list[fx.Node]) -> list[Any]:
    """The values that stand for inputs; those of the user's may be differentiated later.

    What the graph updates in place may not.
    """
    updated = {node for node in placeholders if any(map(is_in_place, node.users))}
    examples: list[Any] = [node.meta["val"] for node in placeholders]
    for place, node in enumerate(placeholders):
        value = examples[place]
        is_users = node.meta[ORIGIN][0] == "input" and isinstance(value, torch.Tensor)
        if is_users and value.is_floating_point() and node not in updated:
            examples[place] = value.detach().requires_grad_()
    return examples


def _another(example: Any) -> Any:
    """A fake tensor like another, with a memory of its own."""
    if not isinstance(example, torch.Tensor):
        return example
    return torch.empty_strided(
        example.shape,
        example.stride(),
        dtype=example.dtype,
        device=example.device,
        requires_grad=example.requires_grad,
    )


class _Noting(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op != "output":
            n.meta["example_value"] = value
        return value


class Results(tuple[Any, ...]):
    """What a held graph returns: its values are taken out one by one."""


class _Writing:
    """A graph in the making, in the gradient mode that holds where it has come to."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.attributes: dict[str, Any] = {}
        self.gradients = torch.is_grad_enabled()

    def write(self, node: fx.Node, made: dict[fx.Node, Any]) -> Any:
        """The value of a node, written down."""
        if node.target is _GRADIENTS:
            return self._with_gradients(node, made)
        if node.target is _AUTOCAST:
            return self._with_autocast(node, made)
        if node.op == "get_attr":
            return self._attribute(node)
        of_body = made.get(node.args[0]) if node.target is operator.getitem else None  # type: ignore[arg-type]
        if isinstance(of_body, Results):
            return of_body[node.args[1]]  # type: ignore[index]
        found = self.graph.node_copy(node, made.__getitem__)
        return self._placed(found, node)

    def end(self, updates: list[tuple[fx.Node, fx.Node]], users: list[fx.Node]) -> None:
        """Update in place what a graph without effects returns, and return the rest."""
        if updates:
            self.graph.call_function(GRAD_MODE, (False,))
            for owner, value in updates:
                self.graph.call_function(torch.ops.aten.copy_.default, (owner, value))
            self.graph.call_function(GRAD_MODE, (self.gradients,))
        self.graph.output(tuple(users))

    def _placed(self, found: fx.Node, node: fx.Node) -> fx.Node:
        stack = node.meta.get("nn_module_stack")
        if stack:  # as Dynamo writes the names of modules
            found.meta["nn_module_stack"] = {
                key: (f"L['self'].{path}" if path else "L['self']", kind)
                for key, (path, kind) in stack.items()
            }
        return found

    def _attribute(self, node: fx.Node) -> fx.Node:
        value: Any = node.graph.owning_module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        name = f"attribute_{len(self.attributes)}"
        self.attributes[name] = value
        return self._placed(self.graph.get_attr(name), node)

    def _with_gradients(self, node: fx.Node, made: dict[fx.Node, Any]) -> Any:
        enabled, body, *given = node.args
        before, self.gradients = self.gradients, bool(enabled)
        self.graph.call_function(GRAD_MODE, (self.gradients,))
        results = self._body(node, body, given, made)
        self.gradients = before
        self.graph.call_function(GRAD_MODE, (before,))
        return results

    def _with_autocast(self, node: fx.Node, made: dict[fx.Node, Any]) -> Any:
        device, dtype, enabled, caches, body, *given = node.args
        entered = self.graph.call_function(ENTER, (device, dtype, enabled, caches))
        results = self._body(node, body, given, made)
        self.graph.call_function(EXIT, (entered,))
        return results

    def _body(self, node: fx.Node, body: Any, given: list[Any], made: dict[fx.Node, Any]) -> Any:
        """The nodes of a graph that is held, in its place."""
        module: Any = node.graph.owning_module
        inside: dict[fx.Node, Any] = {}
        held: fx.GraphModule = getattr(module, str(body.target))
        values = iter(fx.map_arg(tuple(given), made.__getitem__))
        for each in held.graph.nodes:
            if each.op == "placeholder":
                inside[each] = next(values)
            elif each.op != "output":
                inside[each] = self.write(each, inside)
        returned = fx.map_arg(held.graph.output_node().args[0], inside.__getitem__)
        return Results(returned) if isinstance(returned, list | tuple) else returned
