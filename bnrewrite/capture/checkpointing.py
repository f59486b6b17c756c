"""Activation checkpointing: the graph inside, and the call as the user's code makes it.

Dynamo puts an operation in the place of `torch.utils.checkpoint.checkpoint` that is meant for a
compiler: run as it is, it restores no random state, so that a dropout inside is drawn anew for the
backward, and it computes all of the forward again where the user's call stops early.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from bnrewrite.capture.aliases import is_updated

CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint
_CONTEXT = "_checkpoint_context_fn"  # where Dynamo keeps the user's `context_fn`


def body_of(graph: fx.GraphModule, node: fx.Node) -> fx.GraphModule | None:
    """The graph that a node checkpoints; None for another node."""
    if node.target is not CHECKPOINT or not isinstance(node.args[0], fx.Node):
        return None
    body = graph.get_submodule(str(node.args[0].target))
    return body if isinstance(body, fx.GraphModule) else None


def sourced(graph: fx.GraphModule, call: fx.Node) -> fx.GraphModule:
    """A copy of a checkpointed graph whose inputs know where their values come from."""
    body = body_of(graph, call)
    assert body is not None
    graph_copy = fx.Graph()
    graph_copy.output(graph_copy.graph_copy(body.graph, {}))
    copied = fx.GraphModule(body, graph_copy)
    copied.meta = dict(body.meta)
    given = iter(call.args[1:])
    for node in graph_copy.nodes:
        outer = next(given, None) if node.op == "placeholder" else None
        if isinstance(outer, fx.Node) and outer.op == "placeholder":
            node.meta = {**outer.meta, **node.meta}
            node._dynamo_source = getattr(outer, "_dynamo_source", None)
    return copied


def why_left(body: fx.GraphModule, updates: bool) -> str | None:
    """Why a checkpointed graph stays the user's inside; None where it need not.

    Args:
        body: the graph.
        updates: whether it updates what it is given, and may run again for a backward.
    """
    if updates:
        return (
            "activation checkpointing runs it again for the backward, and how much of that the "
            "buffers see depends on what its operations save"
        )
    if _CONTEXT in body.meta:
        return "a policy of the user's chooses by operation what activation checkpointing saves"
    return None


def checkpointed(
    body: fx.GraphModule, *args: Any, held: tuple[int, ...] = (), **settings: Any
) -> Any:
    """Call a graph under activation checkpointing, with the user's settings.

    Args:
        body: the graph.
        args: of the graph.
        held: positions of the arguments that the user's function finds on its modules, and that
            may be updated before the backward: `checkpoint` would refuse that of an argument.
        settings: keyword arguments of `torch.utils.checkpoint.checkpoint`. A reentrant checkpoint
            is made without reentering, but computes all of the forward again as that does.
    """
    reentrant = settings.pop("use_reentrant", False)
    if _CONTEXT in body.meta:
        settings["context_fn"] = body.meta[_CONTEXT]
    found = {i: args[i] for i in held}

    def run(*given: Any) -> Any:
        rest = iter(given)
        return body(*(found[i] if i in found else next(rest) for i in range(len(args))))

    given = [each for i, each in enumerate(args) if i not in found]
    if not reentrant:
        return checkpoint(run, *given, use_reentrant=False, **settings)
    with set_checkpoint_early_stop(False):
        return checkpoint(run, *given, use_reentrant=False, **settings)


def restore_checkpoints(module: fx.GraphModule) -> None:
    """Make the calls of checkpointed graphs those of the user's code, however deep, in place."""
    for each in module.modules():
        if not isinstance(each, fx.GraphModule):
            continue
        nodes = [node for node in each.graph.nodes if node.target is CHECKPOINT]
        for node in nodes:
            given = enumerate(node.args[1:])
            held = tuple(i for i, value in given if isinstance(value, fx.Node) and _is_held(value))
            node.target, node.kwargs = checkpointed, {**node.kwargs, "held": held}
        if nodes:
            each.recompile()


def _is_held(node: fx.Node) -> bool:
    return node.op == "placeholder" and is_updated(node.meta.get("example_value"))
