"""Folds a constant affine into the linear map before it.

Before:  y = norm(W x + b), the norm having stored statistics: ``y = (W x + b) a + s``
After:   y = (a W) x + (a b + s), weight and bias computed in float64
Leaves alone: a norm before the linear map; an affine along other axes than the map's outputs; a map
whose result is used elsewhere too; weights that carry a gradient, in eager mode also those that
are large beside the result.

Where the parameters are constants (an export) their folded values become tensors of the graph. In
eager mode a parameter may change between two calls: there a kernel keeps the folded weight and
compares (``bnrewrite/kernels/folding.py``). Other stages have no place to look, and stay.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from bnrewrite.algebra.anchors import elements
from bnrewrite.algebra.axes import Opaque
from bnrewrite.algebra.calls import dtype_of, is_tensor, name_of
from bnrewrite.gradients import GRAD_MODE
from bnrewrite.kernels.folding import Unfoldable
from bnrewrite.report.site import REWRITTEN

from .costs import fewest
from .joint import Joint
from .linear_maps import linear_map
from .nodes import Unwritable, current, live_nodes
from .rewriting import Decision, Rewriting
from .stored import Stored
from .writing import hint

ROOMIER = "more accurate than the source: the result before the affine is rounded to {dtype} there"


@dataclass(frozen=True)
class Fold:
    """Runs behind ``Lower``: what it cannot fold has its lowering already."""

    name: str = "fold"

    def run(self, rewriting: Rewriting) -> None:
        """Change the graph site by site, and the records with it."""
        decisions = rewriting.decisions
        affine = [each for each in decisions if each.match.kind == "affine"]
        if rewriting.reading is None or not (affine or rewriting.natives):
            return
        if any(each.record is None for each in decisions):
            return  # they were not lowered
        stored, live = Stored(rewriting, rewriting.reading), live_nodes(rewriting.graph)
        for decision in affine:
            assert decision.record is not None
            if decision.record.status == REWRITTEN:
                _fold(rewriting, decision, stored, live)
        for found in rewriting.natives:
            native = Decision(found)
            native.record = rewriting.describe(native)
            _fold(rewriting, native, stored, live)
            if native.lowering == "fold":  # else it stays, and is no site
                decisions.append(native)


def _fold(rewriting: Rewriting, decision: Decision, stored: Stored, live: set[fx.Node]) -> None:
    """Fold a norm into the linear map before it, or note why not, where there is one."""
    assert rewriting.reading is not None
    assert decision.record is not None
    found = linear_map(decision.match.linear.source)
    if found is None:
        return
    try:
        joint = Joint(rewriting, rewriting.reading, decision.match, found, stored)
        _check(joint)
        if rewriting.constants is None:
            _check_eager(joint)
        joint.write(_between(joint, live), fewest(joint.linear.weight))
    except (Unfoldable, Unwritable, Opaque) as refusal:
        decision.notes.append(f"not folded into the {name_of(found.node)} before it: {refusal}")
    else:
        decision.lowering = "fold"
        if _is_half(found.node):
            decision.notes.append(_roomier(found.node))
    decision.record = replace(
        decision.record, lowering=decision.lowering, notes=tuple(decision.notes)
    )


def _is_half(node: fx.Node) -> bool:
    return dtype_of(node) in (torch.float16, torch.bfloat16)


def _roomier(node: fx.Node) -> str:
    return ROOMIER.format(dtype=_name(dtype_of(node)))


def _check(joint: Joint) -> None:
    """Raises ``Unfoldable`` where the two are not one linear map of constants."""
    ring, linear, node = joint.reading.ring, joint.found.linear, joint.linear.node
    reduced = ring.moments(linear.scale) | ring.moments(linear.shift)
    sources = ring.raw(linear.scale) | ring.raw(linear.shift) | reduced
    given = [each for each in (joint.linear.weight, joint.linear.bias) if each is not None]
    made = [current(each) if isinstance(each, fx.Node) else each for each in sources]
    objection = joint.stored.objection((*given, *made))
    if objection is not None:
        raise Unfoldable(objection)
    channels = set(linear.index[joint.linear.channel])
    if not ring.axes(linear.scale) | ring.axes(linear.shift) <= channels:
        raise Unfoldable("the affine runs along other axes than its outputs")
    dtypes = [_name(dtype_of(each)) for each in (node, joint.found.node)]
    if dtypes[0] != dtypes[1]:
        raise Unfoldable(f"its result is {dtypes[0]}, that of the affine {dtypes[1]}")
    if _is_half(node) and joint.rewriting.options.strict:
        raise Unfoldable(f"strict=True leaves a site whose replacement is {_roomier(node)}")
    if ring.differentiable(joint.linear.x) and (
        linear.detached or any(each.target is GRAD_MODE for each in node.graph.nodes)
    ):
        raise Unfoldable("gradients are switched off for a part of the graph")


def _check_eager(joint: Joint) -> None:
    """Raises ``Unfoldable`` where parameters that may change cannot be compared cheaply."""
    options, node = joint.rewriting.options, joint.linear.node
    if options.stage != "eager":
        raise Unfoldable("its parameters may change between two calls")
    if options.kernels != "auto":
        raise Unfoldable(f'kernels="{options.kernels}" asks for another lowering')
    if _is_rearranged(joint):
        raise Unfoldable("its result is rearranged before the affine")
    device = joint.linear.weight.meta["val"].device.type
    if device != "cpu":
        raise Unfoldable(f"looking at its weight would wait for the {device} device")
    if elements(node) < fewest(joint.linear.weight):
        raise Unfoldable(
            f"comparing its weight of {elements(joint.linear.weight)} elements costs more than it "
            f"saves on {elements(node)}"
        )


def _between(joint: Joint, live: set[fx.Node]) -> set[fx.Node]:
    """The nodes that lead from the linear map to the norm's result, both among them."""
    inside, todo = {joint.linear.node}, [joint.linear.node]
    while todo:
        for user in todo.pop().users:
            if user in inside or user is joint.end or user not in live:
                continue
            if not is_tensor(user) and name_of(user) == "sym_size":
                continue
            if user.op == "output" or joint.end < user:
                raise Unfoldable("its result is used elsewhere too")
            inside.add(user)
            todo.append(user)
    return inside | {joint.end}


def _is_rearranged(joint: Joint) -> bool:
    """Whether the affine's result has its elements in another order, or elsewhere in memory."""
    linear = joint.found.linear
    before, after = (
        [hint(each) for each in node.meta["val"].stride()]
        for node in (joint.linear.node, joint.end)
    )
    return linear.dims != linear.index or before != after


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
