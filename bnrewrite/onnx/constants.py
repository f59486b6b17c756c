"""What is computed from parameters and buffers alone is computed once, when the file is written.

Before:  scale = weight * rsqrt(running_var + eps); y = x * scale
After:   y = x * scale                                  scale: a stored tensor
Leaves alone: large results of smaller tensors, and views of large tensors, which would be stored
twice; what is made of numbers alone, but for float64, which the exporter rounds to float32 there;
random numbers.

Operations run in the user's own dtypes, so each constant is bit for bit what the model computes.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    TensorArgument,
)

from bnrewrite.algebra.calls import is_tensor

SMALL = 4096  # elements up to which a value may be stored beside a smaller one it is made of


def fold_constants(program: ExportedProgram) -> ExportedProgram:
    """The program with constants in the place of what is computed from stored tensors.

    Tensors that passes have left on the graph's module become constants of the program. Stored
    tensors that nothing uses any more are dropped from it.
    """
    graph = program.graph
    constants = dict(program.constants)
    added: dict[str, str] = {}
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        value = getattr(program.graph_module, str(node.target), None)
        if isinstance(value, torch.Tensor):  # a pass has computed it
            target = _free_name(str(node.target), program, constants)
            constants[target] = value
            added[_placeholder(graph, node, target, value).name] = target
            graph.erase_node(node)
    cones = _Cones(graph)
    for node, value in cones.values().items():
        target = _free_name(f"{cones.name(node)}_folded", program, constants)
        constants[target] = value
        added[_placeholder(graph, node, target, value).name] = target
    graph.eliminate_dead_code()
    for node in [n for n in graph.nodes if n.op == "placeholder" and "value" in n.meta]:
        if not node.users:
            graph.erase_node(node)
    return _with_signature(program, constants, added)


class _Cones:
    """Which nodes are made of stored tensors and numbers alone, and their values."""

    def __init__(self, graph: fx.Graph) -> None:
        self.leaves: dict[fx.Node, dict[fx.Node, None]] = {}
        self._computed: set[fx.Node] = set()
        for node in graph.nodes:
            if node.op == "placeholder" and "value" in node.meta:
                self.leaves[node] = {node: None}
            elif _is_pure(node) and all(each in self.leaves for each in node.all_input_nodes):
                self._add(node)

    def _add(self, node: fx.Node) -> None:
        leaves = {leaf: None for each in node.all_input_nodes for leaf in self.leaves[each]}
        computed = not _is_view(node) or any(n in self._computed for n in node.all_input_nodes)
        size = _elements(node.meta.get("val"))
        most = sum(_elements(leaf.meta["val"]) or 0 for leaf in leaves) if computed else 0
        if size is None or size > max(most, SMALL):
            return
        self.leaves[node] = leaves
        if computed:
            self._computed.add(node)

    def frontier(self) -> list[fx.Node]:
        """Computed nodes whose value is used by others than such nodes."""
        return [
            node
            for node in self.leaves
            if node.op == "call_function"
            and (self.leaves[node] or _is_of_wide_numbers(node))
            and isinstance(node.meta["val"], torch.Tensor)
            and any(user not in self.leaves for user in node.users)
        ]

    def name(self, node: fx.Node) -> str:
        """That of the first stored tensor that a node is made of."""
        return next((str(leaf.meta["path"]) for leaf in self.leaves[node]), node.name)

    def values(self) -> dict[fx.Node, torch.Tensor]:
        """What the frontier's nodes compute, on the stored tensors."""
        frontier = self.frontier()
        needed = set(frontier)
        for node in reversed(self.leaves):
            if node in needed:
                needed.update(node.all_input_nodes)
        made: dict[fx.Node, Any] = {}
        with torch.no_grad():
            for node in self.leaves:
                if node.op == "placeholder":
                    made[node] = node.meta["value"].detach()
                elif node in needed:
                    args, kwargs = fx.map_arg((node.args, node.kwargs), made.__getitem__)
                    made[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return {node: made[node] for node in frontier}


def _is_pure(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return True
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and not target._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in target.tags
    )


def _is_of_wide_numbers(node: fx.Node) -> bool:
    value = node.meta["val"]
    is_wide = isinstance(value, torch.Tensor) and value.dtype == torch.float64
    return is_wide and node.target is torch.ops.aten.full.default


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.target is operator.getitem or (
        schema is not None and any(each.alias_info is not None for each in schema.returns)
    )


def _elements(value: Any) -> int | None:
    """How many elements a value has, all tensors of a tuple together; None where it varies."""
    if isinstance(value, torch.Tensor):
        sizes = value.shape
        return None if any(not isinstance(s, int) for s in sizes) else value.numel()
    if isinstance(value, Sequence):
        counts = [_elements(each) for each in value]
        return None if any(c is None for c in counts) else sum(c for c in counts if c is not None)
    return None


def _free_name(wanted: str, program: ExportedProgram, constants: dict[str, Any]) -> str:
    name, count = wanted, 1
    while name in program.state_dict or name in constants:
        count += 1
        name = f"{wanted}_{count}"
    return name


def _placeholder(graph: fx.Graph, node: fx.Node, target: str, value: torch.Tensor) -> fx.Node:
    """A stored tensor in the place of a node: in front of the first input of the user's."""
    first = next(n for n in graph.nodes if n.op != "placeholder" or "value" not in n.meta)
    mode = detect_fake_mode([n.meta.get("val") for n in graph.nodes])
    with graph.inserting_before(first):
        made = graph.placeholder(f"c_{target.replace('.', '_')}")
    contiguous = value.contiguous()
    made.meta = {
        "val": contiguous if mode is None else mode.from_tensor(contiguous, static_shapes=True),
        "value": contiguous,
        "path": target,
    }
    node.replace_all_uses_with(made)
    return made


def _with_signature(
    program: ExportedProgram, constants: dict[str, Any], added: dict[str, str]
) -> ExportedProgram:
    """A program around the changed graph, with inputs and outputs as the graph has them."""
    graph, old = program.graph, program.graph_signature
    known = {given.arg.name: given for given in old.input_specs}
    inputs = [
        known.get(node.name)
        or InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(node.name), added[node.name])
        for node in graph.nodes
        if node.op == "placeholder"
    ]
    results = next(iter(reversed(graph.nodes))).args[0]
    outputs = [
        replace(spec, arg=TensorArgument(value.name)) if is_tensor(value) else spec
        for spec, value in zip(old.output_specs, results, strict=True)
    ]
    kept = {given.target for given in inputs}
    program.graph_module.recompile()
    return ExportedProgram(
        root=program.graph_module,
        graph=graph,
        graph_signature=ExportGraphSignature(inputs, outputs),
        state_dict={name: v for name, v in program.state_dict.items() if name in kept},
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants={name: v for name, v in constants.items() if name in kept},
        verifiers=program.verifiers,
    )
