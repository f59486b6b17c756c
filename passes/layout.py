"""Makes channels dense behind a norm over them, where a depthwise convolution follows.

Before:  z = depthwise(norm(x)), x contiguous: the channels that the norm needs lie far apart
After:   the norm's result lies channels last, and so does what is computed of it
Leaves alone: graphs without such a convolution; tensors that are not float32 on a CPU, or whose
sizes vary; graphs with something behind the norm that is no plain operation of PyTorch, or draws
random numbers; graphs of which a result would lie otherwise in memory than the user's does.

On a CPU a depthwise convolution takes 0.4 to 0.7 of its time where channels are dense, and so do
norms over them; the others take as long (docs/decisions/0023-dense-channels.md).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from bnrewrite.algebra.calls import name_of

from .cleanup import VIEWS
from .linear_maps import FORWARD, linear_map
from .nodes import aten, fake_value
from .rewriting import Decision, Rewriting

NOTE = "its result lies channels last, for the depthwise convolution behind it"


class _Unfit(Exception):
    """The graph stays as it lies in memory."""


@dataclass(frozen=True)
class Layout:
    """One conversion at the first such norm; what follows has dense channels by itself."""

    name: str = "layout"

    def run(self, rewriting: Rewriting) -> None:
        """Insert a conversion behind a norm that becomes a kernel, if the graph may have it."""
        if not any(_is_depthwise(node) for node in rewriting.graph.nodes):
            return
        chosen = next((d for d in rewriting.decisions if _is_over_channels(d)), None)
        if chosen is not None and _converted(rewriting.graph, chosen.replaced):
            chosen.notes.append(NOTE)


def _is_depthwise(node: fx.Node) -> bool:
    found = linear_map(node)
    if found is None or name_of(node) not in FORWARD | {"convolution"}:
        return False
    per_output, channels = found.weight.meta["val"].shape[1], found.x.meta["val"].shape[-3:-2]
    return bool(per_output == 1 and channels != (1,) and found.x.meta["val"].dim() == 4)


def _is_over_channels(decision: Decision) -> bool:
    if decision.refusal is not None or decision.lowering != "generated":
        return False
    linear, over = decision.match.linear, decision.match.over
    return [i for i, dim in enumerate(linear.index) if set(dim) & over] == [1] and all(
        _has_channels_apart(node.meta["val"]) for node in (linear.source, decision.replaced)
    )


def _has_channels_apart(value: torch.Tensor) -> bool:
    """Whether it is an image of float32 on a CPU, of fixed sizes, whose channels lie apart."""
    return (
        value.dim() == 4
        and value.device.type == "cpu"
        and value.dtype == torch.float32
        and all(isinstance(size, int) for size in value.shape)
        and value.is_contiguous()
        and not value.is_contiguous(memory_format=torch.channels_last)
    )


def _converted(graph: fx.Graph, norm: fx.Node) -> bool:
    """Whether the result of a norm was made channels last; else the graph is as it was."""
    with graph.inserting_after(norm):
        made = graph.call_function(
            aten.contiguous.default, (norm,), {"memory_format": torch.channels_last}
        )
    made.meta = dict(norm.meta)
    norm.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
    before: dict[fx.Node, Any] = {}
    try:
        for node in _behind(graph, made):
            if node.op == "output":
                _check_results(node, before)
            else:
                before[node] = node.meta["val"]
                node.meta["val"] = _value(node)
        if any(_is_depthwise(node) and not _lies_apart(node) for node in before):
            return True
    except (_Unfit, RuntimeError):  # the second is what an operation on fake tensors raises
        pass
    for node, value in before.items():
        node.meta["val"] = value
    made.replace_all_uses_with(norm)
    graph.erase_node(made)
    return False


def _behind(graph: fx.Graph, first: fx.Node) -> Iterator[fx.Node]:
    """A node and all that are made of it, as far as they are plain operations.

    Raises:
        _Unfit: at one that is none, or that depends on how its input lies in memory.
    """
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node is not first and found.isdisjoint(node.all_input_nodes):
            continue
        if node.op != "output" and not _is_plain(node):
            raise _Unfit
        found.add(node)
        yield node


def _is_plain(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return True
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and target.namespace == "aten"
        and not target._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in target.tags  # drawn in the order of memory
        and not name_of(node).startswith("as_strided")
    )


def _value(node: fx.Node) -> Any:
    """The fake value of a node, of those of its inputs."""
    target: Any = aten.reshape.default if node.target in VIEWS else node.target
    return fake_value(target, node.args, node.kwargs)


def _check_results(output: fx.Node, before: Mapping[fx.Node, Any]) -> None:
    """What the graph gives lies as it did.

    Raises:
        _Unfit: it does not.
    """
    for node in output.all_input_nodes:
        if node in before and _strides(node.meta["val"]) != _strides(before[node]):
            raise _Unfit


def _strides(value: Any) -> list[tuple[int, ...]]:
    return [each.stride() for each in tree_leaves(value) if isinstance(each, torch.Tensor)]


def _lies_apart(node: fx.Node) -> bool:
    return not node.meta["val"].is_contiguous(memory_format=torch.channels_last)
