"""The tensors that statistics are taken of.

Walks from every reduction back through casts, squares and the subtraction of other statistics to
the tensor whose moments are taken. Only a choice of what to call an atom: a poor choice loses a
norm, it never makes a wrong one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from .calls import (
    CASTS,
    POOLS,
    arguments_of,
    dtype_of,
    is_pointwise,
    is_tensor,
    name_of,
    narrows,
    pools_everything,
)
from .parts import TAKES_APART

REDUCTIONS = frozenset((
    "mean", "sum", "var", "std", "var_mean", "std_mean", "norm", "linalg_vector_norm",
    "linalg_norm", "frobenius_norm", "amax", "max", "einsum", "dot", "vdot",
)) | POOLS  # fmt: skip

SAME = frozenset((
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "permute", "transpose", "t",
    "movedim", "unsqueeze", "squeeze", "expand", "expand_as", "contiguous", "clone", "alias",
    "detach", "neg", "abs", "square", "lift_fresh_copy", "view_as", "swapaxes", "moveaxis",
    "reshape_as", "numpy_T", "mT", "repeat", "repeat_interleave", "tile", "broadcast_to",
))  # fmt: skip

MOVES = frozenset((
    "slice", "select", "narrow", "split", "split_with_sizes", "chunk", "unbind", "getitem", "cat",
    "index", "index_select", "masked_fill", "where", "roll", "flip", "constant_pad_nd", "pad",
))  # fmt: skip

SQUARES = frozenset((
    "var", "std", "var_mean", "std_mean", "norm", "linalg_vector_norm", "linalg_norm",
    "frobenius_norm",
))  # fmt: skip

FORWARD = 48  # how many nodes on a reduction is followed to the tensor that it scales
STEPS = 24  # how many tensors back a statistic is still about the tensor that it scales

HIGHEST = 2**16  # a degree above which higher ones are not told apart
PLAIN_BITS = 8  # a factor of so many bits is no matter of range where squares are taken
SUMMED_BITS = 24  # ... and where there are none; a mean may be a sum of x / n

FOLLOWED = SAME | CASTS | REDUCTIONS | TAKES_APART | {"getitem", "cat", "stack"}


def anchors(graph: fx.Graph) -> frozenset[fx.Node]:
    """The bases of all reductions of a graph."""
    # reductions and what is computed from them, with the elements that are reduced
    statistic: dict[fx.Node, float] = {}
    found: set[fx.Node] = set()
    own: list[tuple[fx.Node, fx.Node]] = []
    bases = _Bases(statistic)
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        inputs = [n for n in node.all_input_nodes if is_tensor(n) or n in statistic]
        if name_of(node) in REDUCTIONS and not (_is_product(node) or _is_local(node)):
            operands = _operands(node)
            degree = 2 if name_of(node) in SQUARES or len(set(operands)) < len(operands) else 1
            for operand in operands:
                base = bases.of(operand, degree)
                if base is not None:
                    found.add(base)
                elif degree > 1 or name_of(operand) in ("pow", "square", "mul"):
                    own.append((node, operand))
            if _scales_more(node):
                statistic[node] = max((elements(n) for n in _operands(node)), default=0)
            continue
        reduced = [statistic[n] for n in inputs if n in statistic]
        if reduced and (
            all(n in statistic or elements(n) <= 1 for n in inputs) or elements(node) < max(reduced)
        ):
            statistic[node] = max(reduced)
    for reduction, operand in own:
        if _scales_itself(reduction, statistic):
            smaller = {n: e for n, e in statistic.items() if elements(n) < elements(operand)}
            base = _Bases(smaller).of(operand, 2)
            if base is not None:
                found.add(base)
    return frozenset(found)


def _scales_more(reduction: fx.Node) -> bool:
    """Whether a reduction is later combined with a larger tensor, element by element.

    If it is not it is no statistic but a new tensor: a pooled one, a weighted sum.
    """
    return bool(_scaled_by(reduction))


def _scales_itself(reduction: fx.Node, statistic: dict[fx.Node, float]) -> bool:
    """Whether all that a statistic of statistics scales are statistics: they are normalised."""
    scaled = _scaled_by(reduction)
    return bool(scaled) and all(node in statistic for node in scaled)


def _scaled_by(reduction: fx.Node) -> list[fx.Node]:
    """The first larger tensors that a reduction is combined with, element by element."""
    own = max(elements(reduction), 1)
    found: list[fx.Node] = []
    seen: set[fx.Node] = set()
    todo = list(reduction.users)
    while todo and len(seen) < FORWARD:
        node = todo.pop(0)
        if node in seen or not (is_pointwise(node) or name_of(node) in FOLLOWED):
            continue
        seen.add(node)
        if name_of(node) not in SAME and elements(node) > own:
            found.append(node)
        else:
            todo += node.users
    return found


def lineage(source: object) -> frozenset[object]:
    """A tensor and what it is made of element by element, a few steps back."""
    if not isinstance(source, fx.Node):
        return frozenset((source,))
    found: set[object] = {source}
    todo = [source]
    while todo and len(found) < STEPS:
        node = todo.pop(0)
        if is_pointwise(node) or name_of(node) in MOVES | SAME | CASTS:
            todo += [n for n in node.all_input_nodes if n not in found]
            found.update(node.all_input_nodes)
    return frozenset(found)


def is_power(node: fx.Node, bases: frozenset[fx.Node]) -> bool:
    """Whether a node is a power of one of these tensors."""
    inputs = set(node.all_input_nodes)
    return len(inputs) == 1 and inputs <= bases and name_of(node) in ("pow", "square", "mul")


def _is_product(node: fx.Node) -> bool:
    """An einsum that sums over nothing."""
    if name_of(node) != "einsum":
        return False
    inputs, arrow, output = str(node.args[0]).replace(" ", "").partition("->")
    return bool(arrow) and set(inputs) - {",", "."} <= set(output)


def _is_local(node: fx.Node) -> bool:
    """A pooling whose windows are smaller than what it pools."""
    return name_of(node).startswith("avg_pool") and not pools_everything(node)


def _operands(node: fx.Node) -> list[fx.Node]:
    arguments = arguments_of(node)
    if name_of(node) == "einsum":
        return [n for n in arguments["tensors"] if isinstance(n, fx.Node)]
    first = arguments.get("self", arguments.get("input", node.args[0] if node.args else None))
    return [first] if isinstance(first, fx.Node) else []


class _Bases:
    """The tensors under operands, each looked for once: norms of norms branch at every step.

    Args:
        statistic: whether a node is one is known before a node that uses it is asked for.
    """

    def __init__(self, statistic: dict[fx.Node, float]) -> None:
        self.statistic = statistic
        self.known: dict[tuple[fx.Node, float], fx.Node | None] = {}

    def of(self, node: fx.Node, degree: float) -> fx.Node | None:
        """The tensor under a reduction's operand; None where it is itself a statistic.

        ``degree`` is the power of the node that is reduced. A power of which a square is reduced is
        a tensor of its own: E[x^6] is a moment of x^3.
        """
        key = node, min(degree, HIGHEST)
        if key not in self.known:
            self.known[key] = self._found(*key)
        return self.known[key]

    def _found(self, node: fx.Node, degree: float) -> fx.Node | None:
        if node in self.statistic:
            return None
        if node.op != "call_function":
            return node
        name = name_of(node)
        arguments = arguments_of(node)
        first = arguments.get("self")
        if not isinstance(first, fx.Node):
            return node
        if name in CASTS:
            return node if narrows(dtype_of(first), dtype_of(node)) else self.of(first, degree)
        if name in ("pow", "square"):
            exponent = 2 if name == "square" else arguments.get("exponent")
            if isinstance(exponent, fx.Node) or exponent is None:
                return node
            raises = exponent > 1 and degree > 1
            return node if raises else self.of(first, degree * exponent)
        if name in SAME:
            return self.of(first, degree)
        if name in ("add", "sub", "rsub", "mul", "div"):
            return self._of_binary(node, name, first, arguments.get("other"), degree)
        return node

    def _of_binary(
        self, node: fx.Node, name: str, left: fx.Node, right: Any, degree: float
    ) -> fx.Node | None:
        if not is_tensor(right):
            return node if _moves_digits(node, name, right, degree) else self.of(left, degree)
        raised = 2 * degree if name == "mul" else degree
        bases = [self.of(n, raised) for n in (left, right)]
        if name == "mul" and bases[0] is not None and bases[0] is bases[1]:
            return node if degree > 1 else bases[0]
        if name in ("add", "sub", "rsub"):
            for full, small in ((left, right), (right, left)):
                if small in self.statistic and full not in self.statistic:
                    return self.of(full, degree)
            if bases[0] is not None and bases[0] is bases[1]:
                return bases[0]
        return node


def _moves_digits(node: fx.Node, name: str, value: Any, degree: float) -> bool:
    """Whether a number in front of a statistic decides which digits of the tensor it keeps.

    ``x / 64`` keeps squares in range, ``x - 273`` takes away what all elements share: a statistic
    of the bare x overflows where the user's does not, or loses the digits that tell x apart.
    """
    if isinstance(value, fx.Node):
        value = getattr(getattr(value.meta.get("val"), "node", None), "hint", None)
    if name in ("add", "sub", "rsub"):
        return degree > 1 and value != 0
    if not isinstance(value, (int, float)) or dtype_of(node) == torch.float16:
        return True
    bits = PLAIN_BITS if degree > 1 else SUMMED_BITS
    return not 2.0**-bits <= abs(value) <= 2.0**bits


def elements(node: fx.Node) -> float:
    """The number of elements, symbolic sizes by their example."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return 1
    sizes = [max(s.node.hint or 2, 2) if isinstance(s, torch.SymInt) else s for s in value.shape]
    return math.prod(s or 2 for s in sizes)
