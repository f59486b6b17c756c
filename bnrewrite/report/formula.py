"""Formulas for people: one line of text, or MathML for a browser.

    w(c)*(x(n, c, h, w) - M(c))/sqrt(V(c) + 1e-05) + b(c)

Differs from sympy's own printers in three things: what is subtracted stands last, constants are
short, and (MathML) indices are subscripts and names keep their case.
"""

from __future__ import annotations

from html import escape
from typing import Any

import sympy
from sympy.core.function import AppliedUndef
from sympy.printing.mathml import MathMLPresentationPrinter
from sympy.printing.str import StrPrinter


def formula_text(formula: Any) -> str:
    """A sympy expression as one line; anything else as ``str`` gives it."""
    return str(_Text({"full_prec": False}).doprint(formula))


def formula_mathml(formula: Any) -> str:
    """A sympy expression as a ``<math>`` element of presentation MathML, escaped."""
    body: Any = _MathML()._print(sympy.sympify(formula))
    return (
        f'<math xmlns="http://www.w3.org/1998/Math/MathML" display="inline">{body.toxml()}</math>'
    )


def short_number(value: Any) -> str:
    """At most nine digits: float32 carries no more; 1e-05 as Python writes it."""
    return f"{float(value):.9g}"


class _SubtractedLast:
    """``x - M`` where sympy's order would be ``-M + x``."""

    def _as_ordered_terms(self, expr: Any, order: Any = None) -> list[Any]:
        terms: list[Any] = super()._as_ordered_terms(expr, order=order)  # type: ignore[misc]
        return sorted(terms, key=lambda term: bool(term.could_extract_minus_sign()))


class _Text(_SubtractedLast, StrPrinter):  # type: ignore[misc]
    def _print_Float(self, expr: Any) -> str:
        return short_number(expr)


class _MathML(_SubtractedLast, MathMLPresentationPrinter):  # type: ignore[misc]
    def _print_Float(self, expr: Any) -> Any:
        return self._leaf("mn", short_number(expr))

    def _print_Symbol(self, sym: Any, style: str = "plain") -> Any:
        return super()._print_Symbol(sympy.Symbol(escape(sym.name, quote=False)), style)

    def _print_AppliedUndef(self, expr: AppliedUndef) -> Any:
        """``x(n, c)`` as x with subscripts: an index, not an argument."""
        name = self._leaf("mi", expr.func.__name__)
        if not expr.args:
            return name
        indexed = self.dom.createElement("msub")
        indexed.appendChild(name)
        row = self.dom.createElement("mrow")
        for place, argument in enumerate(expr.args):
            if place:
                row.appendChild(self._leaf("mo", ","))
            printed: Any = self._print(argument)
            row.appendChild(printed)
        indexed.appendChild(row)
        return indexed

    def _leaf(self, tag: str, text: str) -> Any:
        leaf = self.dom.createElement(tag)
        # sympy's document writes text as it is, for its own entities
        leaf.appendChild(self.dom.createTextNode(escape(text, quote=False)))
        return leaf
