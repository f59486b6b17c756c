"""Which values of a graph share memory with an input that the graph updates in place."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import fx
from torch._C._functorch import is_functorch_wrapped_tensor

from bnrewrite.capture.refusal import CaptureError


def refuse_views_of_updated_inputs(graph_module: fx.GraphModule) -> None:
    """Refuse a Dynamo graph that returns a view of an input that it updates in place.

    Raises:
        CaptureError: as new values the two would no longer share their memory.
    """
    updated = {
        node.name: node.meta["example_value"]
        for node in graph_module.graph.nodes
        if node.op == "placeholder" and is_updated(node.meta.get("example_value"))
    }
    owners = {storage_of(fake): name for name, fake in updated.items()}
    for node in outputs_of(graph_module):
        value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
        owner = owners.get(storage_of(value)) if isinstance(value, torch.Tensor) else None
        if owner is not None and value is not updated[owner]:
            raise CaptureError(
                f"{node.name} is returned as a view of {owner}, which is updated in place"
            )


def returned_inputs(graph_module: fx.GraphModule) -> dict[int, str]:
    """Outputs of a Dynamo graph that are one of its inputs itself, updated in place or not."""
    placeholders = {
        id(node.meta["example_value"]): node.name
        for node in graph_module.graph.nodes
        if node.op == "placeholder" and isinstance(node.meta.get("example_value"), torch.Tensor)
    }
    return {
        i: placeholders[id(node.meta["example_value"])]
        for i, node in enumerate(outputs_of(graph_module))
        if isinstance(node, fx.Node) and id(node.meta.get("example_value")) in placeholders
    }


def outputs_of(graph_module: fx.GraphModule) -> list[Any]:
    """What a graph returns, in order."""
    output = next(node for node in graph_module.graph.nodes if node.op == "output")
    return list(output.args[0])


def is_updated(fake: Any) -> TypeGuard[torch.Tensor]:
    """Whether Dynamo has seen an update in place of the value behind `fake`."""
    return isinstance(fake, torch.Tensor) and fake._version > 0


def gains_history(fake: Any, real: Any) -> bool:
    """Whether a value has autograd history after the call, by an update, and had none before."""
    return (
        is_updated(fake)
        and fake.requires_grad
        and isinstance(real, torch.Tensor)
        and not real.requires_grad
    )


def storage_of(value: Any) -> int | None:
    """The identity of a tensor's memory; None for what is no tensor or has no memory."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return None
    if is_functorch_wrapped_tensor(value):
        return None
    return int(value.untyped_storage()._cdata)
