"""An exported program with its norms replaced, and an exported program again.

The program's graph is written as a graph of Dynamo's would be, goes through the same capture and
the same passes for the stage "export" (operators of PyTorch alone), and is put back behind the
signature of the program: state, names of inputs, dynamic sizes and constraints stay. What the
graph updates is in the signature afterwards, as a new value of a buffer or of an input, also where
the program updated it in place.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx
from torch._export.passes.replace_set_grad_with_hop_pass import replace_set_grad_with_hop_pass
from torch._guards import detect_fake_mode
from torch.export import ExportedProgram
from torch.export.graph_signature import InputSpec, OutputSpec, TensorArgument
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from bnrewrite.capture.aliases import outputs_of
from bnrewrite.capture.backend import rewritten_graph
from bnrewrite.capture.look import Look, examine, left
from bnrewrite.capture.refusal import sentence
from bnrewrite.capture.writeback import drop_idle_modes
from bnrewrite.doors.wrapped import UPDATES, any_size, users_graph
from bnrewrite.options import Options, Stage

_TRAINING = "TRAINING"  # the dialect in which a graph may update in place


def examine_program(program: ExportedProgram, options: Options) -> Look:
    """What is found in a program, and its graph rewritten; the program stays as it is."""
    look, assumed = look_at(program, options, "export")
    if assumed:
        return left(look, "with it replaced the program would take fewer sizes than it does")
    if look.canonical is None and look.is_changed and program.dialect != _TRAINING:
        return left(look, "a program for inference cannot be put together from parts")
    return look


def look_at(
    program: ExportedProgram, options: Options, stage: Stage
) -> tuple[Look, tuple[Any, ...]]:
    """What is found in a program, and which sizes have to be equal for that.

    Sizes that the program itself wants to be equal are not among them. What a trace asks beside,
    whether a size is 1 or below 16, decides how operators are computed and not what they compute:
    decisions of the user's code were taken when the program was exported.
    """
    environment = environment_of(program)
    count = 0 if environment is None else len(environment.guards)
    replaced = {} if environment is None else dict(environment.replacements)
    with any_size():
        look = _look(program, replace(options, stage=stage))
    if environment is None:
        return look, ()
    relations = [guard.expr for guard in environment.guards[count:]]
    assumed = [each for each in relations if each.has(sympy.Eq)]
    del environment.guards[count:]  # a program made from these values would ask for them
    assumed += [
        sympy.Eq(symbol, value, evaluate=False)
        for symbol, value in environment.replacements.items()
        if symbol not in replaced
    ]
    return look, tuple(assumed)


def _look(program: ExportedProgram, options: Options) -> Look:
    try:
        graph, examples = users_graph(program)
    except Exception as error:  # the program stays as it is; the cause is told
        users = program.graph_module
        return Look(users, None, "", (), (), (), frozenset(), sentence(error))
    return examine(graph, examples, options)


def environment_of(program: ExportedProgram) -> ShapeEnv | None:
    """What is known of the symbols for sizes; None where there are none."""
    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"]
    return getattr(detect_fake_mode(values), "shape_env", None)


def rebuilt(program: ExportedProgram, look: Look) -> ExportedProgram:
    """The program with the graph of a look that has changed it; state is shared with it."""
    signature = copy.deepcopy(program.graph_signature)
    given = signature.input_specs
    updated: list[InputSpec] = []
    if look.canonical is None:
        module, around = rewritten_graph(look, differentiated_later=False)
        assert not around.inputs, "only a stage that differentiates has updates around its graph"
    else:
        module = look.canonical.module
        inputs = zip(look.canonical.inputs, given, strict=True)
        places = {each.name: spec for each, spec in inputs}
        updated = [places[name] for name in look.canonical.mutated]
        drop_idle_modes(module.graph, torch.is_grad_enabled())
    kept = _return_numbers(program, module, len(updated))
    module, _ = replace_set_grad_with_hop_pass(module, None)
    _name_inputs(module, program)
    values = outputs_of(module)
    signature.output_specs = [
        *map(_update, updated, values),
        *map(_named, kept, values[len(updated) :]),
    ]
    module.recompile()
    return program._update(module, signature)


def _return_numbers(program: ExportedProgram, module: fx.GraphModule, new: int) -> list[OutputSpec]:
    """Let a graph return, behind new values of inputs, what the program does: constants too.

    Returns:
        What the signature of the program says of these outputs.
    """
    specs = program.graph_signature.output_specs
    old: Any = program.graph.output_node().args[0]
    values = outputs_of(module)
    users = iter(values[new:])
    results, kept = values[:new], []
    for spec, was in zip(specs, old, strict=True):
        if spec.kind not in UPDATES.values():
            results.append(next(users) if isinstance(was, fx.Node) else was)
            kept.append(copy.copy(spec))
    module.graph.output_node().args = (tuple(results),)
    return kept


def _update(given: InputSpec, value: fx.Node) -> OutputSpec:
    """What the signature says of a new value of an input."""
    target = given.target if given.target is not None else given.arg.name
    return OutputSpec(UPDATES[given.kind], TensorArgument(value.name), target)


def _named(spec: OutputSpec, value: Any) -> OutputSpec:
    """What the signature says of a value of the user's, under its new name."""
    if isinstance(value, fx.Node):
        spec.arg = replace(spec.arg, name=value.name)
    return spec


def _name_inputs(module: fx.GraphModule, program: ExportedProgram) -> None:
    """Give the inputs their names in a program, and those that are numbers their values."""
    given = [node for node in program.graph.nodes if node.op == "placeholder"]
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    names = [each.name for each in given]
    for node in module.graph.nodes:
        if node.name in names:
            node._rename(f"{node.name}_value")
    for node, each in zip(placeholders, given, strict=True):
        node.name = node.target = each.name
        node.meta.setdefault("val", each.meta.get("val"))
