"""A site's formula as a sympy expression: x, M, V, w(c), eps as numbers."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import sympy
from torch import fx

from .expression import (
    Atom,
    Extent,
    Function,
    Number,
    Polynomial,
    Reduction,
    Sum,
    added,
    factor_of,
    scaled,
)
from .match import Match
from .ring import Ring
from .stored import is_stored, path_of, uncast


def formula(ring: Ring, match: Match) -> sympy.Expr:
    """``y`` as an expression in x, its moments M and V, and the other tensors by name."""
    writer = _Writer(ring, match)
    x, mean = sympy.Symbol("x"), writer.mean
    if match.part:
        number, weight = _content(match.weight)
        part = writer.scaled_part(number)
        weight, bias = writer.sum(weight), writer.sum(match.bias)
        if match.centred:
            return (x - mean) * part * weight + bias
        return (x * part + writer.sum(match.inner)) * weight + bias
    return x * writer.sum(match.linear.scale) + writer.sum(match.linear.shift)


class _Writer:
    def __init__(self, ring: Ring, match: Match) -> None:
        self.ring = ring
        self.match = match
        self.mean = sympy.Symbol("M", real=True)
        self.variance = sympy.Symbol("V", nonnegative=True)
        self.special: dict[int, sympy.Expr] = {}
        self.variances: list[tuple[int, Polynomial]] = []
        if match.kind != "affine" and match.over:
            variance, square = match.moments.variance(ring), match.moments.square
            for v, s in ((variance, square), (ring.stop(variance), ring.stop(square))):
                self.variances.append((s.bases().pop(), v))
            for polynomial, name in (
                (match.moments.mean, self.mean),
                (match.moments.square, self.variance + self.mean**2),
            ):
                for value in (polynomial, ring.stop(polynomial)):
                    ((monomial, _),) = value.terms.items()
                    self.special[monomial[0][0]] = name

    def scaled_part(self, factor: Number) -> sympy.Expr:
        """``factor * part``, the factor put back under the root that it was taken from."""
        base_id, exponent = self.match.part[0]
        base = self.ring.bases[base_id]
        if len(self.match.part) == 1 and isinstance(base, Sum) and factor > 0 and factor != 1:
            inner = scaled(base.polynomial, _clean(float(factor) ** (1 / float(exponent))))
            return self.sum(inner) ** sympy.Rational(Fraction(exponent))
        return _number(factor) * self.product(self.match.part)

    def sum(self, polynomial: Polynomial) -> sympy.Expr:
        for square, variance in self.variances:
            lead = factor_of(polynomial, square)
            if lead.terms:
                rest = added(polynomial, self.ring.multiply(lead, variance), -1)
                if len(rest.terms) < len(polynomial.terms):
                    return self.sum(lead) * self.variance + self.sum(rest)
        return sympy.Add(*(_number(c) * self.product(m) for m, c in polynomial.terms.items()))

    def product(self, monomial: Any) -> sympy.Expr:
        return sympy.Mul(*(self.base(b) ** sympy.Rational(Fraction(e)) for b, e in monomial))

    def base(self, base_id: int) -> sympy.Expr:
        if base_id in self.special:
            return self.special[base_id]
        base = self.ring.bases[base_id]
        if isinstance(base, Extent):
            return sympy.sympify(base.size)
        if isinstance(base, Sum):
            return self.sum(base.polynomial)
        if isinstance(base, Function):
            return self.function(base)
        if isinstance(base, Reduction):
            name = "E" if base.kind == "mean" else "max"
            return sympy.Function(name)(self.product(base.monomial))
        assert isinstance(base, Atom)
        return self.atom(base)

    def function(self, base: Function) -> sympy.Expr:
        arguments = [self.sum(a) for a in base.arguments]
        if base.name == "root":
            return sympy.sqrt(arguments[0])
        known = {
            "abs": sympy.Abs,
            "maximum": sympy.Max,
            "clamp_min": sympy.Max,
            "clamp_max": sympy.Min,
            "minimum": sympy.Min,
            "exp": sympy.exp,
        }
        return known.get(base.name, sympy.Function(base.name))(*arguments)

    def atom(self, base: Atom) -> sympy.Expr:
        if base.source is self.match.linear.source:
            return sympy.Symbol("x")
        source = base.source
        assert isinstance(source, fx.Node)
        if is_stored(source):
            source = uncast(source)
        return sympy.Symbol(path_of(source).rpartition(".")[2])


def _content(weight: Polynomial) -> tuple[Number, Polynomial]:
    """The number in front of a weight, and the rest."""
    coefficients = set(weight.terms.values())
    if len(coefficients) != 1:
        return 1, weight
    number = coefficients.pop()
    return number, Polynomial(dict.fromkeys(weight.terms, 1))


def _clean(value: float) -> Number:
    nearest = Fraction(value).limit_denominator(10**6)
    return nearest if math.isclose(float(nearest), value, rel_tol=1e-12) else value


def _number(value: Number) -> sympy.Expr:
    if isinstance(value, float):
        nearest = Fraction(value).limit_denominator(4096)
        if math.isclose(float(nearest), value, rel_tol=1e-14) and abs(value) > 1e-3:
            return sympy.Rational(nearest)
        return sympy.Float(value)
    return sympy.Rational(value)
