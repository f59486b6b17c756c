"""A norm as a text, and what the text means: the formula from which its kernels are printed.

    x[n c h w] over n h w; t0[c]; t1[c]; centre = M; scale = t0*(V + 1.0e-5)**(-1/2); shift = t1

stands for ``y = activation(scale * (x - centre) + shift)``, with the moments M = E[x] and
V = E[(x - M)^2] over n, h and w of each c. The words:

    x[n (g c) h]         the axes of the dimensions; ``(g=4 c)`` is one dimension of 4 groups
    over ...             the reduced axes; ``over ... about zero`` takes M = 0 and V = E[x^2]
    t0[c]                a tensor along axes; ``t0[c] fixed`` takes no gradient
    m0[n] = ...          the mean of an expression of a group over the groups with the same n; it
                         may stand in what follows
    centre, scale, shift expressions in M, V, the tensors, the means m0, m1, ..., the number N of
                         reduced elements, and Na, Nb, ..., the extents of the axes a, b, ...;
                         ``Ms`` and ``Vs`` are moments through which no gradient flows
    u0 = ...             further values of each group, as buffers take: no gradient flows to them
    relu | relu6 | leaky_relu 0.01 | silu | gelu | gelu_tanh | sigmoid | tanh
                         the activation; nothing for none
    residual             a tensor like x is added before the activation
    to float32           the dtype of y, where it is not that of x

``()`` stands for a dimension of one element.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import sympy
import torch

from .activations import activation as read_activation

M, V = sympy.Symbol("M", real=True), sympy.Symbol("V", nonnegative=True)
Ms, Vs = sympy.Symbol("Ms", real=True), sympy.Symbol("Vs", nonnegative=True)
N = sympy.Symbol("N", positive=True)


class Larger(sympy.Function):  # type: ignore[misc]
    """``max(a, bound)``, whose gradient goes to ``a`` where ``a >= bound``, as ``clamp`` has it."""

    def fdiff(self, argindex: int = 1) -> Any:
        """One where the argument is taken."""
        if argindex != 1:
            return sympy.Integer(0)
        return AtLeast(*self.args)


class AtLeast(sympy.Function):  # type: ignore[misc]
    """One where ``a >= bound``, else zero."""

    def fdiff(self, argindex: int = 1) -> Any:
        """It is constant in pieces."""
        return sympy.Integer(0)


class Root(sympy.Function):  # type: ignore[misc]
    """``sqrt(a)`` as ``norm`` and ``std`` have it: their gradient is zero at zero."""

    def fdiff(self, argindex: int = 1) -> Any:
        """One over twice the root, or zero at zero."""
        slope: Any = InverseRoot(self.args[0])
        return slope / 2


class InverseRoot(sympy.Function):  # type: ignore[misc]
    """``1 / sqrt(a)``, zero at zero."""

    def fdiff(self, argindex: int = 1) -> Any:
        """Of no use: kernels are differentiated once."""
        raise NotImplementedError


FUNCTIONS: dict[str, Any] = {
    "Larger": Larger,
    "Root": Root,
}


@dataclass(frozen=True)
class Term:
    """``group * element``: a value of each group, and one that varies inside the group."""

    group: sympy.Expr
    element: sympy.Expr


@dataclass(frozen=True)
class Mean:
    """The mean of a value of each group over all groups that lie at the same place of some axes."""

    axes: tuple[str, ...]
    value: sympy.Expr


@dataclass(frozen=True)
class Program:
    """What a text says.

    Attributes:
        dims: the axes of each dimension of x.
        sizes: of axes that share a dimension, all but one each.
        over: the reduced axes.
        about_zero: M is 0 and V is E[x^2].
        tensors: the axes of t0, t1, ...
        fixed: the numbers of the tensors that take no gradient, those of updates alone included.
        means: over groups; each may be made of those before.
        centre: of each group.
        scale: its terms; they are added.
        shift: its terms.
        updates: further values of each group.
        activation: as ``activations.activation`` reads it; empty for none.
        residual: a tensor like x is added before the activation.
        dtype: of y, None for that of x.
    """

    dims: tuple[tuple[str, ...], ...]
    sizes: dict[str, int]
    over: frozenset[str]
    about_zero: bool
    tensors: tuple[tuple[str, ...], ...]
    fixed: frozenset[int]
    means: tuple[Mean, ...]
    centre: sympy.Expr
    scale: tuple[Term, ...]
    shift: tuple[Term, ...]
    updates: tuple[sympy.Expr, ...]
    activation: str
    residual: bool
    dtype: torch.dtype | None

    def symbol(self, number: int) -> sympy.Symbol:
        """The symbol of a tensor."""
        return sympy.Symbol(f"t{number}", real=True)

    def mean(self, number: int) -> sympy.Symbol:
        """The symbol of a mean over groups."""
        return sympy.Symbol(f"m{number}", real=True)

    def of_groups(self) -> list[sympy.Expr]:
        """What the gradients of a group come through: its centre, its factors and its means."""
        terms = [term.group for term in (*self.scale, *self.shift)]
        return [self.centre, *terms, *(mean.value for mean in self.means)]

    def extents(self) -> list[sympy.Symbol]:
        """The symbols of the extents of all axes."""
        return [sympy.Symbol(f"N{axis}", positive=True) for dim in self.dims for axis in dim]

    def kept(self) -> list[str]:
        """The axes that are not reduced, in order."""
        return [axis for dim in self.dims for axis in dim if axis not in self.over]

    def axis_sizes(self, shape: Sequence[Any]) -> dict[str, Any]:
        """The extents of the axes of a tensor."""
        found: dict[str, Any] = {}
        for dim, extent in zip(self.dims, shape, strict=True):
            known = math.prod(self.sizes.get(axis, 1) for axis in dim)
            found |= {axis: self.sizes.get(axis) or extent // known for axis in dim}
        return found

    def kept_sizes(self, shape: Sequence[Any]) -> list[Any]:
        """The extents of the axes that are not reduced."""
        sizes = self.axis_sizes(shape)
        return [sizes[axis] for axis in self.kept()]

    def inside(self, number: int) -> bool:
        """Whether a tensor varies inside a group."""
        return not self.over.isdisjoint(self.tensors[number])


@cache
def before_residual(text: str) -> str:
    """The program without its residual and its activation."""
    parts = [part.strip() for part in text.split(";")]
    return "; ".join(p for p in parts if p != "residual" and read_activation(p) is None)


@cache
def parse(text: str) -> Program:
    """The program of a text."""
    head, *parts = (part.strip() for part in text.split(";"))
    match = re.fullmatch(r"x\[(.*)\] over (.*?)( about zero)?", head)
    assert match is not None, head
    dims, sizes = _dims(match[1])
    over = frozenset(match[2].split())
    tensors: list[tuple[str, ...]] = []
    fixed: set[int] = set()
    named: dict[str, str] = {"centre": "0", "scale": "1", "shift": "0"}
    updates: list[str] = []
    averaged: list[tuple[tuple[str, ...], str]] = []
    activation, residual, dtype = "", False, None
    for part in parts:
        if tensor := re.fullmatch(r"t(\d+)\[(.*)\]( fixed)?", part):
            if tensor[3]:
                fixed.add(len(tensors))
            tensors.append(tuple(tensor[2].split()))
        elif mean := re.fullmatch(r"m\d+\[(.*?)\] = (.*)", part):
            averaged.append((tuple(mean[1].split()), mean[2]))
        elif read_activation(part) is not None:
            activation = part
        elif part == "residual":
            residual = True
        elif part.startswith("to "):
            dtype = getattr(torch, part.removeprefix("to "))
        else:
            name, expression = part.split(" = ")
            if name.startswith("u"):
                updates.append(expression)
            else:
                named[name] = expression
    symbols: dict[str, Any] = {"M": M, "V": V, "Ms": Ms, "Vs": Vs, "N": N, **FUNCTIONS}
    if match[3]:
        symbols |= {"M": sympy.Integer(0), "Ms": sympy.Integer(0)}  # no gradient flows to it
    symbols |= {f"N{a}": sympy.Symbol(f"N{a}", positive=True) for dim in dims for a in dim}
    symbols |= {f"t{i}": sympy.Symbol(f"t{i}", real=True) for i in range(len(tensors))}
    symbols |= {f"m{i}": sympy.Symbol(f"m{i}", real=True) for i in range(len(averaged))}
    inner = {symbols[f"t{i}"] for i, axes in enumerate(tensors) if not over.isdisjoint(axes)}

    def read(expression: str) -> sympy.Expr:
        return sympy.parse_expr(expression, local_dict=symbols)

    centre, scale, shift = (read(named[name]) for name in ("centre", "scale", "shift"))
    means = tuple(Mean(axes, read(value)) for axes, value in averaged)
    values = (centre, scale, shift, *(mean.value for mean in means))
    used = {symbol for value in values for symbol in value.free_symbols}
    fixed |= {i for i in range(len(tensors)) if symbols[f"t{i}"] not in used}
    return Program(
        dims, sizes, over, bool(match[3]), tuple(tensors), frozenset(fixed), means,
        centre, _terms(scale, inner), _terms(shift, inner), tuple(map(read, updates)), activation,
        residual, dtype,
    )  # fmt: skip


def _dims(text: str) -> tuple[tuple[tuple[str, ...], ...], dict[str, int]]:
    dims: list[tuple[str, ...]] = []
    sizes: dict[str, int] = {}
    for word in re.findall(r"\([^)]*\)|\S+", text):
        axes = []
        for axis in word.strip("()").split():
            name, _, size = axis.partition("=")
            axes.append(name)
            if size:
                sizes[name] = int(size)
        dims.append(tuple(axes))
    return tuple(dims), sizes


def _terms(value: sympy.Expr, inner: set[Any]) -> tuple[Term, ...]:
    """A sum as few terms; what multiplies the same element is one value of the group.

    Those values are computed in double precision, where what cancels keeps its digits.
    """
    groups: dict[Any, Any] = {}
    for term in sympy.Add.make_args(sympy.expand(value, power_base=False, power_exp=False)):
        element, group = sympy.Integer(1), sympy.Integer(1)
        for factor in sympy.Mul.make_args(term):
            if factor.free_symbols & inner:
                element *= factor
            else:
                group *= factor
        groups[element] = groups.get(element, sympy.Integer(0)) + group
    elements: dict[Any, Any] = {}
    for element, group in groups.items():
        elements[group] = elements.get(group, sympy.Integer(0)) + element
    return tuple(Term(g, e) for g, e in elements.items() if e != 0 and g != 0)
