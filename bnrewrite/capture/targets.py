"""What a node of a Dynamo graph calls."""

from __future__ import annotations

import torch
from torch import fx

CALLS = ("call_function", "call_method", "call_module")
IN_PLACE = ("setitem", "iadd", "isub", "imul", "itruediv", "ipow")


def target_name(node: fx.Node) -> str:
    """The bare name of what a node calls: "add_", "setitem", "tag_activation_checkpoint"."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name.rpartition("::")[2])
    if isinstance(target, torch._ops.HigherOrderOperator):
        return str(target._name)
    return str(getattr(target, "__name__", target))


def is_in_place(node: fx.Node) -> bool:
    """Whether a node is spelt as an update of its first argument."""
    name = target_name(node)
    return (name.endswith("_") and not name.endswith("__")) or name in IN_PLACE
