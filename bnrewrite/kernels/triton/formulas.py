"""Prints formulas as Triton: values of a group once, values of elements in the tile.

Values of a group are in single precision, by correctly rounded roots and quotients, unless a sum
of statistics in them may cancel or a power is neither whole nor a root: then in double precision.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import sympy
from sympy.printing.pycode import PythonCodePrinter

from ..generated.printing import Unprintable
from ..generated.program import Larger, M, Ms, Program, Root, V, Vs

LONGEST = 8  # the largest whole power that is written as a product


class FormulaPrinter(PythonCodePrinter):  # type: ignore[misc]
    """Sums and products; each kind of value adds what else it may contain."""

    def _print_Integer(self, expr: Any) -> str:
        return repr(float(expr))

    def _print_Float(self, expr: Any) -> str:
        return repr(float(expr))

    def _print_Rational(self, expr: Any) -> str:
        return repr(float(expr))

    def _print_Add(self, expr: Any, order: Any = None) -> str:
        return " + ".join(f"({self._print(each)})" for each in expr.args)

    def _print_Mul(self, expr: Any) -> str:
        return " * ".join(f"({self._print(each)})" for each in expr.args)

    def _print_Pow(self, expr: Any, rational: bool = False, sqrt: str = "") -> str:
        base, power = self._print(expr.base), expr.exp
        if not power.is_Rational or power.q > 2 or abs(power) > LONGEST:
            return self._other_power(base, power)
        factors = [f"({base})"] * int(abs(power))
        product = " * ".join([*factors, self._root(base)] if power.q == 2 else factors)
        return f"({product})" if power > 0 else self._inverse(product)

    def _print_Function(self, expr: Any) -> str:
        raise Unprintable("a function inside a group")

    def _root(self, base: str) -> str:
        raise Unprintable("a power inside a group")

    def _other_power(self, base: str, power: Any) -> str:
        raise Unprintable("a power inside a group")

    def _inverse(self, base: str) -> str:
        return f"(1.0 / ({base}))"


class _Single(FormulaPrinter):
    """Values of a group in single precision; Triton's own root and quotient are approximate."""

    def _root(self, base: str) -> str:
        return f"tl.sqrt_rn({base})"

    def _inverse(self, base: str) -> str:
        return f"tl.div_rn(1.0, {base})"

    def _print_Max(self, expr: Any) -> str:
        *others, last = (str(self._print(each)) for each in expr.args)
        return "".join(f"tl.maximum({each}, " for each in others) + last + ")" * len(others)

    def _print_Larger(self, value: Any) -> str:
        first, bound = (self._print(each) for each in value.args)
        return f"tl.where(({first}) < {bound}, {bound}, {first})"

    def _print_AtLeast(self, value: Any) -> str:
        return f"tl.where(({self._print(value.args[0])}) >= {self._print(value.args[1])}, 1.0, 0.0)"

    def _print_Root(self, value: Any) -> str:
        return self._root(self._print(value.args[0]))

    def _print_InverseRoot(self, value: Any) -> str:
        base = self._print(value.args[0])
        root = self._root(f"tl.where(({base}) == 0.0, 1.0, {base})")
        return f"tl.where(({base}) == 0.0, 0.0, {self._inverse(root)})"


class _Double(_Single):
    """Values of a group in double precision, where Triton has one root and one quotient."""

    def _root(self, base: str) -> str:
        return f"tl.sqrt({base})"

    def _inverse(self, base: str) -> str:
        return f"(1.0 / ({base}))"

    def _other_power(self, base: str, power: Any) -> str:
        if not power.is_number or power.is_integer:
            raise Unprintable("a power inside a group")
        return f"tl.exp2({float(power)!r} * tl.log2({base}))"


def of_elements(value: sympy.Expr) -> str:
    """An expression of elements: sums, products and quotients.

    Raises:
        Unprintable: there is more in it.
    """
    return str(FormulaPrinter().doprint(value))


def of_groups(
    named: Sequence[tuple[str, sympy.Expr]], letter: str, *, double: bool
) -> list[tuple[str, str]]:
    """Definitions of values of a group, common parts once."""
    symbols = sympy.numbered_symbols(letter)
    common, values = sympy.cse([value for _, value in named], symbols=symbols)
    printer = _Double() if double else _Single()
    pairs = [(str(symbol), value) for symbol, value in common]
    pairs += [(name, value) for (name, _), value in zip(named, values, strict=True)]
    return [(name, str(printer.doprint(value))) for name, value in pairs]


def wants_double(program: Program) -> bool:
    """Whether single precision would lose digits of a value of a group."""
    values = [term.group for term in (*program.scale, *program.shift)]
    return any(map(_may_cancel, values)) or _may_cancel(program.centre) or any(
        map(_may_cancel, program.updates)
    )  # fmt: skip


def _may_cancel(value: sympy.Expr) -> bool:
    """Whether a sum of statistics is not one of numbers above zero, or a power is a logarithm's."""
    powers: list[Any] = [power.exp for power in value.atoms(sympy.Pow)]
    if any(not power.is_Rational or power.q > 2 for power in powers):
        return True
    return any(
        add.free_symbols & {M, V, Ms, Vs} and not _are_positive(add.args)
        for add in value.atoms(sympy.Add)
    )


def _are_positive(values: Iterable[sympy.Expr]) -> bool:
    return all(
        value.is_nonnegative
        or isinstance(value, Root | Larger)
        or (isinstance(value, sympy.Mul) and _are_positive(value.args))
        for value in values
    )
