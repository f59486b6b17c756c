"""Activations in Triton, from their formulas, and their derivatives by sympy.

Exponentials are of numbers below zero, so that none overflows. Triton has no hyperbolic tangent:
near zero it is its series, else ``(1 - t) / (1 + t)`` with ``t = exp(-2 |z|)``.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import sympy

from ..generated.activations import FAR, Activation, Z, activation
from ..generated.printing import Unprintable
from .formulas import FormulaPrinter

NEAR = 0.25  # where the series of tanh is taken: each term is 0.025 of the one before, or less
TERMS = {"float32": 5, "float64": 10}


def activated(text: str, single: str) -> list[str]:
    """``result`` of ``made``.

    Args:
        text: the activation; empty for none.
        single: the type that is computed in.
    """
    found = activation(text)
    if found is None:
        return ["result = made"]
    if found.formula is None:
        return [f"result = {_pieces(text)[0]}"]
    return _printed(found.formula, "result", single)


def differentiated(text: str, single: str) -> list[str]:
    """The cotangent ``d`` of ``made``, of that of the result, also ``d``."""
    found = activation(text)
    assert isinstance(found, Activation)
    if found.formula is None:
        return [f"d = {_pieces(text)[1]}"]
    return [*_printed(sympy.diff(found.formula, Z), "slope", single), "d = d * slope"]


def _pieces(text: str) -> tuple[str, str]:
    """The result, and the cotangent, of what is made of pieces."""
    name, _, slope = text.partition(" ")
    if name == "leaky_relu":
        made = f"tl.where(made > 0.0, made, made * {float(slope)})"
        return made, f"tl.where(made > 0.0, d, d * {float(slope)})"
    if name == "relu6":
        made = "tl.where(made < 0.0, 0.0, tl.where(made > 6.0, 6.0, made))"
        return made, "tl.where((made <= 0.0) | (made >= 6.0), 0.0, d)"
    if name == "relu":
        return "tl.where(made < 0.0, 0.0, made)", "tl.where(made <= 0.0, 0.0, d)"
    raise Unprintable(f"Triton has no pieces of {name}")


def _printed(formula: sympy.Expr, name: str, single: str) -> list[str]:
    """A formula of ``made``, common parts once."""
    symbols = sympy.numbered_symbols("r")
    common, (value,) = sympy.cse(formula.subs(Z, sympy.Symbol("made", real=True)), symbols=symbols)
    printer = _Activations(single)
    pairs = [*((str(symbol), part) for symbol, part in common), (name, value)]
    return [f"{each} = {printer.doprint(part)}" for each, part in pairs]


class _Activations(FormulaPrinter):
    """Formulas of z."""

    def __init__(self, single: str) -> None:
        super().__init__()
        self.single = single

    def _print_exp(self, value: Any) -> str:
        return f"tl.exp({self._print(value.args[0])})"

    def _print_Bounded(self, value: Any) -> str:
        z = self._print(value.args[0])
        return f"tl.where(({z}) < {-FAR}.0, {-FAR}.0, tl.where(({z}) > {FAR}.0, {FAR}.0, {z}))"

    def _print_Logistic(self, value: Any) -> str:
        z = self._print(value.args[0])
        return f"(tl.where(({z}) < 0.0, {_small(z)}, 1.0) / ({_small(z)} + 1.0))"

    def _print_LogisticSlope(self, value: Any) -> str:
        small = _small(self._print(value.args[0]))
        return f"({small} / (({small} + 1.0) * ({small} + 1.0)))"

    def _print_Normal(self, value: Any) -> str:
        return f"(0.5 + 0.5 * tl.erf(({self._print(value.args[0])}) * {0.5**0.5!r}))"

    def _print_tanh(self, value: Any) -> str:
        z = self._print(value.args[0])
        square, series = f"(({z}) * ({z}))", "0.0"
        for factor in reversed(_tanh_series(TERMS[self.single])):
            series = f"({factor!r} + {square} * {series})"
        small = f"tl.exp(-2.0 * tl.abs({z}))"
        far = f"(1.0 - {small}) / (1.0 + {small})"
        signed = f"tl.where(({z}) < 0.0, -{far}, {far})"
        return f"tl.where(tl.abs({z}) < {NEAR}, ({z}) * {series}, {signed})"


def _small(z: str) -> str:
    return f"tl.exp(-tl.abs({z}))"


@cache
def _tanh_series(terms: int) -> list[float]:
    """The factors of z, z^3, z^5, ..."""
    series = sympy.series(sympy.tanh(Z), Z, 0, 2 * terms).removeO()
    return [float(series.coeff(Z, 2 * k + 1)) for k in range(terms)]
