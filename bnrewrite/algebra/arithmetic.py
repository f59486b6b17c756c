"""Products, powers and roots of polynomials, always expanded."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from typing import cast

import sympy

from .axes import Axis, Opaque, Size, product
from .expression import (
    LIMIT,
    MAXIMA,
    ONE,
    ZERO,
    Base,
    Exponent,
    Extent,
    Function,
    Monomial,
    Number,
    Polynomial,
    Sum,
    added,
    exact,
    inverse,
    magnitude,
    number,
    scaled,
)
from .interning import Interning
from .signs import is_extent_of_tensor, is_nonnegative_size, nonnegative, positive


class Arithmetic(Interning):
    """Arithmetic over the bases of one graph."""

    def extent(self, size: Size) -> Polynomial:
        """A size as a number or a symbol (products are taken apart)."""
        if isinstance(size, int):
            return number(size)
        if size.is_Integer:
            return number(int(size))
        if isinstance(size, sympy.Rational):
            return number(Fraction(int(size.p), int(size.q)))
        if size.is_Float:
            return number(float(size))
        if size.is_Mul:
            result = ONE
            for factor in size.args:
                result = self.multiply(result, self.extent(cast(Size, factor)))
            return result
        if size.is_Add:
            result = ZERO
            for term in size.args:
                result = added(result, self.extent(cast(Size, term)))
            return result
        if isinstance(size, sympy.Pow) and size.exp.is_Integer:
            return self.power(self.extent(size.base), int(size.exp))
        sign = is_nonnegative_size(size)
        return self._single(
            ("extent", size),
            lambda i: Extent(i, frozenset(), frozenset(), frozenset(), sign, 0, size),
        )

    def count(self, axes: Iterable[Axis]) -> Polynomial:
        """The number of elements that the axes index."""
        return self.extent(product(axis.size for axis in axes))

    def multiply(self, left: Polynomial, right: Polynomial) -> Polynomial:
        """The expanded product."""
        if len(left.terms) * len(right.terms) > 4 * LIMIT:
            raise Opaque("more terms than a norm has")
        result = ZERO
        simple: dict[Monomial, Number] = {}
        for a, x in left.terms.items():
            for b, y in right.terms.items():
                monomial, expand = self.merge(a, b)
                if expand:
                    extra = Polynomial({monomial: x * y})
                    for polynomial in expand:
                        extra = self.multiply(extra, polynomial)
                    result = added(result, extra)
                else:
                    simple[monomial] = simple.get(monomial, 0) + x * y
        simple = {m: c for m, c in simple.items() if c != 0}
        return (
            added(result, Polynomial(simple)) if result.terms else added(ZERO, Polynomial(simple))
        )

    def divide(self, left: Polynomial, right: Polynomial) -> Polynomial:
        """Left / right."""
        ratio = self._proportion(left, right)
        if ratio is not None and positive(self, right):
            return number(ratio)
        return self.multiply(left, self.power(right, -1))

    def power(self, polynomial: Polynomial, exponent: Exponent | float) -> Polynomial:
        """Polynomial ** exponent, for exact exponents."""
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
        content = magnitude(lead)
        base = self._sum(scaled(polynomial, inverse(content)))
        return Polynomial({((base.id, exponent),): _number_power(content, exponent)})

    def root(self, polynomial: Polynomial) -> Polynomial:
        """The square root whose gradient at zero is zero (``norm``, ``std``)."""
        if not polynomial.terms:
            return ZERO
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
        content = magnitude(polynomial.terms[self._leading(polynomial)])
        inner = self._root(scaled(polynomial, inverse(content)))
        return scaled(inner, _number_power(content, Fraction(1, 2)))

    def sum(self, polynomial: Polynomial) -> Sum:
        """A polynomial as one base."""
        base = self._sum(polynomial)
        assert isinstance(base, Sum)
        return base

    def absolute(self, polynomial: Polynomial) -> Polynomial:
        """The absolute value."""
        if nonnegative(self, polynomial):
            return polynomial
        if len(polynomial.terms) == 1:
            ((monomial, coefficient),) = polynomial.terms.items()
            if coefficient != 1:
                return scaled(self.absolute(Polynomial({monomial: 1})), magnitude(coefficient))
        return self.function("abs", polynomial, nonneg=True)

    # -- inner workings ------------------------------------------------------------------------

    def _sum(self, polynomial: Polynomial) -> Base:
        axes, moments, raw = self._traits((polynomial,))
        sign = nonnegative(self, polynomial)  # may intern a moment: before the base gets its id
        level = self._level((polynomial,))
        single = self._single(
            ("sum", polynomial.key),
            lambda i: Sum(i, axes, moments, raw, sign, level, polynomial),
        )
        return self.bases[single.bases().pop()]

    def _root(self, polynomial: Polynomial) -> Polynomial:
        return self.function("root", polynomial, nonneg=True)

    def merge(self, a: Monomial, b: Monomial) -> tuple[Monomial, list[Polynomial]]:
        """The product of two monomials, and sums that it must still be multiplied by."""
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
            flips = (old < 0) != (exponent < 0)
            heals = isinstance(total, int) and not (
                isinstance(old, int) and isinstance(exponent, int)
            )
            if (flips or heals) and not self.never_zero(base):
                raise Opaque("a factor that may be zero cancels, or a root of zero")
            if heals and not base.nonnegative:
                raise Opaque("a root that may not exist")
            del exponents[base_id]
            if isinstance(base, Sum) and isinstance(total, int) and total > 0:
                expand.append(self.power(base.polynomial, total))
            elif isinstance(base, Function) and base.name == "root" and magnitude(total) >= 2:
                whole = int(total / 2)
                expand.append(self.power(base.argument, whole))
                if total - 2 * whole:
                    exponents[base_id] = exact(total - 2 * whole)
            elif total != 0:
                exponents[base_id] = total
        return tuple(sorted(exponents.items())), expand

    def never_zero(self, base: Base) -> bool:
        """Whether a base is proven to be different from zero."""
        if isinstance(base, Sum):
            return positive(self, base.polynomial)
        if isinstance(base, Function):
            if base.name in MAXIMA:
                return any(positive(self, a) for a in base.arguments)
            return base.name in ("exp", "sigmoid") or (
                base.name == "root" and positive(self, base.argument)
            )
        return isinstance(base, Extent) and is_extent_of_tensor(base.size)

    def _power_of_monomial(
        self, monomial: Monomial, coefficient: Number, exponent: Exponent
    ) -> Polynomial:
        if isinstance(exponent, int):
            result = number(_number_power(coefficient, exponent))
            for base_id, old in monomial:
                total = exact(old * exponent)
                if isinstance(total, int) and not isinstance(old, int):
                    base = self.bases[base_id]
                    if not self.never_zero(base) or not base.nonnegative:
                        raise Opaque("the square of a root that may not exist")
                factor = self._power_of_base(base_id, total)
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
            sound = base.nonnegative and (old in (1, -1) or self.never_zero(base))
            if isinstance(total, int) and not isinstance(old, int) and not sound:
                raise Opaque("the power of a root that may not exist")
            if sound or not isinstance(old, int):
                result = self.multiply(result, self._power_of_base(base_id, total))
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


def _number_power(value: Number, exponent: Exponent) -> Number:
    if value == 1:
        return 1
    if isinstance(exponent, int):
        if exponent > 0:
            return value**exponent
        return inverse(value**-exponent)
    return math.pow(float(value), float(exponent))
