"""Prints formulas as C++, and what rows and columns have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
from sympy.printing.cxx import CXX17CodePrinter

from .gradients import Gradients, gradients
from .layout import Layout
from .program import M, Ms, Program, Term, V, Vs, parse

CTYPES = {"float32": "float", "float64": "double", "bfloat16": "bfloat16", "float16": "float16"}

LARGEST = 2**53  # up to which double precision has every whole number


class Unprintable(Exception):
    """A formula or layout that has no kernel."""


def literal(number: int) -> str:
    """A whole number of any size: a literal that no integer holds would lose its first digits."""
    return str(number) if abs(number) < LARGEST else repr(float(number))


class _Groups(CXX17CodePrinter):  # type: ignore[misc]
    """Expressions of a group, in double precision."""

    def _print_Integer(self, expr: Any) -> str:
        return literal(int(expr))

    def _print_Pow(self, expr: Any) -> str:
        base, power = expr.args
        whole = sympy.floor(abs(power)) if power.is_Rational else None
        if whole is None or whole > 4 or power.q > 2:
            return str(super()._print_Pow(expr))
        base = self._print(base)
        factors = [f"({base})"] * int(whole) + [f"std::sqrt({base})"] * (power.q == 2)
        product = " * ".join(factors)
        return f"({product})" if power > 0 else f"(1 / ({product}))"

    def _print_Max(self, expr: Any) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        *others, last = (str(self._print(each)) for each in expr.args)
        return "".join(f"std::max<double>({each}, " for each in others) + last + ")" * len(others)

    def _print_Larger(self, value: Any) -> str:
        return f"larger({self._print(value.args[0])}, {self._print(value.args[1])})"

    def _print_AtLeast(self, value: Any) -> str:
        return f"at_least({self._print(value.args[0])}, {self._print(value.args[1])})"

    def _print_Root(self, value: Any) -> str:
        return f"std::sqrt({self._print(value.args[0])})"

    def _print_InverseRoot(self, value: Any) -> str:
        return f"inverse_root({self._print(value.args[0])})"


class ElementPrinter(CXX17CodePrinter):  # type: ignore[misc]
    """Sums, products and quotients of elements, in the precision that the kernel computes in."""

    def _print_Integer(self, expr: Any) -> str:
        return f"acc({literal(int(expr))})"

    def _print_Float(self, flt: Any) -> str:
        return f"acc({float(flt)!r})"

    def _print_Rational(self, expr: Any) -> str:
        return f"acc({float(expr)!r})"

    def _print_Pow(self, expr: Any) -> str:
        base, power = expr.args
        if not power.is_Integer or power == 0:
            raise Unprintable("a power inside a group")
        product = " * ".join([f"({self._print(base)})"] * abs(int(power)))
        return f"({product})" if power > 0 else f"(acc(1) / ({product}))"

    def _print_Function(self, expr: Any) -> str:
        raise Unprintable("a function inside a group")

    _print_Larger = _print_AtLeast = _print_Root = _print_InverseRoot = _print_Function


def of_elements(value: sympy.Expr) -> str:
    """An expression of elements."""
    return str(ElementPrinter().doprint(value))


def of_groups(named: Sequence[tuple[str, sympy.Expr]], letter: str = "z") -> list[str]:
    """Expressions of a group as definitions in double precision, common parts once."""
    symbols = sympy.numbered_symbols(letter)
    common, values = sympy.cse([value for _, value in named], symbols=symbols)
    pairs = [
        *((str(s), v) for s, v in common),
        *((n, v) for (n, _), v in zip(named, values, strict=True)),
    ]
    return [f"const double {name} = {_Groups().doprint(value)};" for name, value in pairs]


@dataclass(frozen=True)
class Source:
    """What a source is printed from.

    Attributes:
        text: the program.
        layout: the loops.
        dtypes: of x, y and each tensor.
    """

    text: str
    layout: Layout
    dtypes: tuple[str, ...]

    def key(self) -> str:
        """All of it as a text that is the same in every process."""
        loops = [(loop.axes, loop.reduced, sorted(loop.tensors)) for loop in self.layout.loops]
        return repr((self.text, loops, self.layout.columns, self.dtypes))

    @property
    def program(self) -> Program:
        """The program of the text."""
        return parse(self.text)

    @property
    def gradients(self) -> Gradients:
        """Its backward."""
        return gradients(self.text)

    @property
    def single(self) -> str:
        """The type that is computed in."""
        return "double" if "float64" in self.dtypes else "float"

    def free(self) -> list[int]:
        """The tensors that take a gradient."""
        program = self.program
        return [i for i in range(len(program.tensors)) if i not in program.fixed]

    def used(self) -> list[int]:
        """The tensors that a backward reads: all but those of updates alone."""
        program = self.program
        values = program.of_groups()
        values += [term.element for term in (*program.scale, *program.shift)]
        symbols = {symbol for value in values for symbol in value.free_symbols}
        return [i for i in range(len(program.tensors)) if program.symbol(i) in symbols]

    def firm(self) -> list[int]:
        """The tensors on whose values a gradient depends: a bias is none."""
        program, made = self.program, self.gradients
        values = [program.centre, made.mean, made.variance, *made.means, *made.groups.values()]
        values += [mean.value for mean in program.means]
        values += [each.element for each in made.sums]
        values += [value for term in program.scale for value in (term.group, term.element)]
        for slopes in made.inside.values():
            values += [element for part in slopes for _, element in part]
            values += [program.shift[place].group for place, _ in slopes[1]]
        symbols = {symbol for value in values for symbol in value.free_symbols}
        return [i for i in range(len(program.tensors)) if program.symbol(i) in symbols]

    def copied(self, firm: Sequence[int]) -> list[int]:
        """The tensors of which a copy is saved: any may change before the backward of user's code.

        Buffers; a bias whose activation is masked; and a weight that is no factor itself, as in
        ``y * (1 + w)``: autograd keeps the sum.
        """
        program, free = self.program, self.free()
        masks = bool(program.activation) and not program.residual
        return [
            i
            for i in self.used()
            if i not in free or (not self.multiplies(i) if i in firm else masks)
        ]

    def multiplies(self, number: int) -> bool:
        """Whether the scale is a tensor times what is free of it, without a number in front."""
        symbol = self.program.symbol(number)
        averaged = any(symbol in mean.value.free_symbols for mean in self.program.means)
        if len(self.program.scale) != 1 or averaged:
            return False
        (term,) = self.program.scale
        scale = term.group * term.element
        coefficient, rest = (scale / symbol).as_coeff_Mul()
        return bool(coefficient == 1) and symbol not in rest.free_symbols

    def runs(self, number: int) -> list[int]:
        """The loops along which a tensor runs."""
        return [i for i, loop in enumerate(self.layout.loops) if number in loop.tensors]

    def size(self, number: int) -> str:
        """How many elements a tensor has."""
        return " * ".join(f"n{loop}" for loop in self.runs(number)) or "1"

    def signature(
        self, name: str, pointers: Sequence[tuple[str, str]], results: Sequence[str]
    ) -> str:
        """The head of a function: what it points to, the lengths of its loops, the extents.

        Args:
            name: of the function.
            pointers: types and names.
            results: those to tensors like x that it writes.
        """
        loops = range(len(self.layout.loops))
        lines = [
            f'extern "C" void {name}(void **given, const double *extents, const int64_t *size,'
            " int64_t threads) {"
        ]
        for place, (kind, pointer) in enumerate(pointers):
            alone = "" if pointer in ("dy", "dx") else "__restrict "  # one may be the other
            lines.append(f"  {kind} *{alone}{pointer} = ({kind} *)given[{place}];")
        lines += [f"  const int64_t n{i} = size[{i}];" for i in loops]
        for i in loops:
            inner = " * ".join([f"n{j}" for j in loops if j > i])
            lines.append(f"  const int64_t s{i} = {inner or '1'};")
        size = " * ".join(f"n{i}" for i in loops)
        dense = " * ".join([f"n{i}" for i in self.layout.dense])
        for result in results:
            past = f"goes_past({result}, {size}, {dense})"
            if result == "dx":
                past += " && (const void *)dx != (const void *)dy"  # whose lines were just read
            lines.append(f"  in_large_pages({result}, {size});")
            lines.append(f"  const bool past_{result} = {past};")
        lines.append(
            f"  const Settled settled{{threads, {' || '.join(f'past_{r}' for r in results)}}};"
        )
        named = enumerate(self.program.extents())
        lines += [f"  const double {name} = extents[{i}]; (void){name};" for i, name in named]
        return "\n".join(lines)

    def forward_arguments(self) -> list[tuple[str, str]]:
        """x, residual, y, moments, updates, tensors."""
        x, y, *tensors = (CTYPES[d] for d in self.dtypes)
        given = [(f"const {t}", f"p{i}") for i, t in enumerate(tensors)]
        return [
            (f"const {x}", "x"), (f"const {x}", "residual"), (y, "y"), ("acc", "moments"),
            *[("acc", f"update{i}") for i in range(len(self.program.updates))], *given,
        ]  # fmt: skip

    def backward_arguments(self) -> list[tuple[str, str]]:
        """dy, x, y, moments, dx, dresidual, tensors, their gradients."""
        x, y, *tensors = (CTYPES[d] for d in self.dtypes)
        given = [(f"const {t}", f"p{i}") for i, t in enumerate(tensors)]
        wanted = [(tensors[i], f"q{i}") for i in self.free()]
        return [
            (f"const {y}", "dy"), (f"const {x}", "x"), (f"const {y}", "y"),
            ("const acc", "moments"), (x, "dx"), (x, "dresidual"), *given, *wanted,
        ]  # fmt: skip

    def index(self, number: int, *, without: int = -1) -> str:
        """Where the element of a tensor lies; ``without`` the densest loops, times their length."""
        result = ""
        for loop in self.runs(number):
            name = "0" if loop == without else f"i{loop}"
            result = f"({result}) * n{loop} + {name}" if result else name
        return result or "0"

    def coefficients(self) -> list[str]:
        """Definitions of a_i, b_j and the centre of a group, from M, V and its tensors."""
        return of_groups([(f"{name}_", value) for name, value in self.named()], "common")

    def names(self) -> list[str]:
        """The names of the coefficients of a group."""
        return [name for name, _ in self.named()]

    def named(self, *, shift: bool = True) -> list[tuple[str, sympy.Expr]]:
        """The coefficients of a group: a_i, b_j where the shift is wanted, and the centre."""
        named = [
            (f"{letter}{i}", term.group)
            for letter, terms in (("a", self.program.scale), ("b", self.program.shift))
            for i, term in enumerate(terms)
            if term.group != 1 and (shift or letter == "a")
        ]
        return [*named, *([("centre", self.program.centre)] if self.has_centre else [])]

    def factor(self, letter: str, place: int, names: dict[str, str] | None = None) -> list[str]:
        """The name of a term's value of the group, where it is not one."""
        terms = self.program.scale if letter == "a" else self.program.shift
        name = f"{letter}{place}"
        return [] if terms[place].group == 1 else [(names or {}).get(name, name)]

    @property
    def has_centre(self) -> bool:
        """Whether something is subtracted from x first."""
        return bool(self.program.centre != 0)

    @property
    def centred_at_mean(self) -> bool:
        """Whether that is the mean."""
        return self.program.centre in (M, Ms)

    def affine(self, of_elements: Callable[[sympy.Expr], str] = of_elements) -> tuple[str, str]:
        """A and B of an element, from the coefficients of its group.

        Args:
            of_elements: prints what varies inside the group, in another language.
        """

        def written(letter: str, terms: tuple[Term, ...]) -> str:
            parts = []
            for i, term in enumerate(terms):
                factors = self.factor(letter, i)
                if term.element != 1 or not factors:
                    factors.append(f"({of_elements(term.element)})")
                parts.append(" * ".join(factors))
            return " + ".join(parts)

        return written("a", self.program.scale), written("b", self.program.shift)

    def statistics(self, index: str, count: str) -> list[str]:
        """M and V of a group from what was saved."""
        kept = self.moments(count)
        lines = ["const double M = 0;"] if self.program.about_zero else []
        for name, at in kept:
            rest = f" + double(moments[{count} * {len(kept)} + {at}{index}])"
            value = f"moments[{at}{index}]{rest if self.program.means else ''}"
            lines.append(f"const double {name} = {value};")
        return lines

    def moments(self, count: str = "groups") -> list[tuple[str, str]]:
        """The moments that are saved, and where those of the first group lie."""
        return [("V", "")] if self.program.about_zero else [("M", ""), ("V", f"{count} + ")]

    def stopped(self) -> list[str]:
        """The moments through which no gradient flows are the moments."""
        used = {s for value in self.program.of_groups() for s in value.free_symbols}
        used |= {s for u in self.program.updates for s in u.free_symbols}
        return [f"const double {a} = {b};" for a, b in ((Ms, M), (Vs, V)) if a in used]
