"""A user's model as an exported program in canonical form: functional ATen, casts explicit.

Before:  a module in evaluation mode, or a function, and example arguments
After:   an `ExportedProgram` whose graph updates nothing and holds no modes
Leaves alone: the model; what is traced is a twin that shares its parameters and buffers. What is a
program already is taken as it is.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils._pytree import tree_map_only, tree_structure

from bnrewrite import doors
from bnrewrite.capture.canonical import Canonical, Input
from bnrewrite.capture.optimize import check_model, unwrapped
from bnrewrite.capture.sources import Kind
from bnrewrite.doors.entry import Given, is_given

from .refusal import ExportError, in_a_line

_KINDS: dict[InputKind, Kind] = {
    InputKind.PARAMETER: "parameter",
    InputKind.BUFFER: "buffer",
    InputKind.CONSTANT_TENSOR: "attribute",
    InputKind.USER_INPUT: "input",
}
_STATE = (
    "the model changes '{}' when it is called in evaluation mode; an ONNX file has no state: "
    "return the new value as an output and take the old one as an input, or change it in training "
    "mode only, and call model.eval() before it is exported"
)
_ASSIGNED = "assigned during export"  # of torch.export's warning
_ATTRIBUTE = re.compile(r"self\.([\w.]+)")


def opened(
    model: Callable[..., Any] | Given,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dynamic_shapes: Any,
) -> tuple[Callable[..., Any], ExportedProgram]:
    """What Python calls of a model, in whatever form it came, and its program.

    Raises:
        TypeError: the model is of another kind, or has its own dynamic sizes.
        FileNotFoundError, ArchiveError: a file is not there, or is not loaded.
        ExportError: as `traced`; a program has no arguments of its own, and none are given.
    """
    if not is_given(model):
        users: Any = model
        return unwrapped(users), traced(users, args, kwargs, dynamic_shapes)
    found = doors.open(model)
    if found.program is None:
        return found.module, traced(found.module, args, kwargs, dynamic_shapes)
    if dynamic_shapes is not None:
        raise TypeError("an exported program has its own sizes: leave dynamic_shapes out")
    program = copy.copy(found.program)
    if args or kwargs:
        given, wanted = tree_structure((args, dict(kwargs))), program.call_spec.in_spec
        if given != wanted:
            raise ExportError(f"the program takes arguments like {wanted}, given are {given}")
        program.example_inputs = args, dict(kwargs)
    if program.example_inputs is None:
        raise ExportError("the program was saved without arguments of a call: give args")
    return found.module, program


def traced(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dynamic_shapes: Any,
) -> ExportedProgram:
    """Trace a model once, without running it.

    Args:
        model: a module in evaluation mode, or a function.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        dynamic_shapes: as `torch.export.export` takes them; a name stands for a dynamic size.

    Raises:
        TypeError: the model is neither a module nor a function.
        ExportError: it is in training mode, or cannot be traced.
    """
    check_model(model, "export_onnx")
    subject = unwrapped(model)
    _refuse_training(subject)
    shapes = tree_map_only(str, lambda _: Dim.DYNAMIC, dynamic_shapes)
    try:
        with torch.no_grad(), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            program: ExportedProgram = torch.export.export(
                _twin(subject), args, dict(kwargs), dynamic_shapes=shapes, strict=False
            )
    except Exception as error:  # whatever a user's code raises, or torch.export at it
        raise ExportError(f"torch.export cannot trace the model: {_told(error)}") from error
    _refuse_assigned(program, [str(each.message) for each in told])
    return program


def functional(program: ExportedProgram) -> ExportedProgram:
    """A traced program in canonical form.

    Raises:
        ExportError: it updates its state or an input.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: ExportedProgram = program.run_decompositions({})
    _refuse_updates(found)
    return found


def canonical(program: ExportedProgram) -> Canonical:
    """The graph of a program as the passes take it; the graph is shared, not copied.

    Placeholders of parameters, buffers and constants carry their tensor in `meta["value"]`.
    """
    inputs: list[Input] = []
    values = stored_values(program)
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    for node, given in zip(placeholders, program.graph_signature.input_specs, strict=True):
        kind = _KINDS.get(given.kind, "input")
        inputs.append(Input(node.name, kind, None if kind == "input" else given.target))
        if node.name in values:
            node.meta["value"] = values[node.name]
    _drop_detached(program.graph)
    return Canonical(program.graph_module, tuple(inputs), (), (), grad_enabled=False)


def stored_values(program: ExportedProgram) -> dict[str, torch.Tensor]:
    """Parameters, buffers and constants by the name of their placeholder."""
    found: dict[str, torch.Tensor] = {}
    for given in program.graph_signature.input_specs:
        value = program.state_dict.get(given.target or "", None)
        if value is None:
            value = program.constants.get(given.target or "", None)
        if isinstance(value, torch.Tensor) and given.kind != InputKind.USER_INPUT:
            found[given.arg.name] = value
    return found


def _told(error: Exception) -> str:
    """An error in a line, with the points that it lists: sizes that are not as dynamic as told."""
    points = [line.strip() for line in str(error).splitlines() if line.strip().startswith("- ")]
    if "0/1 specialized" in str(error):
        points.append("Give an example whose varying sizes are 2 or more.")
    return " ".join([in_a_line(error), *points[:3]])


def _refuse_training(model: Any) -> None:
    if not isinstance(model, nn.Module):
        return
    training = [name for name, each in model.named_modules() if each.training]
    if training:
        named = f"its module {training[0]!r}" if training[0] else "the model"
        raise ExportError(
            f"{named} is in training mode, in which norms update their statistics and dropout "
            "is random: call model.eval() before export_onnx"
        )


def _refuse_assigned(program: ExportedProgram, told: Sequence[str]) -> None:
    """Refuse a model that reads a tensor attribute and sets it anew: that is state as well.

    torch.export warns of all that are set, and has those that are read among its constants.
    """
    assigned = {name for each in told if _ASSIGNED in each for name in _ATTRIBUTE.findall(each)}
    for name in program.constants:
        if name in assigned:
            raise ExportError(_STATE.format(name))


def _refuse_updates(program: ExportedProgram) -> None:
    for each in program.graph_signature.output_specs:
        if each.kind in (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION):
            raise ExportError(_STATE.format(each.target))
        if each.kind == OutputKind.USER_INPUT_MUTATION:
            raise ExportError(
                f"the model writes to its input {each.target!r}, which an ONNX file cannot: "
                "work on a copy of it"
            )


class _Function(nn.Module):
    """A function as a module, which is what torch.export takes."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.forward = function


def _twin(model: Any) -> nn.Module:
    """A copy of a module's Python state that shares its tensors; tracing may set attributes."""
    if not isinstance(model, nn.Module):
        return _Function(model)
    shared = {id(each): each for each in (*model.parameters(), *model.buffers())}
    try:
        return copy.deepcopy(model, dict(shared))
    except Exception:  # an attribute that cannot be copied: tracing itself changes no tensor
        return model


def _drop_detached(graph: torch.fx.Graph) -> None:
    """Nothing is differentiated here: `detach` is its argument."""
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.detach.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
