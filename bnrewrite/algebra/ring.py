"""Arithmetic of meanings: products, powers, reductions, substitutions.

One ``Ring`` holds the bases of one graph. All operations return expanded polynomials.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any

import sympy

from .axes import Axis, Dim, Dims, Opaque, Size, product
from .expression import (
    LIMIT,
    ONE,
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
    exact,
    inverse,
    is_even,
    number,
    scaled,
)
from .signs import nonnegative, positive

Leaf = Callable[[Base], Polynomial | None]


class Ring:
    """The bases of one graph, and arithmetic over them.

    Args:
        differentiable: whether a source carries a gradient; ``detach`` of one that does not is
            the identity.
    """

    def __init__(self, differentiable: Callable[[Any], bool] = lambda source: True) -> None:
        self.bases: list[Base] = []
        self.differentiable = differentiable
        self._interned: dict[tuple[object, ...], Base] = {}
        self._order: dict[object, int] = {}
        self._bound: dict[tuple[int, int, Size], Axis] = {}

    # -- bases ---------------------------------------------------------------------------------

    def atom(
        self,
        source: object,
        index: Dims,
        *,
        stopped: bool = False,
        moments: frozenset[object] = frozenset(),
    ) -> Polynomial:
        """A tensor read at an index. ``moments``: what an opaque function of statistics holds."""
        stopped = stopped and self.differentiable(source)
        self._order.setdefault(source, len(self._order))
        axes = frozenset(a for dim in index for a in dim)
        raw = frozenset() if moments else frozenset((source,))
        return self._single(
            ("atom", source, index, stopped),
            lambda i: Atom(i, axes, moments, raw, False, 0, source, index, stopped),
        )

    def extent(self, size: Size) -> Polynomial:
        """A size as a number or a positive symbol (products are taken apart)."""
        if isinstance(size, int):
            return number(size)
        if size.is_Integer:
            return number(int(size))
        if size.is_Rational:
            return number(Fraction(int(size.p), int(size.q)))
        if size.is_Float:
            return number(float(size))
        if size.is_Mul:
            result = ONE
            for factor in size.args:
                result = self.multiply(result, self.extent(factor))
            return result
        if size.is_Add:
            result = ZERO
            for term in size.args:
                result = added(result, self.extent(term))
            return result
        if isinstance(size, sympy.Pow) and size.exp.is_Integer:
            return self.power(self.extent(size.base), int(size.exp))
        return self._single(
            ("extent", size),
            lambda i: Extent(i, frozenset(), frozenset(), frozenset(), True, 0, size),
        )

    def count(self, axes: Iterable[Axis]) -> Polynomial:
        """The number of elements that the axes index."""
        return self.extent(product(axis.size for axis in axes))

    def function(self, name: str, *arguments: Polynomial, nonneg: bool = False) -> Polynomial:
        """An uninterpreted function of polynomials."""
        return self._single(
            ("function", name, *(a.key for a in arguments)),
            lambda i: Function(i, *self._traits(arguments), nonneg, self._level(arguments),
                               name, arguments),
        )  # fmt: skip

    # -- arithmetic ----------------------------------------------------------------------------

    def multiply(self, left: Polynomial, right: Polynomial) -> Polynomial:
        """The expanded product."""
        if len(left.terms) * len(right.terms) > 4 * LIMIT:
            raise Opaque("more terms than a norm has")
        result = ZERO
        simple: dict[Monomial, Number] = {}
        for a, x in left.terms.items():
            for b, y in right.terms.items():
                monomial, expand = self._merge(a, b)
                if expand:
                    extra = Polynomial({monomial: x * y})
                    for polynomial in expand:
                        extra = self.multiply(extra, polynomial)
                    result = added(result, extra)
                else:
                    simple[monomial] = simple.get(monomial, 0) + x * y
        simple = {m: c for m, c in simple.items() if c != 0}
        return added(result, Polynomial(simple)) if result.terms else added(ZERO, Polynomial(simple))

    def divide(self, left: Polynomial, right: Polynomial) -> Polynomial:
        """left / right."""
        ratio = self._proportion(left, right)
        if ratio is not None and positive(self, right):
            return number(ratio)
        return self.multiply(left, self.power(right, -1))

    def power(self, polynomial: Polynomial, exponent: Exponent | float) -> Polynomial:
        """polynomial ** exponent, for exact exponents."""
        exponent = exact(exponent)
        if exponent == 0:
            return ONE
        if exponent == 1:
            return polynomial
        if not polynomial.terms:
            raise Opaque("a power of zero")
        if len(polynomial.terms) == 1:
            ((monomial, coefficient),) = polynomial.terms.items()
            return self._power_of_monomial(monomial, coefficient, exponent)
        if isinstance(exponent, int) and 0 < exponent <= 4:
            result = polynomial
            for _ in range(exponent - 1):
                result = self.multiply(result, polynomial)
            return result
        lead = polynomial.terms[self._leading(polynomial)]
        content = abs(lead)
        base = self._sum(scaled(polynomial, inverse(content)))
        return Polynomial({((base.id, exponent),): _number_power(content, exponent)})

    def root(self, polynomial: Polynomial) -> Polynomial:
        """The square root whose gradient at zero is zero (``norm``, ``std``)."""
        if positive(self, polynomial):
            return self.power(polynomial, Fraction(1, 2))
        if len(polynomial.terms) == 1:
            ((monomial, coefficient),) = polynomial.terms.items()
            sizes = tuple(item for item in monomial if isinstance(self.bases[item[0]], Extent))
            rest = tuple(item for item in monomial if item not in sizes)
            outer = self._power_of_monomial(sizes, coefficient, Fraction(1, 2))
            if not rest:
                return outer
            return self.multiply(outer, self._root(Polynomial({rest: 1})))
        content = abs(polynomial.terms[self._leading(polynomial)])
        inner = self._root(scaled(polynomial, inverse(content)))
        return scaled(inner, _number_power(content, Fraction(1, 2)))

    def absolute(self, polynomial: Polynomial) -> Polynomial:
        """The absolute value."""
        if nonnegative(self, polynomial):
            return polynomial
        if len(polynomial.terms) == 1:
            ((monomial, coefficient),) = polynomial.terms.items()
            if coefficient != 1:
                return scaled(self.absolute(Polynomial({monomial: 1})), abs(coefficient))
        return self.function("abs", polynomial, nonneg=True)

    # -- reductions ----------------------------------------------------------------------------

    def mean(self, polynomial: Polynomial, over: Iterable[Axis]) -> Polynomial:
        """The expectation over axes, taken apart term by term."""
        return self._reduce("mean", polynomial, frozenset(over))

    def maximum_over(
        self, polynomial: Polynomial, over: Iterable[Axis], kind: str = "amax"
    ) -> Polynomial:
        """The maximum over axes of one nonnegatively scaled monomial."""
        if len(polynomial.terms) != 1 or next(iter(polynomial.terms.values())) < 0:
            raise Opaque("a maximum of a sum")
        return self._reduce(kind, polynomial, frozenset(over))

    def _reduce(self, kind: str, polynomial: Polynomial, over: frozenset[Axis]) -> Polynomial:
        result = ZERO
        for monomial, coefficient in polynomial.terms.items():
            inside = tuple(item for item in monomial if self.bases[item[0]].axes & over)
            outside = tuple(item for item in monomial if not self.bases[item[0]].axes & over)
            if kind != "mean" and not all(
                is_even(e) or self.bases[b].nonnegative for b, e in outside
            ):
                raise Opaque("a maximum of a product with a factor of unknown sign")
            term = Polynomial({outside: coefficient})
            if inside:
                term = self.multiply(term, self._reduce_monomial(kind, inside, over))
            result = added(result, term)
        return result

    def _reduce_monomial(self, kind: str, monomial: Monomial, over: frozenset[Axis]) -> Polynomial:
        free = frozenset().union(*(self.bases[b].axes for b, _ in monomial))
        bound = over & free
        if len(monomial) == 1 and monomial[0][1] == 1:
            inner = self.bases[monomial[0][0]]
            if isinstance(inner, Reduction) and inner.kind == kind:
                monomial, bound = inner.monomial, bound | inner.bound
        return self._reduction(kind, *self._canonical(monomial, bound))

    def _reduction(self, kind: str, monomial: Monomial, bound: frozenset[Axis]) -> Polynomial:
        inner = [self.bases[b] for b, _ in monomial]
        axes = frozenset().union(*(b.axes for b in inner)) - bound
        sources = frozenset().union(*(b.moments | b.raw for b in inner))
        sign = all(is_even(e) or self.bases[b].nonnegative for b, e in monomial)
        level = 1 + max(b.level for b in inner)
        return self._single(
            ("reduction", kind, monomial, bound),
            lambda i: Reduction(i, axes, sources, frozenset(), sign, level, kind, monomial, bound),
        )

    def _canonical(self, monomial: Monomial, bound: frozenset[Axis]) -> tuple[Monomial, frozenset[Axis]]:
        """Rename bound axes by their order of appearance, fusing neighbours that were split."""
        level = 1 + max(self.bases[b].level for b, _ in monomial)
        ordered = sorted(monomial, key=lambda item: (self._rank(self.bases[item[0]]), item[1]))
        dims = [d for b, _ in ordered for d in self._index(self.bases[b])]
        fused = _fusions(dims, bound)
        names: dict[Axis, Axis] = {}
        for dim in dims:
            for axis in dim:
                if axis in bound and axis not in names:
                    size = fused[axis][1] if axis in fused else axis.size
                    key = (level, len(names), size)
                    names[axis] = self._bound.setdefault(key, Axis(size))
        dropped = {follower for chain, _ in fused.values() for follower in chain[1:]}

        def rename(dim: Dim) -> Dim:
            return tuple(names.get(a, a) for a in dim if a not in dropped)

        polynomial = self.reindex(Polynomial({monomial: 1}), rename)
        ((renamed, _),) = polynomial.terms.items()
        return renamed, frozenset(names[a] for a in names if a not in dropped)

    # -- rewriting -----------------------------------------------------------------------------

    def substitute(self, polynomial: Polynomial, moves: dict[Axis, Dim]) -> Polynomial:
        """Replace axes by tuples of axes everywhere."""
        if not moves or not any(self.bases[b].axes & moves.keys() for b in polynomial.bases()):
            return polynomial
        return self.reindex(
            polynomial, lambda dim: tuple(p for a in dim for p in moves.get(a, (a,)))
        )

    def reindex(self, polynomial: Polynomial, rename: Callable[[Dim], Dim]) -> Polynomial:
        """Apply a renaming to every dimension of every atom's index."""

        def leaf(base: Base) -> Polynomial | None:
            if isinstance(base, Atom):
                index = tuple(rename(dim) for dim in base.index)
                return self.atom(base.source, index, stopped=base.stopped, moments=base.moments)
            return None

        return self.transform(polynomial, leaf)

    def stop(self, polynomial: Polynomial) -> Polynomial:
        """The same value with no gradient (``detach``)."""

        def leaf(base: Base) -> Polynomial | None:
            if isinstance(base, Atom):
                return self.atom(base.source, base.index, stopped=True, moments=base.moments)
            return None

        return self.transform(polynomial, leaf)

    def without_roots(self, polynomial: Polynomial) -> Polynomial:
        """Every root as a plain power: the same value, and the same gradient away from zero."""

        def leaf(base: Base) -> Polynomial | None:
            if isinstance(base, Function) and base.name == "root":
                return self.power(self.without_roots(base.argument), Fraction(1, 2))
            return None

        return self.transform(polynomial, leaf)

    def transform(self, polynomial: Polynomial, leaf: Leaf) -> Polynomial:
        """Rebuild a polynomial, replacing each base for which ``leaf`` gives a value."""
        cache: dict[int, Polynomial] = {}

        def rebuild(p: Polynomial) -> Polynomial:
            result = ZERO
            for monomial, coefficient in p.terms.items():
                term = number(coefficient)
                for base, exponent in monomial:
                    new = cache.get(base)
                    if new is None:
                        new = cache[base] = visit(self.bases[base])
                    if len(new.terms) == 1 and new.terms.get(((base, 1),)) == 1:
                        factor = Polynomial({((base, exponent),): 1})
                    else:
                        factor = self.power(new, exponent)
                    term = self.multiply(term, factor)
                result = added(result, term)
            return result

        def visit(base: Base) -> Polynomial:
            new = leaf(base)
            if new is not None:
                return new
            if isinstance(base, Reduction):
                inner = rebuild(Polynomial({base.monomial: 1}))
                return self._reduce(base.kind, inner, base.bound)
            if isinstance(base, Sum):
                return rebuild(base.polynomial)
            if isinstance(base, Function):
                arguments = [rebuild(a) for a in base.arguments]
                if base.name == "root":
                    return self.root(arguments[0])
                if base.name == "abs":
                    return self.absolute(arguments[0])
                return self.function(base.name, *arguments, nonneg=base.nonnegative)
            return Polynomial({((base.id, 1),): 1})

        return rebuild(polynomial)

    # -- traits --------------------------------------------------------------------------------

    def axes(self, polynomial: Polynomial) -> frozenset[Axis]:
        """The free axes."""
        return frozenset().union(*(self.bases[b].axes for b in polynomial.bases()))

    def moments(self, polynomial: Polynomial) -> frozenset[object]:
        """The sources that are reduced somewhere inside."""
        return frozenset().union(*(self.bases[b].moments for b in polynomial.bases()))

    def raw(self, polynomial: Polynomial) -> frozenset[object]:
        """The sources that stand outside every reduction."""
        return frozenset().union(*(self.bases[b].raw for b in polynomial.bases()))

    # -- inner workings ------------------------------------------------------------------------

    def _single(self, key: tuple[object, ...], make: Callable[[int], Base]) -> Polynomial:
        base = self._interned.get(key)
        if base is None:
            base = self._interned[key] = make(len(self.bases))
            self.bases.append(base)
        return Polynomial({((base.id, 1),): 1})

    def _sum(self, polynomial: Polynomial) -> Base:
        key = ("sum", polynomial.key)
        single = self._single(
            key,
            lambda i: Sum(i, *self._traits((polynomial,)), nonnegative(self, polynomial),
                          self._level((polynomial,)), polynomial),
        )  # fmt: skip
        return self.bases[next(iter(single.bases()))]

    def _root(self, polynomial: Polynomial) -> Polynomial:
        return self.function("root", polynomial, nonneg=True)

    def _traits(
        self, polynomials: Iterable[Polynomial]
    ) -> tuple[frozenset[Axis], frozenset[object], frozenset[object]]:
        polynomials = tuple(polynomials)
        axes, moments, raw = (
            frozenset().union(*(trait(p) for p in polynomials))
            for trait in (self.axes, self.moments, self.raw)
        )
        return axes, moments, raw

    def _level(self, polynomials: Iterable[Polynomial]) -> int:
        return max((self.bases[b].level for p in polynomials for b in p.bases()), default=0)

    def _merge(self, a: Monomial, b: Monomial) -> tuple[Monomial, list[Polynomial]]:
        if not a or not b:
            return a or b, []
        exponents = dict(a)
        expand: list[Polynomial] = []
        for base_id, exponent in b:
            old = exponents.get(base_id)
            if old is None:
                exponents[base_id] = exponent
                continue
            total = exact(old + exponent)
            base = self.bases[base_id]
            if (total == 0 or (old < 0) != (total < 0)) and not self._never_zero(base):
                raise Opaque("a factor that may be zero cancels")
            del exponents[base_id]
            if isinstance(base, Sum) and isinstance(total, int) and total > 0:
                expand.append(self.power(base.polynomial, total))
            elif isinstance(base, Function) and base.name == "root" and abs(total) >= 2:
                whole = int(total / 2)
                expand.append(self.power(base.argument, whole))
                if total - 2 * whole:
                    exponents[base_id] = exact(total - 2 * whole)
            elif total != 0:
                exponents[base_id] = total
        return tuple(sorted(exponents.items())), expand

    def _never_zero(self, base: Base) -> bool:
        if isinstance(base, Sum):
            return positive(self, base.polynomial)
        if isinstance(base, Function):
            if base.name == "maximum":
                return any(positive(self, a) for a in base.arguments)
            return base.name in ("exp", "sigmoid") or (
                base.name == "root" and positive(self, base.argument)
            )
        return (
            isinstance(base, Extent)
            and isinstance(base.size, sympy.Symbol)
            and base.size.name.startswith("s")
        )

    def _power_of_monomial(
        self, monomial: Monomial, coefficient: Number, exponent: Exponent
    ) -> Polynomial:
        if isinstance(exponent, int):
            result = number(_number_power(coefficient, exponent))
            for base_id, old in monomial:
                factor = self._power_of_base(base_id, exact(old * exponent))
                result = self.multiply(result, factor)
            return result
        if coefficient < 0:
            base = self._sum(Polynomial({monomial: coefficient}))
            return Polynomial({((base.id, exponent),): 1})
        result = number(_number_power(coefficient, exponent))
        rest: list[tuple[int, Exponent]] = []
        for base_id, old in monomial:
            base = self.bases[base_id]
            total = exact(old * exponent)
            if base.nonnegative or not isinstance(old, int):
                result = self.multiply(result, self._power_of_base(base_id, total))
            elif is_even(old):
                magnitude = self.absolute(Polynomial({((base_id, 1),): 1}))
                result = self.multiply(result, self.power(magnitude, total))
            else:
                rest.append((base_id, old))
        if rest:
            base = self._sum(Polynomial({tuple(rest): 1}))
            result = self.multiply(result, Polynomial({((base.id, exponent),): 1}))
        return result

    def _power_of_base(self, base_id: int, exponent: Exponent) -> Polynomial:
        base = self.bases[base_id]
        if isinstance(base, Sum) and isinstance(exponent, int) and exponent > 0:
            return self.power(base.polynomial, exponent)
        is_root = isinstance(base, Function) and base.name == "root"
        if is_root and isinstance(exponent, int) and abs(exponent) >= 2:
            whole = int(exponent / 2)
            rest = exponent - 2 * whole
            squares = self.power(base.argument, whole)  # type: ignore[attr-defined]
            return self.multiply(squares, Polynomial({((base_id, rest),): 1})) if rest else squares
        return Polynomial({((base_id, exponent),): 1})

    def _leading(self, polynomial: Polynomial) -> Monomial:
        """The term that is scaled to one: a moment if there is any, never the constant."""

        def rank(monomial: Monomial) -> tuple[bool, bool, Monomial]:
            reduced = any(self.bases[b].moments for b, _ in monomial)
            return (not monomial, not reduced, monomial)

        return min(polynomial.terms, key=rank)

    def _proportion(self, left: Polynomial, right: Polynomial) -> Number | None:
        if not right.terms or left.terms.keys() != right.terms.keys():
            return None
        ratios = [left.terms[m] * inverse(right.terms[m]) for m in right.terms]
        first = ratios[0]
        close = all(abs(float(r - first)) <= 1e-13 * abs(float(first)) for r in ratios)
        return first if close else None

    def _rank(self, base: Base) -> tuple[object, ...]:
        """An order of bases that does not depend on the names of axes."""
        if isinstance(base, Atom):
            return (0, self._order[base.source], int(base.stopped))
        if isinstance(base, Reduction):
            return (1, tuple(sorted(self._rank(self.bases[b]) for b, _ in base.monomial)))
        if isinstance(base, Function):
            return (2, base.name)
        return (3, base.id) if isinstance(base, Extent) else (4, len(base.axes))

    def _index(self, base: Base) -> list[Dim]:
        """The dimensions of all atoms inside a base, in a deterministic order."""
        if isinstance(base, Atom):
            return list(base.index)
        inside: Iterable[Monomial] = ()
        if isinstance(base, Reduction):
            inside = (base.monomial,)
        elif isinstance(base, Sum):
            inside = base.polynomial.terms
        elif isinstance(base, Function):
            inside = (m for a in base.arguments for m in a.terms)
        items = {b for monomial in inside for b, _ in monomial}
        ordered = sorted(items, key=lambda b: (str(self._rank(self.bases[b])), b))
        return [dim for b in ordered for dim in self._index(self.bases[b])]


def _fusions(dims: list[Dim], bound: frozenset[Axis]) -> dict[Axis, tuple[list[Axis], Size]]:
    """Chains of bound axes that stand side by side wherever they stand."""
    after: dict[Axis, set[Axis | None]] = {}
    before: dict[Axis, set[Axis | None]] = {}
    for dim in dims:
        for i, axis in enumerate(dim):
            after.setdefault(axis, set()).add(dim[i + 1] if i + 1 < len(dim) else None)
            before.setdefault(axis, set()).add(dim[i - 1] if i else None)

    def follower(axis: Axis) -> Axis | None:
        (next_axis, *others) = after[axis]
        if others or next_axis is None or next_axis not in bound:
            return None
        return next_axis if before[next_axis] == {axis} else None

    followers = {a: f for a in bound if a in after and (f := follower(a)) is not None}
    chains: dict[Axis, tuple[list[Axis], Size]] = {}
    for axis in followers.keys() - set(followers.values()):
        chain = [axis]
        while chain[-1] in followers:
            chain.append(followers[chain[-1]])
        chains[axis] = (chain, product(a.size for a in chain))
    return chains


def _number_power(value: Number, exponent: Exponent) -> Number:
    if value == 1:
        return 1
    if isinstance(exponent, int):
        if exponent > 0:
            return value**exponent
        return inverse(value**-exponent)
    return math.pow(float(value), float(exponent))
