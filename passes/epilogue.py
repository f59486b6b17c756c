"""Takes what follows a norm, element by element, into its site.

Before:  z = relu(norm(x) * r + d),  z = relu(norm(x) + residual)
After:   the site has a formula with r and d, and an epilogue, which a kernel computes at once.
Leaves alone: norms that are used elsewhere too; residuals of another shape, dtype or device; a
region of other gradient mode between the two; other activations of a sum than ReLU: a backward
would need its result, which users may write over, as they may not where ReLU keeps it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import fx

from bnrewrite.algebra import Match, Reading, further
from bnrewrite.algebra.calls import is_tensor, shape_of
from bnrewrite.gradients import in_grad_mode
from bnrewrite.kernels import may_follow_residual

from .nodes import aten
from .rewriting import Epilogue, Rewriting

ACTIVATIONS: dict[Any, str] = {
    (aten.relu.default, ()): "relu",
    (aten.relu6.default, ()): "relu6",
    (aten.hardtanh.default, (0.0, 6.0)): "relu6",
    (aten.silu.default, ()): "silu",
    (aten.gelu.default, ()): "gelu",
    (aten.gelu.default, ("none",)): "gelu",
    (aten.gelu.default, ("tanh",)): "gelu_tanh",
    (aten.sigmoid.default, ()): "sigmoid",
    (aten.tanh.default, ()): "tanh",
}


@dataclass(frozen=True)
class TakeEpilogues:
    """Activations, and residuals in front of them."""

    name: str = "epilogue"

    def run(self, rewriting: Rewriting) -> None:
        """Fill in the epilogues of decisions."""
        if not rewriting.decisions:
            return
        reading, begin = rewriting.reading, rewriting.canonical.grad_enabled
        assert reading is not None
        stopped = {node for node, grad in in_grad_mode(rewriting.graph, begin) if not grad}
        taken: set[fx.Node] = set()  # a sum of two norms goes to the first of them
        for decision in rewriting.decisions:
            if decision.refusal is not None:
                continue
            whole = _whole(reading, decision.match, stopped)
            if whole is not None and whole.node not in taken:
                decision.whole = whole
                taken.add(whole.node)
            epilogue = _epilogue(decision.whole or decision.match, stopped)
            if epilogue is not None and epilogue.last not in taken:
                decision.epilogue = epilogue
                taken.add(epilogue.last)


def _whole(reading: Reading, found: Match, stopped: set[fx.Node]) -> Match | None:
    """A site with all that scales and shifts it further; None where nothing does."""
    whole, node = found, _only_user(found.node, stopped)
    while found.over and node is not None:
        more = further(reading, found, node)
        if more is None:
            break
        if (more.linear.scale, more.linear.shift) != (whole.linear.scale, whole.linear.shift):
            whole = more
        node = _only_user(node, stopped)
    return None if whole is found else whole


def _epilogue(found: Match, stopped: set[fx.Node]) -> Epilogue | None:
    """The activation behind a site, and what is added before it."""
    site, residual = found.node, None
    last = _only_user(site, stopped)
    if last is None:
        return None
    activation = _activation(last, site)
    if activation is None:
        residual = _residual(last, found)
        end = None if residual is None else _only_user(last, stopped)
        activation = None if end is None else _activation(end, last)
        if activation is None or end is None or not may_follow_residual(activation):
            return None
        last = end
    return Epilogue(activation, residual, last)


def _only_user(node: fx.Node, stopped: set[fx.Node]) -> fx.Node | None:
    """The one user of a node, in the same gradient mode."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    return user if (user in stopped) == (node in stopped) else None


def _activation(node: fx.Node, of: fx.Node) -> str | None:
    """The name that kernels have for an activation of a node."""
    if not node.args or node.args[0] is not of:
        return None
    options = (*node.args[1:], *node.kwargs.values())
    if node.target is aten.leaky_relu.default and all(isinstance(o, int | float) for o in options):
        slope = float(options[0]) if options else 0.01  # type: ignore[arg-type]
        return f"leaky_relu {slope!r}" if math.isfinite(slope) else None
    return ACTIVATIONS.get((node.target, options))


def _residual(node: fx.Node, found: Match) -> fx.Node | None:
    """What is added to a site's value, where it is a tensor just like it."""
    site, linear = found.node, found.linear
    if node.target is not aten.add.Tensor or node.kwargs or len(node.args) != 2:
        return None
    (other,) = [arg for arg in node.args if arg is not site] or [None]
    if not isinstance(other, fx.Node) or linear.detached or linear.dims != linear.index:
        return None
    if not is_tensor(other):
        return None
    kinds = [
        (shape_of(each), each.meta["val"].dtype, each.meta["val"].device)
        for each in (other, site, linear.source)
    ]
    return other if kinds[0] == kinds[1] == kinds[2] else None
