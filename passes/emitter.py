"""Turns formulas back into nodes: small tensors laid out to broadcast against a norm's input."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from bnrewrite.algebra import Reading
from bnrewrite.algebra.axes import Dims, axes_of
from bnrewrite.algebra.calls import dtype_of, is_tensor, name_of, narrows
from bnrewrite.algebra.expression import (
    MAXIMA,
    ZERO,
    Atom,
    Base,
    Exponent,
    Extent,
    Function,
    Monomial,
    Number,
    Polynomial,
    Reduction,
    Sum,
    added,
    factor_of,
    inverse,
    is_even,
    magnitude,
    normalised,
    scaled,
)
from bnrewrite.algebra.ring import Ring
from bnrewrite.algebra.site import Moments
from bnrewrite.algebra.stored import CUT, cut_from
from bnrewrite.algebra.sums import wholes

from .nodes import Nodes, Sizes, Unwritable, Value, aten, current, plain

Reusable = dict[Any, tuple[fx.Node, Dims, Number, bool]]
# (node, factor, power): a base is ``(factor * node) ** power``
Unit = tuple[Callable[[], fx.Node], float, int]


CLAMPS = {"clamp_min": aten.clamp_min.default, "clamp_max": aten.clamp_max.default}
TWO = {**CLAMPS, "maximum": aten.maximum.default, "minimum": aten.minimum.default}


class Emitter(Nodes):
    """Writes formulas before one node of a graph.

    Args:
        reading: the meanings of the graph.
        before: new nodes go in front of this one and inherit its origin.
        layout: the dimensions that emitted tensors have, those that do not vary being of size 1.
        dtype: the least precision in which small tensors are computed.
        reusable: the user's own statistics, by formula; None: nothing of the user's is taken.
        sizes: nodes for symbolic sizes; those that are written are added.

    Attributes:
        given: nodes for bases, written when they are needed.
        variances: nodes for V of moments, likewise.
        copies: the graph runs as it is written: a backward has to find stored values unchanged.
        units: nodes of which bases are multiples or powers.
    """

    def __init__(
        self,
        reading: Reading,
        before: fx.Node,
        layout: Dims,
        dtype: torch.dtype,
        reusable: Reusable | None,
        sizes: Sizes,
    ) -> None:
        super().__init__(before, layout, sizes)
        self.dtype = dtype
        self.reading = reading
        self.ring = reading.ring
        self.reusable = reusable
        self.given: dict[int, Callable[[], Value]] = {}
        self.variances: list[tuple[Moments, Callable[[], Value]]] = []
        self.units: dict[int, Unit] = {}
        self.copies = False
        self._written: dict[Any, Value] = {}

    def tensor(self, polynomial: Polynomial) -> Value:
        """A polynomial as a number or a node in the layout."""
        constant = polynomial.constant
        if constant is not None:
            return plain(constant)
        key = polynomial.key
        if key not in self._written:
            self._written[key] = self.reused(polynomial) or self._sum(polynomial)
        return self._written[key]

    def reused(self, polynomial: Polynomial, *, at_any_cost: bool = False) -> Value | None:
        """A node of the user's with this meaning, up to a number.

        Args:
            polynomial: what is looked for.
            at_any_cost: take also what costs a further pass over the tensor, as M beside V does.
        """
        if not self.reusable or not self.ring.moments(polynomial):
            return None
        if self.units and self._is_measured(polynomial):
            return None
        lettered, names = self.ring.lettered(polynomial, axes_of(self.layout))
        unit, lead = normalised(lettered)
        entry = self.reusable.get(unit.key)
        if entry is None:
            return None
        node, dims, coefficient, direct = entry
        back = {letter: axis for axis, letter in names.items()}
        dims = tuple(tuple(back.get(a, a) for a in dim) for dim in dims)
        slow = not direct and self.given and self._has_mean(polynomial)
        if slow and not at_any_cost and not _is_root(self.ring, polynomial):
            return None
        try:
            placed = self.place(current(node), dims)
        except Unwritable:
            return None
        ratio = lead / coefficient
        return placed if abs(float(ratio) - 1) < 1e-14 else self.times(placed, ratio)

    def _is_measured(self, polynomial: Polynomial) -> bool:
        """Whether every statistic inside has a unit: then it is written from that."""
        for base_id in polynomial.bases():
            base = self.ring.bases[base_id]
            if base_id in self.units or not base.moments:
                continue
            if isinstance(base, Sum):
                inside: tuple[Polynomial, ...] = (base.polynomial,)
            elif isinstance(base, Function) and base.name in MAXIMA:
                inside = base.arguments
            else:
                return False
            if not all(self._is_measured(p) for p in inside):
                return False
        return True

    def _has_mean(self, polynomial: Polynomial) -> bool:
        """Whether E[x] is inside: then V is too, and ``var_mean`` gives both in one go."""
        means = {next(iter(m.mean.bases())) for m, _ in self.variances}
        return any(base.id in means for base in self.ring.within(polynomial))

    def _sum(self, polynomial: Polynomial) -> Value:
        for moments, variance in self.variances:
            lead, rest = self._spread(polynomial, moments)
            if lead.terms and not self.cancels(rest, lead):
                return self.plus(self.times(variance(), self.tensor(lead)), self.tensor(rest))
        cancels = self.cancels(polynomial)
        common = set.intersection(*(set(monomial) for monomial in polynomial.terms))
        if not cancels:  # a statistic of all terms multiplies their sum, as it does in its code
            common = {i for i in common if self.ring.bases[i[0]].moments}
        if common and len(polynomial.terms) > 1:
            terms = polynomial.terms.items()
            rest = Polynomial({tuple(i for i in m if i not in common): c for m, c in terms})
            return self.times(self._term(tuple(sorted(common)), 1), self.tensor(rest))
        if not cancels:
            return self._total(self._grouped(polynomial))
        known = self.reused(polynomial, at_any_cost=True)
        if known is None:
            raise Unwritable("a sum in it would lose digits in another order of operations")
        return known

    def _grouped(self, polynomial: Polynomial) -> Polynomial:
        """A polynomial in which the user's own sums stand as one base each."""
        if len(polynomial.terms) < 2 or self.reusable is None:
            return polynomial
        for whole in wholes(self.reading, polynomial, self.before):
            if narrows(self.dtype, dtype_of(whole.node)):
                continue
            rest = whole.taken_out_of(polynomial)
            if rest is polynomial:
                continue
            try:
                key = Polynomial({((whole.base.id, 1),): 1}).key
                self._written[key] = self.place(current(whole.node), whole.dims)
            except Unwritable:
                continue
            polynomial = rest
        return polynomial

    def _spread(self, polynomial: Polynomial, moments: Moments) -> tuple[Polynomial, Polynomial]:
        """``lead * V + rest`` where that is shorter, else a lead of zero."""
        lead = factor_of(polynomial, moments.square.bases().pop())
        if lead.terms:
            spread = self.ring.multiply(lead, moments.variance(self.ring))
            rest = added(polynomial, spread, -1)
            if len(rest.terms) < len(polynomial.terms):
                return lead, rest
        return ZERO, polynomial

    def cancels(self, polynomial: Polynomial, lead: Polynomial = ZERO) -> bool:
        """Whether ``lead * V`` and the statistics in a sum may be differences of like numbers."""
        bases = self.ring.bases
        statistics: dict[Monomial, Number] = {}  # each with its least coefficient
        for monomial, coefficient in polynomial.terms.items():
            factors = tuple(item for item in monomial if bases[item[0]].moments)
            if factors:
                statistics[factors] = min(coefficient, statistics.get(factors, coefficient))
        if len(statistics) + bool(lead.terms) <= 1:
            return False
        coefficients = [*lead.terms.values(), *statistics.values()]
        return any(c < 0 for c in coefficients) or any(
            not (bases[b].nonnegative or is_even(e) or isinstance(bases[b], Atom))
            for factors in statistics
            for b, e in factors
        )

    def _total(self, polynomial: Polynomial) -> Value:
        total: Value = 0
        positive_first = sorted(polynomial.terms.items(), key=lambda item: item[1] < 0)
        for monomial, coefficient in positive_first:
            term = self._term(monomial, magnitude(coefficient), plain=coefficient == 1)
            if coefficient < 0 and isinstance(total, fx.Node):
                total = self._binary(aten.sub.Tensor, operator.sub, total, term)
            else:
                total = self.plus(total, term if coefficient > 0 else self.times(term, -1))
        return total

    def _term(self, monomial: Monomial, coefficient: Number, *, plain: bool = True) -> Value:
        """Coefficient * monomial, the numbers of all its factors in one.

        Where there is a number, some factor times that number is what the user's product has.
        """
        result: Value = 1
        statistics = tuple(i for i in monomial if self.ring.bases[i[0]].moments)
        if len(statistics) > 1:
            known = self.reused(Polynomial({statistics: 1}))
            if known is not None:
                result, monomial = known, tuple(i for i in monomial if i not in statistics)
        for base_id, exponent in sorted(monomial, key=lambda item: item[1] < 0):
            base = self.ring.bases[base_id]
            node, factor, power = self._measured(base)
            if self.copies and len(monomial) > 1 and self._may_change(base, monomial, plain):
                node = self.call(aten.clone.default, node)
            if exponent < 0 and not is_tensor(node) and self._may_raise(base, exponent, result):
                raise Unwritable("it divides by a size that may be zero")
            exponent *= power
            if factor != 1:
                coefficient = float(coefficient) * float(factor) ** float(exponent)
            if exponent == -1:
                result = self.over(result, node)
            else:
                result = self.times(result, self.power(node, exponent))
        return self.times(result, coefficient)

    def _may_change(self, base: Base, monomial: Monomial, plain: bool) -> bool:
        """Whether a product would save a given tensor that the user's code writes to later."""
        differentiable, product = self.ring.differentiable, Polynomial({monomial: 1})
        return (
            isinstance(base, Atom)
            and isinstance(base.source, fx.Node)
            and (base.source.op == "placeholder" or name_of(base.source) in CUT)
            and cut_from(base.source).op == "placeholder"
            and is_tensor(base.source)
            and not (plain and differentiable(base.source))
            and any(differentiable(source) for source in self.ring.raw(product))
        )

    def _may_raise(self, base: Base, exponent: Exponent, result: Value) -> bool:
        """Whether Python's division by a size raises where a tensor's gives inf.

        A number that was read out of a tensor is divided by in Python in the user's code too.
        """
        if self.ring.never_zero(base) or (exponent == -1 and is_tensor(result)):
            return False
        return not isinstance(base, Atom) and not _is_read_out(base)

    def _measured(self, base: Base) -> tuple[Value, Number, int]:
        """A node, a number and a power: the base is ``(number * node) ** power``."""
        if base.id in self.units:
            node, factor, power = self.units[base.id]
            return node(), factor, power
        if isinstance(base, Sum):
            for monomial in base.polynomial.terms:
                if len(monomial) == 1 and monomial[0][1] == 1 and monomial[0][0] in self.units:
                    _, factor, power = self.units[monomial[0][0]]
                    whole = factor**power
                    return self.tensor(scaled(base.polynomial, inverse(whole))), whole, 1
        return self.base(base), 1, 1

    def base(self, base: Base) -> Value:
        """One base as a node in the layout."""
        if base.id in self.given:
            return self.given[base.id]()
        single = Polynomial({((base.id, 1),): 1})
        key = single.key
        if key not in self._written:
            self._written[key] = self.reused(single) or self._base(base)
        return self._written[key]

    def _base(self, base: Base) -> Value:
        if isinstance(base, Extent):
            return self.extent(base.size)
        if isinstance(base, Sum):
            return self.tensor(base.polynomial)
        if isinstance(base, Function):
            return self._function(base)
        if isinstance(base, Reduction):
            return self._reduction(base)
        assert isinstance(base, Atom)
        assert isinstance(base.source, fx.Node)
        if not isinstance(base.source.meta.get("val"), torch.Tensor):
            return base.source
        node = self.call(aten.detach.default, base.source) if base.stopped else base.source
        dtype = dtype_of(node)
        if not dtype.is_floating_point or narrows(self.dtype, dtype):
            node = self.call(aten.to.dtype, node, self.dtype)
        return self.place(current(node), base.index)

    def _function(self, base: Function) -> Value:
        if base.name == "root":
            raise Unwritable("a standard deviation whose gradient is zero at zero")
        arguments = [self.tensor(a) for a in base.arguments]
        if base.name in TWO:
            arguments.sort(key=lambda a: not is_tensor(a))
            if not is_tensor(arguments[0]) or (base.name in CLAMPS and is_tensor(arguments[1])):
                raise Unwritable(f"a {base.name} of numbers")
            if base.name not in CLAMPS and not is_tensor(arguments[1]):
                arguments[1] = self.call(aten.full_like.default, arguments[0], arguments[1])
            return self.call(TWO[base.name], *arguments)
        if base.name not in ("abs", "exp", "log"):
            raise Unwritable("a norm whose gradient is zero at zero")
        plain = {"abs": aten.abs.default, "exp": aten.exp.default, "log": aten.log.default}
        return self.call(plain[base.name], *arguments)

    def _reduction(self, base: Reduction) -> Value:
        if base.kind != "mean":
            raise Unwritable("a maximum")
        bound = tuple((axis,) for axis in sorted(base.bound, key=lambda a: a.serial))
        layout = (*self.layout, *bound)
        inner = Emitter(self.reading, self.before, layout, self.dtype, self.reusable, self.sizes)
        value = inner.tensor(Polynomial({base.monomial: 1}))
        assert isinstance(value, fx.Node)
        dims = list(range(len(self.layout), len(inner.layout)))
        return self.call(aten.mean.dim, value, dims)


def _is_root(ring: Ring, polynomial: Polynomial) -> bool:
    """Whether this is a number times a ``norm`` or ``std``, which only the user's node has."""
    bases = [ring.bases[b] for b in polynomial.bases()]
    return (
        len(polynomial.terms) == len(bases) == 1
        and isinstance(bases[0], Function)
        and bases[0].name == "root"
    )


def _is_read_out(base: Base) -> bool:
    """Whether a size is a number that was read out of a tensor: its symbols are named so."""
    if not isinstance(base, Extent):
        return False
    symbols = sympy.sympify(base.size).free_symbols
    return bool(symbols) and all(str(symbol).startswith("u") for symbol in symbols)
