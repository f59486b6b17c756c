"""What is done with an element, in rows and in columns alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy

from .activations import Z, activation
from .printing import ElementPrinter, Source


class Element:
    """An element of x, what is made of it, and the gradients that come back.

    Args:
        source: what is printed.
        at: where the element lies.
        affine: A and B, as the element reads them.
        ending: of the names of the values of its group.
    """

    def __init__(self, source: Source, at: str, affine: tuple[str, str], ending: str = "") -> None:
        self.source = source
        self.at = at
        self.scale, self.shift = affine
        self.ending = ending
        about_mean = not source.program.about_zero and source.centred_at_mean
        self.distance = "u" if about_mean else "value"  # from the mean, of which V is about
        self.needs_mean = not source.program.about_zero and not about_mean
        residual = source.program.residual
        self.reads = ["x", *["residual"] * residual]  # in a forward
        self.reads_back = ["x", "dy", *["y"] * residual]

    def forward(self) -> list[str]:
        """Read x, write y."""
        made = self._made()
        if self.source.program.residual:
            made += f" + load<V>(residual + {self.at})"
        return [
            *self._read(),
            f"const V made = {made};",
            *_activated(self.source.program.activation),
            f"store(y + {self.at}, V(result), past_y);",
        ]

    def backward(self) -> list[str]:
        """Read x and dy: u, the cotangent g behind the activation, and g u."""
        lines, program = self._read(), self.source.program
        if program.activation:
            made = f"load<V>(y + {self.at})" if program.residual else self._made()
            lines += [
                f"const V made = {made};",
                f"const V given = load<V>(dy + {self.at});",
                *_differentiated(program.activation),
            ]
        else:
            lines.append(f"const V g = load<V>(dy + {self.at});")
        return [*lines, "const V gu = g * u; (void)gu;"]

    def input_gradient(self) -> str:
        """Write dx, from level = dM / N and along = 2 dV / N, where they are not zero.

        Zero times the distance of an infinite x would be NaN.
        """
        distance = f"(value - middle{self.ending})" if self.needs_mean else self.distance
        made = f"({self.scale}) * g"
        if self.source.gradients.mean != 0:
            made += f" + level{self.ending}"
        if self.source.gradients.variance != 0:
            made += f" + along{self.ending} * {distance}"
        return f"store_fresh(dx + {self.at}, V({made}), part, past_dx);"

    def residual_gradient(self) -> list[str]:
        """Write that of the residual, where there is one."""
        store = f"store(dresidual + {self.at}, V(g), past_dresidual);"
        return [store] if self.source.program.residual else []

    def fetched(self, tensors: Sequence[str]) -> list[str]:
        """Ask for what is read a while later."""
        return [f"fetch({tensor} + {self.at} + ahead);" for tensor in tensors]

    def _read(self) -> list[str]:
        u = f"value - centre{self.ending}" if self.source.has_centre else "value"
        return [f"const V value = load<V>(x + {self.at});", f"const V u = {u};"]

    def _made(self) -> str:
        shift = f" + ({self.shift})" if self.shift else ""
        return f"({self.scale}) * u{shift}"


class _ActivationPrinter(ElementPrinter):
    """Formulas of z with the functions of ``functions.h``."""

    def _print_exp(self, value: Any) -> str:
        return self._call("exponential", value)

    def _print_Bounded(self, value: Any) -> str:
        return self._call("bounded", value)

    def _print_tanh(self, value: Any) -> str:
        return self._call("hyperbolic_tangent", value)

    def _print_Logistic(self, value: Any) -> str:
        return self._call("logistic", value)

    def _print_LogisticSlope(self, value: Any) -> str:
        return self._call("logistic_slope", value)

    def _print_Normal(self, value: Any) -> str:
        return self._call("normal", value)

    def _call(self, name: str, value: Any) -> str:
        return f"{name}(V({self._print(value.args[0])}))"


def _activated(text: str) -> list[str]:
    """``result`` of ``made``."""
    found = activation(text)
    if found is None:
        return ["const V result = made;"]
    if found.formula is None:
        return [f"const V result = {found.pieces[0]};"]
    return _printed(found.formula, "result")


def _differentiated(text: str) -> list[str]:
    """The cotangent ``g`` of ``made``, of that of the result, ``given``."""
    found = activation(text)
    assert found is not None
    if found.formula is None:
        return [f"const V g = {found.pieces[1]};"]
    return [*_printed(sympy.diff(found.formula, Z), "slope"), "const V g = given * slope;"]


def _printed(formula: sympy.Expr, name: str) -> list[str]:
    """A formula of ``made``, common parts once."""
    common, (value,) = sympy.cse(formula.subs(Z, sympy.Symbol("made", real=True)))
    printer = _ActivationPrinter()
    pairs = [*((str(symbol), part) for symbol, part in common), (name, value)]
    return [f"const V {each} = {printer.doprint(part)};" for each, part in pairs]
