"""Give back the updates in place that the user's code made of intermediate values.

Before:  z = relu(y)     (canonical form of the user's relu_(y))
After:   z = relu_(y)
Leaves alone: an input; a value that is used again, or that shares its memory with another one; a
value whose own backward needs it, unless the user's code had that very operation there.

Without this a rewritten graph would take more memory traffic than the user's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from bnrewrite.capture.lifetime import may_alias
from bnrewrite.kernels import KERNELS

aten = torch.ops.aten

# Operations that keep their inputs for the backward, never their result.
_KEEP_INPUTS = frozenset(
    {
        aten.add.Tensor,
        aten.addcmul.default,
        aten.batch_norm.default,
        aten.group_norm.default,
        aten.instance_norm.default,
        aten.layer_norm.default,
        aten.mul.Tensor,
        aten.sub.Tensor,
        *KERNELS,
    }
)


def restore_updates_in_place(canonical: fx.Graph, users: fx.Graph) -> None:
    """Turn nodes of a rewritten graph into updates in place where the user's graph has one.

    Args:
        canonical: changed in place.
        users: the Dynamo graph that it was made from.
    """
    originals = {node.name: node for node in users.nodes}
    for node in canonical.nodes:
        if not _follows_a_norm(node, originals):
            original = _original(node, originals)
            if original is None or not _is_update(original):
                continue
        variant = _update_of(node.target)
        if variant is not None and _may_be_overwritten(node, originals):
            node.target = variant


def _follows_a_norm(node: fx.Node, originals: Mapping[str, fx.Node]) -> bool:
    """Whether a node is a ReLU of a norm that was rewritten: nobody else can see that result."""
    given = node.args[0] if node.target is aten.relu.default else None
    if not isinstance(given, fx.Node) or given.target not in _KEEP_INPUTS:
        return False
    return _original(given, originals) is None


def _original(node: fx.Node, originals: Mapping[str, fx.Node]) -> fx.Node | None:
    """The node of the user's graph that a canonical node was traced from; None for a new one."""
    steps: Any = node.meta.get("from_node")
    return originals.get(steps[0].name) if steps else None


def _is_update(original: fx.Node) -> bool:
    """Whether Dynamo saw an operation return the very tensor that it was given."""
    given = original.args[0] if original.args else None
    if not isinstance(given, fx.Node) or original.op not in ("call_function", "call_method"):
        return False
    value = original.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value is given.meta.get("example_value")


def _update_of(target: Any) -> Any:
    """`aten.relu_.default` of `aten.relu.default`; None where there is none."""
    if not isinstance(target, torch._ops.OpOverload):
        return None
    name = target._schema.name.removeprefix("aten::")
    packet = getattr(aten, f"{name}_", None)
    return getattr(packet, target._overloadname, None)


def _may_be_overwritten(node: fx.Node, originals: Mapping[str, fx.Node]) -> bool:
    given = node.args[0]
    if not isinstance(given, fx.Node) or given.op != "call_function" or len(given.users) != 1:
        return False
    before, after = given.meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    if before.dtype != after.dtype or before.dim() != after.dim() or given in node.args[1:]:
        return False
    if may_alias(given) and _update_of_itself(given) is None:
        return False
    if any(a is not b and str(a) != str(b) for a, b in zip(before.shape, after.shape, strict=True)):
        return False
    return given.target in _KEEP_INPUTS or _is_as_the_user_had_it(node, given, originals)


def _update_of_itself(node: fx.Node) -> fx.Node | None:
    """The input of an update in place, which is what it returns."""
    target: Any = node.target
    updates = isinstance(target, torch._ops.OpOverload) and target._schema.name.endswith("_")
    given = node.args[0]
    return given if updates and isinstance(given, fx.Node) and len(given.users) == 1 else None


def _is_as_the_user_had_it(node: fx.Node, given: fx.Node, originals: Mapping[str, fx.Node]) -> bool:
    """Whether the user's code updates the result of this same operation."""
    original = _original(node, originals)
    assert original is not None
    maker = _original(given, originals)
    return maker is not None and original.args[0] is maker
