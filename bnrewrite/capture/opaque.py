"""Which nodes of a Dynamo graph have no canonical form, and stay as the user's graph has them.

A functional graph before autograd cannot say them, or tracing would lose a part of their meaning:

- operations that hold graphs of their own (activation checkpointing, scan, cond);
- an `autograd.Function`, whose backward is the user's;
- function transforms (`torch.func`, forward mode), which change the state of the process; with all
  that stands between the beginning of one and its end;
- settings of the process (inference mode, the kernels of attention) that hold while it is traced
  and would be gone when it runs;
- updates in place that autograd does not see, of values that have autograd history.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from bnrewrite.capture.autocast import ENTER, EXIT

IN_PLACE = ("setitem", "iadd", "isub", "imul", "itruediv", "ipow")
_BEGINS = (
    "_vmap_increment_nesting",
    "_grad_increment_nesting",
    "_jvp_increment_nesting",
    "_func_increment_nesting",
    "_enter_dual_level",
)
_ENDS = tuple(name.replace("increment", "decrement").replace("enter", "exit") for name in _BEGINS)


def opaque_nodes(graph: fx.Graph, grad_enabled: bool) -> dict[fx.Node, str]:
    """The nodes of a Dynamo graph that tracing cannot take, and why, in the order of the graph.

    Args:
        graph: as Dynamo made it.
        grad_enabled: the gradient mode in which it begins.
    """
    found: dict[fx.Node, str] = {}
    depth = 0
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method", "call_module"):
            continue
        name = target_name(node)
        if node.target is torch._C._set_grad_enabled:
            grad_enabled = bool(node.args[0])
        begins, ends = name in _BEGINS, name in _ENDS
        if depth or begins or _is_transform(node):
            found[node] = f"a function transform ({name}) runs inside the graph"
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            if name != "autograd_function_apply":
                found[node] = f"{name} holds a graph of its own"
            elif grad_enabled:
                found[node] = "an autograd.Function has a backward of its own"
        elif _sets_a_mode(node):
            found[node] = f"{name} changes how the process computes"
        else:
            reason = "a value with autograd history is updated where autograd is off"
            found.update(dict.fromkeys(_hidden_update(node, grad_enabled), reason))
        depth = max(0, depth + begins - ends)
    return found


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


def _is_transform(node: fx.Node) -> bool:
    module = str(getattr(node.target, "__module__", "")) + str(node.target)
    return "_functorch" in module or "saved_tensors_hooks" in target_name(node)


def _sets_a_mode(node: fx.Node) -> bool:
    """Whether a node is called for its effect alone, and on no tensor."""
    if node.op != "call_function" or node.target in (torch._C._set_grad_enabled, ENTER, EXIT):
        return False
    values = [each.meta.get("example_value") for each in (node, *node.all_input_nodes)]
    return values[0] is None and not any(
        isinstance(each, torch.Tensor | torch.SymInt | torch.SymBool) for each in values
    )


def _hidden_update(node: fx.Node, grad_enabled: bool) -> Iterator[fx.Node]:
    """An update in place that autograd does not see, with the aliases that it goes through."""
    if not is_in_place(node) or not node.args or not isinstance(node.args[0], fx.Node):
        return
    target: fx.Node = node.args[0]
    through = [node]
    while _aliases_without_history(target) and isinstance(target.args[0], fx.Node):
        through.append(target)
        target = target.args[0]
    hidden = not grad_enabled or len(through) > 1
    if hidden and getattr(target.meta.get("example_value"), "requires_grad", False):
        yield from through


def _aliases_without_history(node: fx.Node) -> bool:
    """Whether a node is `x.data` or `x.detach()`."""
    if node.op == "call_method":
        return node.target == "detach"
    return node.op == "call_function" and (
        (node.target is getattr and node.args[1:2] == ("data",))
        or target_name(node) in ("detach", "_get_data_attr")
    )
