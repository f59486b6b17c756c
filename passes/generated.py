"""A norm as one kernel that is printed from its formula.

Before:  y = any spelling of x * scale + shift, the moments of x in scale and shift
After:   y = norm("x[a b c] over c; t0[c]; centre = M; scale = t0*(V + 1e-05)**(-1/2)", x, t0)
Leaves alone: other statistics than E[x] and V; tensors as large as x; functions inside a group.
"""

from __future__ import annotations

import math
import operator
from fractions import Fraction

import sympy
import torch
from torch import fx

from bnrewrite.algebra import centre
from bnrewrite.algebra.axes import Axis, axes_of
from bnrewrite.algebra.calls import dtype_of, is_tensor, shape_of
from bnrewrite.algebra.expression import (
    ZERO,
    Atom,
    Base,
    Extent,
    Function,
    Monomial,
    Number,
    Polynomial,
    Reduction,
    Sum,
    added,
    factor_of,
)
from bnrewrite.kernels import check_program, norm, norm_with_updates, operator_of

from .across import Means
from .nodes import Unwritable, aten, current
from .rewriting import Epilogue
from .state import BatchState, Update
from .writing import Writing

FUNCTIONS = {"root": "Root", "clamp_min": "Larger"}
LOST = "a sum in it would lose digits in another order of operations"
HIGHEST = 2  # degree up to which double precision keeps what a sum in single precision keeps


def write_generated(writing: Writing, state: BatchState, epilogue: Epilogue | None) -> fx.Node:
    """The node of the generated lowering; returns the replacement, of the epilogue too.

    Raises:
        Unwritable: the formula has no kernel.
    """
    assert writing.match.over, "a kernel reduces something"
    text = _Text(writing, state.updates)
    x = current(writing.match.linear.source)
    if epilogue is not None:
        writing.emitter.before = writing.replaced = epilogue.last
    written = text.program(epilogue)
    residual = [] if epilogue is None or epilogue.residual is None else [epilogue.residual]
    call = _call if writing.in_place else _operator
    value, updates = call(writing, written, x, [*text.nodes, *residual], len(state.updates))
    for update, new in zip(state.updates, updates, strict=True):
        along = axes_of(update.dims)
        for dim, axis in reversed(list(enumerate(text.kept()))):
            if axis not in along:  # a mean over groups: it is the same for all of them
                new = writing.emitter.call(aten.select.int, new, dim, 0)
        new = writing.emitter.reshape(new, list(shape_of(update.node)))
        state.replaced[update.node] = writing.cast(new, dtype_of(update.node))
    return writing.finish(value, writing.match.linear.index)


def _call(
    writing: Writing, text: str, x: fx.Node, given: list[fx.Node], updates: int
) -> tuple[fx.Node, list[fx.Node]]:
    """By the function that runs what kernel there is: the graph is run as it is."""
    call = writing.emitter.call
    if not updates:
        return call(norm, text, x, *given), []
    made = call(norm_with_updates, text, x, *given)
    first, *rest = (call(operator.getitem, made, place) for place in range(updates + 1))
    return first, rest


def _operator(
    writing: Writing, text: str, x: fx.Node, given: list[fx.Node], updates: int
) -> tuple[fx.Node, list[fx.Node]]:
    """By the operator, which a compiler places, and takes apart where it is made of Triton's."""
    target = operator_of(text, x.meta["val"], [node.meta["val"] for node in given])
    if target is None:
        raise Unwritable("no kernel takes tensors of these kinds")
    call = writing.emitter.call
    made = call(target, text, x, given)
    places = (call(operator.getitem, made, place + 2) for place in range(updates))
    return call(operator.getitem, made, 0), [call(aten.detach.default, new) for new in places]


class _Text:
    """The program of a site, and the tensors that it takes."""

    def __init__(self, writing: Writing, updates: list[Update]) -> None:
        found = writing.match
        self.writing = writing
        self.ring = writing.reading.ring
        self.match = found
        self.updates = updates
        self.axes = {a: chr(97 + i) for i, a in enumerate(axes_of(found.linear.index))}
        self.nodes: list[fx.Node] = []
        self.tensors: dict[int, str] = {}
        self.heads: list[str] = []
        self.means = Means(self.ring, found, self.axes)
        self.centre, self.shift = self._centred()
        self.special, self.variances, self.about_zero = self._moments()

    def program(self, epilogue: Epilogue | None) -> str:
        """The text, of which every part has a kernel."""
        found = self.match
        if len(self.axes) > 26:
            raise Unwritable("more axes than there are letters")
        over = " ".join(self.axes[a] for a in axes_of(found.linear.index) if a in found.over)
        parts = [f"scale = {self.sum(found.linear.scale)}"]
        if self.centre.terms:
            parts.insert(0, f"centre = {self.sum(self.centre)}")
        if self.shift.terms:
            parts.append(f"shift = {self.sum(self.shift)}")
        for place, update in enumerate(self.updates):
            along = axes_of(update.dims)
            if along != [a for a in self.kept() if a in along]:
                raise Unwritable("a buffer along other axes")
            parts.append(f"u{place} = {self.sum(update.value)}")
        if self.writing.result_dtype != dtype_of(found.linear.source):
            parts.append(f"to {str(self.writing.result_dtype).removeprefix('torch.')}")
        if epilogue is not None:
            parts += [epilogue.activation] + ["residual"] * (epilogue.residual is not None)
        zero = " about zero" if self.about_zero else ""
        heads = [*self.heads, *self.means.texts]
        text = "; ".join([f"x[{self._dims()}] over {over}{zero}", *heads, *parts])
        reason = check_program(text)
        if reason is not None:
            raise Unwritable(reason)
        return text

    def kept(self) -> list[Axis]:
        """The axes of the groups, along which updates are made."""
        return [a for a in axes_of(self.match.linear.index) if a not in self.match.over]

    def _dims(self) -> str:
        """The axes of the dimensions, all but one of a dimension with their sizes."""
        words = []
        linear = self.match.linear
        for dim, size in zip(linear.index, shape_of(linear.source), strict=True):
            if not dim and size != 1:
                raise Unwritable("a tensor that was expanded")
            unknown = [a for a in dim if not isinstance(a.size, int)] or list(dim[-1:])
            if len(unknown) > 1:
                raise Unwritable("a dimension that is split into parts of unknown sizes")
            named = [self.axes[a] + ("" if a in unknown else f"={a.size}") for a in dim]
            words.append(named[0] if len(named) == 1 else f"({' '.join(named)})")
        return " ".join(words)

    def _centred(self) -> tuple[Polynomial, Polynomial]:
        """What is subtracted from x first, and what is added last."""
        linear = self.match.linear
        for c in (centre(self.writing.reading, self.match), self.match.moments.mean):
            if c is not None:
                rest = added(linear.shift, self.ring.multiply(linear.scale, c))
                if len(rest.terms) < len(linear.shift.terms):
                    return c, rest
        return ZERO, linear.shift

    def _moments(self) -> tuple[dict[int, str], list[tuple[int, Polynomial, str]], bool]:
        """Names of E[x] and E[x^2], and V with and without a gradient."""
        moments, stop = self.match.moments, self.ring.stop
        mean, square = moments.mean, moments.square
        updates = (update.value for update in self.updates)
        used = self.means.statistics(self.match.linear.scale, self.centre, self.shift, *updates)
        means = [_base(p) for p in (mean, stop(mean))]
        special: dict[int, str] = {}
        variances = []
        about_zero = not used & set(means)
        for mark, change in (("s", stop), ("", lambda p: p)):
            first, second = change(mean), change(square)
            special[_base(first)] = f"M{mark}"
            special[_base(second)] = f"V{mark}" if about_zero else f"(V{mark} + M{mark}**2)"
            if not about_zero:
                variance = added(second, self.ring.multiply(first, first), -1)
                variances.append((_base(second), variance, f"V{mark}"))
            wide, further = self.means.moments(mark, change, about_zero=about_zero)
            special |= wide
            variances += further
        if used - special.keys() - self.means.values.keys():
            raise Unwritable("another statistic than the mean and the variance")
        return special, variances[::-1], about_zero

    def sum(self, polynomial: Polynomial) -> str:
        """A polynomial as a text."""
        for square, variance, name in self.variances:
            lead = factor_of(polynomial, square)
            if lead.terms:
                rest = added(polynomial, self.ring.multiply(lead, variance), -1)
                if len(rest.terms) < len(polynomial.terms):
                    more = f" + {self.sum(rest)}" if rest.terms else ""
                    return f"({self.sum(lead)})*{name}{more}"
        exact = self._keeps_digits(polynomial)
        parts = [self._part(*part, exact) for part in self._by_statistic(polynomial).items()]
        return " + ".join(parts) or "0"

    def _by_statistic(self, polynomial: Polynomial) -> dict[Monomial, Polynomial]:
        """What multiplies each statistic."""
        found: dict[Monomial, dict[Monomial, Number]] = {}
        for monomial, coefficient in polynomial.terms.items():
            statistic = tuple(i for i in monomial if self.ring.bases[i[0]].moments)
            rest = tuple(i for i in monomial if i not in statistic)
            found.setdefault(statistic, {})[rest] = coefficient
        return {statistic: Polynomial(terms) for statistic, terms in found.items()}

    def _keeps_digits(self, polynomial: Polynomial) -> bool:
        """Whether a sum of statistics cancels, so that only double precision keeps its digits.

        Raises:
            Unwritable: that would not keep them either.
        """
        if not self.writing.emitter.cancels(polynomial):
            return False
        bases = self.ring.bases
        degrees = (sum(e for b, e in m if bases[b].moments) for m in polynomial.terms)
        if self.writing.dtype == torch.float64 or max(degrees) > HIGHEST:
            raise Unwritable(LOST)
        return True

    def _part(self, statistic: Monomial, factor: Polynomial, exact: bool) -> str:
        """A statistic times what has none: that is one tensor, or computed beside the kernel.

        What is computed beside it, or for each element, is rounded, which a sum that has to be
        exact does not stand.
        """
        if exact and self.ring.axes(factor) & self.match.over:
            raise Unwritable(LOST)
        if statistic and factor.constant == 1:
            return self._term(statistic, 1)
        several = len([m for m in factor.terms if m]) > 1 or not self._is_plain(factor)
        if exact and several and self.means.values and self._is_plain(factor):
            several = False  # the kernel has moments with all their digits, and adds as exactly
        if several and self.ring.raw(factor):
            if exact:
                raise Unwritable(LOST)
            written = self._written(factor)
        else:
            written = " + ".join(self._term(m, c) for m, c in factor.terms.items())
        return f"{self._term(statistic, 1)}*({written})" if statistic else written

    def _is_plain(self, factor: Polynomial) -> bool:
        return all(
            isinstance(self.ring.bases[b], Atom | Extent) and isinstance(e, int)
            for m in factor.terms
            for b, e in m
        )

    def _written(self, factor: Polynomial) -> str:
        """A small tensor of the user's tensors, written as their code has it."""
        runs = self.ring.axes(factor)
        own = [a for a in self.axes if a in runs]
        if set(own) != runs or runs == self.match.linear.axes:
            raise Unwritable("a tensor as large as the normalised one")
        emitter = self.writing.along(tuple((axis,) for axis in own))
        node = emitter.tensor(factor)
        if not is_tensor(node):
            raise Unwritable("a number that is known only when the graph runs")
        return self._named(node, own, fixed=not self._has_gradient(factor))

    def _has_gradient(self, factor: Polynomial) -> bool:
        return any(self.ring.differentiable(source) for source in self.ring.raw(factor))

    def _term(self, monomial: Monomial, coefficient: Number) -> str:
        factors = [f"({_number(coefficient)})"] if coefficient != 1 or not monomial else []
        for base_id, exponent in monomial:
            base = self._base(self.ring.bases[base_id])
            factors.append(base if exponent == 1 else f"{base}**({exponent})")
        return "*".join(factors)

    def _base(self, base: Base) -> str:
        if base.id in self.special:
            return self.special[base.id]
        if isinstance(base, Sum):
            return f"({self.sum(base.polynomial)})"
        if isinstance(base, Extent):
            return self._extent(base)
        if isinstance(base, Function):
            return self._function(base)
        if isinstance(base, Reduction):
            value = self.sum(self.means.values[base.id])
            self.special[base.id] = self.means.define(base, value)
            return self.special[base.id]
        assert isinstance(base, Atom)
        if base.id not in self.tensors:
            self.tensors[base.id] = self._tensor(base)
        return self.tensors[base.id]

    def _function(self, base: Function) -> str:
        """A root, or the larger of a statistic and a number; the number stands in any place."""
        values = sorted(base.arguments, key=lambda argument: argument.constant is not None)
        if base.name not in (*FUNCTIONS, "clamp_max") or any(
            v.constant is None for v in values[1:]
        ):
            raise Unwritable(f"no kernel has the function {base.name}")
        written = [f"({self.sum(value)})" for value in values]
        if base.name == "clamp_max":
            return f"(-Larger(-{written[0]}, -{written[1]}))"
        return f"{FUNCTIONS[base.name]}({', '.join(written)})"

    def _extent(self, base: Extent) -> str:
        """A symbolic size by the extents of the axes of x."""
        size = sympy.sympify(base.size)
        known = {a.size: sympy.Symbol(f"N{letter}") for a, letter in self.axes.items()}
        size = size.xreplace({s: known[s] for s in size.free_symbols if s in known})
        if not all(str(symbol).startswith("N") for symbol in size.free_symbols):
            raise Unwritable("a size that is none of its axes'")
        return f"({size})"

    def _tensor(self, base: Atom) -> str:
        node, linear = base.source, self.match.linear
        if not is_tensor(node):
            raise Unwritable("a number that is known only when the graph runs")
        own: list[Axis] = axes_of(base.index)
        if not set(own) <= self.axes.keys() or set(own) == linear.axes:
            raise Unwritable("a tensor as large as the normalised one")
        sizes = zip(base.index, shape_of(node), strict=True)
        if any(not dim and size != 1 for dim, size in sizes):
            raise Unwritable("a tensor that was expanded")
        fixed = base.stopped or not self.ring.differentiable(node)
        if not dtype_of(node).is_floating_point:
            node = self.writing.emitter.call(aten.to.dtype, node, self.writing.dtype)
        return self._named(node, own, fixed=fixed)

    def _named(self, node: fx.Node, own: list[Axis], *, fixed: bool) -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(current(node))
        letters = " ".join(self.axes[a] for a in own)
        self.heads.append(f"{name}[{letters}]{' fixed' if fixed else ''}")
        return name


def _base(polynomial: Polynomial) -> int:
    (base,) = polynomial.bases()
    return base


def _number(value: Number) -> str:
    if not math.isfinite(value):
        raise Unwritable(f"no kernel has the number {float(value)}")
    return repr(value) if isinstance(value, float) else str(Fraction(value))
