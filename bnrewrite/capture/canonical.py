"""Turn a Dynamo graph into the canonical form: functional ATen before autograd.

Canonical means one spelling for everything that PyTorch itself already knows to be equal: methods,
operators and `torch.*` functions are ATen overloads, updates in place are new values, every node
carries a fake tensor (`meta["val"]`) and the user's line (`meta["stack_trace"]`). Autograd has not
been traced: a rewritten graph is differentiated like the user's code. Gradient modes inside the
graph are `torch._C._set_grad_enabled` nodes.

Nothing is computed: the graph is traced with the fake tensors that Dynamo left on its placeholders,
never with the example inputs, which may be the user's live buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._functorch.aot_autograd import aot_export_module
from torch.fx.traceback import preserve_node_meta

from bnrewrite.capture.aliases import gains_history, refuse_views_of_updated_inputs
from bnrewrite.capture.autocast import make_casts_explicit
from bnrewrite.capture.detached import detached_updates
from bnrewrite.capture.interpreter import Interpreted
from bnrewrite.capture.opaque import opaque_nodes
from bnrewrite.capture.provenance import restore_provenance
from bnrewrite.capture.rebinding import Rebinding
from bnrewrite.capture.refusal import CaptureError, Inexact, Untraceable, sentence
from bnrewrite.capture.scalars import scalars_allowed
from bnrewrite.capture.sources import Kind, locate

if TYPE_CHECKING:
    from bnrewrite.findings import Noticed

_INEXACT = (torch.ops.aten.as_strided_scatter.default, torch.ops.aten.unfold_backward.default)


@dataclass(frozen=True)
class Input:
    """One placeholder of the canonical graph, in order.

    `attribute` is a tensor that hangs on a module without being registered. `path` is the
    qualified name ("bn1.running_mean") of a parameter, buffer or attribute where it is known.
    """

    name: str
    kind: Kind
    path: str | None


@dataclass
class Canonical:
    """A functional, pre-autograd ATen graph.

    Outputs 0..len(mutated)-1 of `module` are the new values of the placeholders named in
    `mutated`; the remaining outputs are the user's, in Dynamo's order. `rebound` is the subset of
    `mutated` that the user's code rebound (`self.b = ...`) instead of updating in place; a rebound
    value is no output of the user's any more. `noticed` is what a pass found to be wrong with it.
    """

    module: fx.GraphModule
    inputs: tuple[Input, ...]
    mutated: tuple[str, ...]
    rebound: tuple[str, ...]
    grad_enabled: bool
    noticed: Noticed | None = None


def canonicalise(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any] = (),
    rebindings: Sequence[Rebinding] = (),
) -> Canonical:
    """Trace a Dynamo graph into its canonical form.

    Args:
        graph_module: what Dynamo hands to a backend; placeholders carry `meta["example_value"]`.
        example_inputs: what Dynamo hands to a backend beside it; asked for `requires_grad` only.
        rebindings: outputs that are new values of buffers, from `find_rebindings`.

    Raises:
        CaptureError: the graph has no canonical form; nothing was changed.
    """
    placeholders = _placeholders(graph_module)
    refuse_views_of_updated_inputs(graph_module)
    fakes = _fake_inputs(placeholders, example_inputs)
    constants = _tensor_constants(graph_module)
    for reason in opaque_nodes(graph_module.graph, torch.is_grad_enabled()).values():
        raise CaptureError(reason)
    detached = detached_updates(graph_module.graph, torch.is_grad_enabled())
    interpreted = Interpreted(graph_module, constants, detached)
    try:
        with preserve_node_meta(), scalars_allowed(fakes):
            traced, signature = aot_export_module(
                interpreted, fakes, trace_joint=False, pre_dispatch=True
            )
    except Exception as error:
        raise Untraceable(sentence(error), interpreted.reached) from error
    module = _checked(traced, signature, placeholders)
    _refuse_inexact(module.graph, graph_module.graph)
    _restore_constants(module, constants)
    make_casts_explicit(module.graph)
    _drop_assertions(module.graph)
    restore_provenance(module)
    updated = list(signature.user_inputs_to_mutate.values())
    _refuse_differentiated(updated, module, fakes)
    renamed, inputs = _name_placeholders(module, placeholders)
    for node, fake in zip(_placeholders(module), fakes, strict=True):
        node.meta["requires_grad"] = isinstance(fake, torch.Tensor) and fake.requires_grad
    rebound = _lead_with_rebound_values(module, len(updated), rebindings)
    names = {node.name: input.name for node, input in zip(placeholders, inputs, strict=True)}
    module.recompile()
    return Canonical(
        module=module,
        inputs=inputs,
        mutated=(*(renamed[name] for name in updated), *(names[name] for name in rebound)),
        rebound=tuple(names[name] for name in rebound),
        grad_enabled=torch.is_grad_enabled(),
    )


def _fake_inputs(placeholders: Sequence[fx.Node], example_inputs: Sequence[Any]) -> list[Any]:
    """The placeholders' fake values as they were before the call.

    Dynamo has run the graph on these fakes: one that was updated in place by a value with autograd
    history carries that history now, and is detached from it.

    Raises:
        CaptureError: the call gives an input another number of dimensions or another dtype.
    """
    fakes = []
    for i, node in enumerate(placeholders):
        real = example_inputs[i] if i < len(example_inputs) else None
        fake = node.meta.get("example_value", real)
        if isinstance(fake, torch.Tensor) and isinstance(real, torch.Tensor):
            if gains_history(fake, real):
                fake = fake.detach()
            if fake.dtype != real.dtype or fake.dim() != real.dim():
                raise CaptureError(f"{node.name} gets a new shape or dtype")
        fakes.append(fake)
    return fakes


def _checked(traced: Any, signature: Any, placeholders: Sequence[fx.Node]) -> fx.GraphModule:
    if not isinstance(traced, fx.GraphModule):
        raise CaptureError(f"tracing gave a {type(traced).__name__} instead of a graph")
    if signature.buffers_to_mutate:
        raise CaptureError("the graph updates one of its tensor constants in place")
    found = len(_placeholders(traced))
    expected = len(placeholders) + len(signature.parameters) + len(signature.buffers)
    if found != expected:
        raise CaptureError(f"tracing gave {found} inputs for a graph with {expected}")
    return traced


def _refuse_inexact(traced: fx.Graph, users: fx.Graph) -> None:
    """Refuse an update in place of which PyTorch's functional form is not the same function.

    The gradient of `as_strided_scatter` is wrong (torch 2.13: `gradcheck` fails), and its value
    depends on how its input lies in memory. An update through `unfold` loses what is in no window.
    """
    originals = {node.name: node for node in users.nodes}
    for node in traced.nodes:
        if node.target in _INEXACT:
            steps: Any = node.meta.get("from_node")
            at = originals.get(steps[0].name) if steps else None
            raise Inexact("a value is updated in place through a view by strides or windows", at)


def _refuse_differentiated(
    updated: Sequence[str], module: fx.GraphModule, fakes: Sequence[Any]
) -> None:
    """Refuse an update of an input that requires a gradient: its history is part of the result."""
    for node, fake in zip(_placeholders(module), fakes, strict=True):
        if node.name in updated and fake.requires_grad:
            raise CaptureError("an input that requires a gradient is updated in place")


def _placeholders(module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.op == "placeholder"]


def _tensor_constants(graph_module: fx.GraphModule) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            value: Any = graph_module
            for part in node.target.split("."):
                value = getattr(value, part)
            if isinstance(value, torch.Tensor):
                found[node.target] = value
    return found


def _drop_assertions(graph: fx.Graph) -> None:
    """Tracing asserts the dtype of what it casts; Dynamo's guards know it already."""
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)


def _restore_constants(module: fx.GraphModule, constants: dict[str, torch.Tensor]) -> None:
    """Make the leading placeholders attributes again, as they were in the Dynamo graph."""
    lifted = _placeholders(module)[: len(constants)]
    for i, (node, constant) in enumerate(zip(lifted, constants.values(), strict=True)):
        module.register_buffer(f"_constant_{i}", constant)
        with module.graph.inserting_after(node):
            attribute = module.graph.get_attr(f"_constant_{i}")
        attribute.meta = dict(node.meta)
        node.replace_all_uses_with(attribute)
        module.graph.erase_node(node)


def _name_placeholders(
    module: fx.GraphModule, placeholders: Sequence[fx.Node]
) -> tuple[dict[str, str], tuple[Input, ...]]:
    """Name placeholders by what they are: `bn1_running_mean`, `input_0`; sizes keep theirs."""
    nodes = _placeholders(module)
    renamed: dict[str, str] = {}
    inputs: list[Input] = []
    for node, placeholder in zip(nodes, placeholders, strict=True):
        kind, path = locate(placeholder)
        old = node.name
        if path is not None:
            wanted = path.replace(".", "_")
            node._rename(f"_{wanted}" if wanted[:1].isdigit() else wanted)
        elif isinstance(node.meta.get("val"), torch.Tensor):
            node._rename(f"input_{sum(input.kind == 'input' for input in inputs)}")
        else:
            node._rename(placeholder.name)
        node.target = renamed[old] = node.name
        inputs.append(Input(node.name, kind, path))
    return renamed, tuple(inputs)


def _lead_with_rebound_values(
    module: fx.GraphModule, updated: int, rebindings: Sequence[Rebinding]
) -> list[str]:
    """Move the outputs that are new values of buffers behind the `updated` leading ones."""
    output = next(node for node in module.graph.nodes if node.op == "output")
    values = list(output.args[0])
    leading, users = values[:updated], values[updated:]
    moved = {rebinding.output for rebinding in rebindings}
    leading += [users[rebinding.output] for rebinding in rebindings]
    kept = [value for i, value in enumerate(users) if i not in moved]
    output.args = (tuple(leading + kept),)
    return [rebinding.placeholder for rebinding in rebindings]
