"""From an exported program to an ONNX model, through PyTorch's own exporter."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import onnx_ir as ir
import torch
from torch import fx
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import ConstantArgument, ExportGraphSignature, OutputKind
from torch.utils._pytree import (
    KeyEntry,
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_map,
    tree_unflatten,
)

from .older import write_as_17
from .refusal import ExportError, in_a_line
from .tidy import tidy
from .translation import translation_table

LEAST = 18  # the opset that the exporter's own translations are written in


def translate(program: ExportedProgram, target: str, opset: int, dynamic_shapes: Any) -> ir.Model:
    """The ONNX model of a program.

    Args:
        program: with its norms rewritten.
        target: the provider that norms are written for.
        opset: of the model.
        dynamic_shapes: the user's; names in it become names of sizes.

    Raises:
        ExportError: an operation has no translation, or none in this opset.
    """
    try:
        with quiet():
            exported = torch.onnx.export(
                with_tensors_alone(program),
                dynamo=True,
                opset_version=max(opset, LEAST),
                custom_translation_table=translation_table(target, max(opset, LEAST)),
                dynamic_shapes=_names(dynamic_shapes),
                optimize=False,
                verbose=False,
            )
    except Exception as error:  # the exporter's own errors have no common base
        cause = error.__cause__ or error
        raise ExportError(f"torch.onnx cannot write the model: {in_a_line(cause)}") from error
    assert exported is not None
    model = exported.model
    inputs = [value.name for value in model.graph.inputs]
    with quiet():
        tidy(model)
    if opset < LEAST:
        write_as_17(model)
    assert model.opset_imports.get("") == opset, "the exporter was asked for this opset"
    _name(model, inputs, output_names(program))
    return model


def raw_model(program: ExportedProgram, opset: int) -> ir.Model:
    """What PyTorch's exporter makes of a program by itself, with its optimiser on."""
    with quiet():
        exported = torch.onnx.export(
            with_tensors_alone(program),
            dynamo=True,
            opset_version=max(opset, LEAST),
            verbose=False,
        )
    assert exported is not None
    return exported.model


def output_names(program: ExportedProgram) -> list[str | None]:
    """Names of the leaves of a model's result, by their place in it; None for what is no tensor.

    A single tensor is "output", a tuple "output_0", "output_1"; keys and fields are names.
    """
    signature = program.graph_signature
    results = signature.user_outputs
    spec = program.call_spec.out_spec
    assert spec is not None
    paths, _ = tree_flatten_with_path(tree_unflatten(list(range(spec.num_leaves)), spec))
    names: list[str | None] = []
    node_names = {node.name for node in program.graph.nodes}
    for (path, _), value in zip(paths, results, strict=True):
        names.append(_joined(path) if isinstance(value, str) and value in node_names else None)
    return names


def _joined(path: tuple[KeyEntry, ...]) -> str:
    words = ["".join(c if c.isalnum() else " " for c in keystr((key,))).split() for key in path]
    joined = "_".join(word for each in words for word in each)
    return joined if joined and not joined[0].isdigit() else f"output_{joined}".rstrip("_")


def _name(model: ir.Model, inputs: list[str | None], outputs: list[str | None]) -> None:
    """Give inputs and outputs these names, and what has one of them inside another."""
    ports = list(zip(model.graph.inputs, map(str, inputs), strict=True))
    names = {name for _, name in ports} | set(model.graph.initializers)
    for value, name in zip(model.graph.outputs, (n for n in outputs if n), strict=True):
        free = name
        while free in names:
            free = f"{free}_"
        names.add(free)
        ports.append((value, free))
    for value, name in ports:
        value.name = f"{name} "  # until all have their own
    wanted = {name for _, name in ports}
    for value in _values(model):
        if value.name in wanted:
            value.name = f"{value.name}_inner"
    for value, name in ports:
        value.name = name


def with_tensors_alone(program: ExportedProgram) -> ExportedProgram:
    """The program without the numbers, strings and None in its result: a file has tensors."""
    signature = program.graph_signature
    if not any(isinstance(each.arg, ConstantArgument) for each in signature.output_specs):
        return program
    graph = copy.deepcopy(program.graph)
    output = next(iter(reversed(graph.nodes)))
    pairs = list(zip(signature.output_specs, output.args[0], strict=True))
    pairs = [(spec, value) for spec, value in pairs if not isinstance(spec.arg, ConstantArgument)]
    output.args = (tuple(value for _, value in pairs),)
    user = [spec for spec, _ in pairs if spec.kind == OutputKind.USER_OUTPUT]
    (call, *others) = program.module_call_graph
    assert call.signature is not None
    _, spec = tree_flatten(tuple(range(len(user))))
    plain = replace(call.signature, out_spec=spec, outputs=[each.arg for each in user])
    return ExportedProgram(
        root=fx.GraphModule(program.graph_module, graph),
        graph=graph,
        graph_signature=ExportGraphSignature(signature.input_specs, [spec for spec, _ in pairs]),
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=[replace(call, signature=plain), *others],
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        yield from node.outputs


def _names(dynamic_shapes: Any) -> Any:
    """The user's names of sizes where they are, None elsewhere; None where there are no names."""

    def name(size: Any) -> str | None:
        if isinstance(size, str):
            return size
        return size.__name__ if type(size) is Dim else None

    named = tree_map(name, dynamic_shapes)
    return named if any(isinstance(each, str) for each in tree_leaves(named)) else None


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages that are not there."""
    levels = {"torch.onnx": logging.ERROR, "onnx_ir": logging.ERROR, "onnxscript": logging.CRITICAL}
    loggers = {logging.getLogger(name): level for name, level in levels.items()}
    before = {logger: logger.level for logger in loggers}
    for logger, level in loggers.items():
        logger.setLevel(level)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in before.items():
            logger.setLevel(level)
