"""The backward of a program by differentiation: which sums it needs, and what is made of them.

With u = x - centre, y = A u + B, A = sum a_i p_i and B = sum b_j q_j (a, b, centre of a group; p, q
inside it), n elements in a group and g the cotangent of y behind the activation:

    da_i = sum g u p_i      db_j = sum g q_j      dcentre = - sum_i a_i sum g p_i
    dM, dV by the chain rule through a_i, b_j and centre
    dx = A g + dM / n + 2 dV (x - M) / n

and a tensor t inside a group takes ``g u sum a_i dp_i/dt + g sum b_j dq_j/dt``. A mean over
groups, ``m = sum f / count``, takes what each of its groups has for it, ``dm = sum da_i da_i/dm
+ ...``, and gives ``dm / count * df`` to what f is made of.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import sympy

from .program import M, Term, V, parse

Slope = tuple[int, sympy.Expr]


@dataclass(frozen=True)
class Sum:
    """``sum g * element * u ** degree`` over a group."""

    element: sympy.Expr
    degree: int
    symbol: sympy.Symbol


@dataclass(frozen=True)
class Gradients:
    """What a backward computes, in the symbols of the program and of its sums.

    Attributes:
        sums: over each group.
        mean, variance: dM and dV.
        means: what a group has for each mean over groups, in the symbols ``slope(k)`` of those
            that are made of it.
        groups: of tensors that are constant inside a group, before they are summed over groups.
        inside: of tensors that vary inside a group: the factors of ``g u``, and those of g; each
            is the place of a term, and the derivative of its element.
    """

    sums: tuple[Sum, ...]
    mean: sympy.Expr
    variance: sympy.Expr
    means: tuple[sympy.Expr, ...]
    groups: dict[int, sympy.Expr]
    inside: dict[int, tuple[tuple[Slope, ...], tuple[Slope, ...]]]


def slope(number: int) -> sympy.Symbol:
    """The cotangent of a mean over groups, divided by their number."""
    return sympy.Symbol(f"dm{number}", real=True)


@cache
def gradients(text: str) -> Gradients:
    """Differentiate a program."""
    program = parse(text)
    free = [i for i in range(len(program.tensors)) if i not in program.fixed]
    inner = [i for i in free if program.inside(i)]
    outer = [i for i in free if not program.inside(i)]
    averages = [program.mean(k) for k in range(len(program.means))]
    variables = [*reversed(averages), M, V, *(program.symbol(i) for i in outer)]
    sums: dict[tuple[sympy.Expr, int], Sum] = {}

    def total(element: sympy.Expr, degree: int) -> sympy.Symbol:
        key = (element, degree)
        if key not in sums:
            sums[key] = Sum(element, degree, sympy.Symbol(f"S{len(sums)}", real=True))
        return sums[key].symbol

    found: dict[sympy.Symbol, sympy.Expr] = {}
    for variable in variables:
        parts = []
        for degree, terms in ((1, program.scale), (0, program.shift)):
            for term in terms:
                change = derivative(term.group, variable)
                if change != 0:
                    parts.append(change * total(term.element, degree))
        change = derivative(program.centre, variable)
        if change != 0:
            parts += [-change * t.group * total(t.element, 0) for t in program.scale]
        for place, mean in enumerate(program.means):
            if found.get(averages[place]) != 0:  # 0 * inf would be NaN
                parts.append(slope(place) * derivative(mean.value, variable))
        found[variable] = sympy.Add(*parts)
    inside = {
        i: (_slopes(program.scale, program.symbol(i)), _slopes(program.shift, program.symbol(i)))
        for i in inner
    }
    groups = {i: found[program.symbol(i)] for i in outer}
    means = tuple(found[average] for average in averages)
    return Gradients(tuple(sums.values()), found[M], found[V], means, groups, inside)


def _slopes(terms: tuple[Term, ...], symbol: sympy.Symbol) -> tuple[Slope, ...]:
    slopes = ((place, derivative(term.element, symbol)) for place, term in enumerate(terms))
    return tuple(slope for slope in slopes if slope[1] != 0)


def derivative(value: Any, symbol: sympy.Symbol) -> Any:
    """As sympy's, which asks whether the base of a power has a logarithm: ten times the time."""
    if symbol not in value.free_symbols:
        return sympy.Integer(0)
    if value.is_Add:
        return sympy.Add(*(derivative(term, symbol) for term in value.args))
    if value.is_Mul:
        factors = value.args
        slopes = [derivative(factor, symbol) for factor in factors]
        places = [place for place, slope in enumerate(slopes) if slope != 0]
        return sympy.Add(*(sympy.Mul(*factors[:i], slopes[i], *factors[i + 1 :]) for i in places))
    if value.is_Pow and value.exp.is_number:
        return value.exp * value.base ** (value.exp - 1) * derivative(value.base, symbol)
    return sympy.diff(value, symbol)
