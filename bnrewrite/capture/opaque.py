"""Which nodes of a Dynamo graph have no canonical form, and stay as the user's graph has them.

A functional graph before autograd cannot say them, or tracing would lose a part of their meaning:

- operations that hold graphs of their own (activation checkpointing, scan, cond);
- an `autograd.Function`, whose backward is the user's;
- function transforms (`torch.func`, forward mode), which change the state of the process; with all
  that stands between the beginning of one and its end;
- settings of the process (inference mode, the kernels of attention) that hold while it is traced
  and would be gone when it runs;
- updates in place that autograd does not see (`capture/detached.py`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from bnrewrite.capture.autocast import ENTER, EXIT
from bnrewrite.capture.detached import hidden_updates
from bnrewrite.capture.provenance import source_line
from bnrewrite.capture.targets import CALLS, target_name
from bnrewrite.gradients import GRAD_MODE, in_grad_mode
from bnrewrite.report.site import Kept

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
    hidden = hidden_updates(graph, grad_enabled)
    depth = 0
    for node, enabled in in_grad_mode(graph, grad_enabled):
        if node.op not in CALLS:
            continue
        name = target_name(node)
        begins, ends = name in _BEGINS, name in _ENDS
        if depth or begins or _is_transform(node):
            found[node] = "a function transform changes how the code in it is computed"
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            if name != "autograd_function_apply":
                found[node] = f"{name} holds a graph of its own"
            elif enabled:
                found[node] = "an autograd.Function has a backward of its own"
        elif _sets_a_mode(node):
            found[node] = f"{_public(name)} changes how the process computes"
        elif node in hidden:
            found[node] = hidden[node]
        depth = max(0, depth + begins - ends)
    return found


def what_is_kept(graph: fx.Graph, kept: Mapping[fx.Node, str]) -> tuple[Kept, ...]:
    """The report's entries: one for each operation with graphs, one for each row of other nodes."""
    found: list[Kept] = []
    row: str | None = None
    for node in graph.nodes:
        if node.op not in CALLS:
            continue
        reason, source = kept.get(node), source_line(node)
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            row = None
        elif reason is not None and reason == row:
            source = source or found[-1].source
            found.pop()
        if reason is not None:
            found.append(Kept(_public(target_name(node)), reason, source))
        row = reason
    return tuple(dict.fromkeys(found))


def _public(name: str) -> str:
    """The name by which a user knows an operation of Dynamo's."""
    if name == "autograd_function_apply":
        return "autograd.Function"
    for prefix in ("_", "enter_", "exit_"):
        name = name.removeprefix(prefix)
    return name.removesuffix("_increment_nesting").removesuffix("_decrement_nesting")


def _is_transform(node: fx.Node) -> bool:
    module = str(getattr(node.target, "__module__", "")) + str(node.target)
    return "_functorch" in module or "saved_tensors_hooks" in target_name(node)


_HARMLESS = (GRAD_MODE, torch._C._log_api_usage_once, ENTER, EXIT)


def _sets_a_mode(node: fx.Node) -> bool:
    """Whether a node is called for its effect alone, and on no tensor."""
    if node.op != "call_function" or node.target in _HARMLESS:
        return False
    values = [each.meta.get("example_value") for each in (node, *node.all_input_nodes)]
    return values[0] is None and not any(
        isinstance(each, torch.Tensor | torch.SymInt | torch.SymBool) for each in values
    )
