"""The normal form of a meaning: a polynomial over interned bases.

A polynomial is a sum of monomials; a monomial is a product of bases to exact exponents. Bases are
atoms (tensors that are not understood), means and maxima over axes, sums under a root or in a
denominator, and functions of polynomials. Everything is expanded, so equal formulas are equal
dictionaries: spelling is gone by construction. Why not sympy here: docs/decisions/0001.

Variances have no symbol of their own. ``E[x]`` and ``E[x^2]`` are bases, and a variance is the
polynomial ``E[x^2] - E[x]^2`` however it was computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from .axes import Axis, Dims, Opaque, Size

Number = int | float | Fraction
Exponent = int | Fraction
Monomial = tuple[tuple[int, Exponent], ...]

DIGITS = 13  # coefficients are compared to this many digits; they are kept and emitted exactly
MAXIMA = ("maximum", "clamp_min")  # alike but for the gradient where both are equal
LIMIT = 96  # a formula of more terms than this is no norm; its node becomes an atom


class Polynomial:
    """An immutable sum of monomials."""

    __slots__ = ("_key", "terms")

    def __init__(self, terms: dict[Monomial, Number]) -> None:
        self.terms = terms
        self._key: tuple[object, ...] | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """A hashable form: equal formulas have equal keys."""
        if self._key is None:
            self._key = tuple((m, rounded(self.terms[m])) for m in sorted(self.terms))
        return self._key

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Polynomial) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def constant(self) -> Number | None:
        """The value of a polynomial without bases, else None."""
        if not self.terms:
            return 0
        if len(self.terms) == 1 and () in self.terms:
            return self.terms[()]
        return None

    def bases(self) -> set[int]:
        """The bases of all monomials."""
        return {base for monomial in self.terms for base, _ in monomial}


def rounded(value: Number) -> float:
    """A coefficient as it is compared."""
    return float(f"{float(value):.{DIGITS}g}")


@dataclass(frozen=True, eq=False)
class Base:
    """What every base knows of itself; sources are the graph nodes that atoms stand for."""

    id: int
    axes: frozenset[Axis]  # free axes
    moments: frozenset[object]  # sources that are reduced somewhere inside
    raw: frozenset[object]  # sources that stand outside every reduction
    nonnegative: bool
    level: int  # nesting depth of reductions


@dataclass(frozen=True, eq=False)
class Atom(Base):
    """A tensor that is not understood, read at an index."""

    source: object
    index: Dims
    stopped: bool


@dataclass(frozen=True, eq=False)
class Extent(Base):
    """A symbolic size."""

    size: Size


@dataclass(frozen=True, eq=False)
class Reduction(Base):
    """``mean``, ``amax`` or ``first`` (a maximum with an index) of a monomial over bound axes."""

    kind: str
    monomial: Monomial
    bound: frozenset[Axis]


@dataclass(frozen=True, eq=False)
class Sum(Base):
    """A polynomial that stands under a root or in a denominator, scaled to a leading 1."""

    polynomial: Polynomial


@dataclass(frozen=True, eq=False)
class Function(Base):
    """A function of polynomials: ``abs``, ``maximum``, ``root``, ``exp``, ...

    ``root`` is a square root whose gradient is zero at zero, as ``norm`` and ``std`` have it.
    """

    name: str
    arguments: tuple[Polynomial, ...]

    @cached_property
    def argument(self) -> Polynomial:
        """The only argument of a unary function."""
        (argument,) = self.arguments
        return argument


ZERO = Polynomial({})
ONE = Polynomial({(): 1})


def number(value: Number) -> Polynomial:
    """A constant."""
    return Polynomial({(): value}) if value != 0 else ZERO


def added(left: Polynomial, right: Polynomial, factor: Number = 1) -> Polynomial:
    """Left + factor * right."""
    terms = dict(left.terms)
    for monomial, coefficient in right.terms.items():
        old = terms.get(monomial, 0)
        new = old + coefficient * factor
        if new == 0 or (isinstance(new, float) and abs(new) < 1e-14 * abs(float(old))):
            terms.pop(monomial, None)
        else:
            terms[monomial] = new
    if len(terms) > LIMIT:
        raise Opaque("more terms than a norm has")
    return Polynomial(terms)


def scaled(polynomial: Polynomial, factor: Number) -> Polynomial:
    """Factor * polynomial."""
    if factor == 0:
        return ZERO
    if factor == 1:
        return polynomial
    return Polynomial({m: c * factor for m, c in polynomial.terms.items()})


def factor_of(polynomial: Polynomial, base: int) -> Polynomial:
    """What multiplies the first power of a base."""
    return Polynomial(
        {
            tuple(i for i in m if i[0] != base): c
            for m, c in polynomial.terms.items()
            if (base, 1) in m
        }
    )


def magnitude(value: Number) -> Number:
    """|value|."""
    return -value if value < 0 else value


def inverse(value: Number) -> Number:
    """1 / value, exact where the value is."""
    if isinstance(value, float):
        return 1.0 / value
    return Fraction(1) / value if abs(value) != 1 else value


def normalised(polynomial: Polynomial) -> tuple[Polynomial, Number]:
    """A polynomial up to a number, and the number."""
    lead = polynomial.terms[min(polynomial.terms)]
    return scaled(polynomial, inverse(lead)), lead


def exact(value: Exponent | float) -> Exponent:
    """An exponent as an integer or an exact fraction."""
    if isinstance(value, int):
        return value
    fraction = Fraction(value).limit_denominator(64)
    if abs(float(fraction) - float(value)) > 1e-12:
        raise Opaque(f"the exponent {value} is not a simple fraction")
    return int(fraction) if fraction.denominator == 1 else fraction


def is_even(exponent: Exponent) -> bool:
    """Whether a power with this exponent is even."""
    return isinstance(exponent, int) and exponent % 2 == 0
