"""Pieces of source that kernels over rows and over columns share."""

from __future__ import annotations

import sympy

from .printing import Source, of_elements, of_groups


def decode(loops: list[int], flat: str, indent: str) -> list[str]:
    """The indices of loops from one flat index."""
    if len(loops) == 1:
        return [f"{indent}const int64_t i{loops[0]} = {flat};"]
    lines = [f"{indent}int64_t rest_{flat} = {flat};"] if loops else []
    for place, loop in enumerate(reversed(loops)):
        value = f"rest_{flat}" if place == len(loops) - 1 else f"rest_{flat} % n{loop}"
        lines.append(f"{indent}const int64_t i{loop} = {value};")
        if place < len(loops) - 1:
            lines.append(f"{indent}rest_{flat} /= n{loop};")
    return lines


def offset(loops: list[int]) -> str:
    return " + ".join([f"i{i} * s{i}" for i in loops]) or "0"


def indented(lines: list[str], by: int) -> list[str]:
    return [" " * by + line for line in lines]


class Sums:
    """The sums of a backward: which are taken of elements, and which are made of those by row."""

    def __init__(self, source: Source, inner: list[int], outer: list[int]) -> None:
        self.symbols = {source.program.symbol(i) for i in inner}
        self.rows = {source.program.symbol(i) for i in outer}
        self.lanes: dict[tuple[str, int], str] = {}

    def lane(self, element: sympy.Expr, degree: int) -> str:
        """The sum over a row, times what is constant along it."""
        symbols = element.free_symbols
        inside = bool(symbols & self.symbols)
        key = of_elements(element) if inside else ""
        name = self.lanes.setdefault((key, degree), f"lane{len(self.lanes)}")
        if inside or element == 1:
            return f"{name}_sum"
        return f"({of_elements(element)}) * {name}_sum"

    def terms(self) -> list[tuple[str, str]]:
        """The sums, and what an element adds to each."""
        return [
            (name, " * ".join([*([f"({key})"] if key else []), "gu" if degree else "g"]))
            for (key, degree), name in self.lanes.items()
        ]


def inside(source: Source, number: int, names: dict[str, str] | None = None) -> str:
    """What an element adds to a tensor that varies inside a group."""
    parts = []
    for letter, slopes, cotangent in zip(
        "ab", source.gradients.inside[number], ("gu", "g"), strict=True
    ):
        for place, element in slopes:
            factors = source.factor(letter, place, names)
            if element != 1:
                factors.append(f"({of_elements(element)})")
            parts.append(" * ".join([*factors, cotangent]))
    return " + ".join(parts) or "V{}"


def inside_sums(source: Source, sums: Sums, number: int) -> str:
    """The same of all elements along which a tensor is constant, from their sums."""
    parts = []
    for letter, slopes, degree in zip("ab", source.gradients.inside[number], (1, 0), strict=True):
        for place, element in slopes:
            parts.append(" * ".join([*source.factor(letter, place), sums.lane(element, degree)]))
    return " + ".join(parts) or "0"


def group_tensors(source: Source, numbers: list[int], only: list[int]) -> list[str]:
    """The tensors of a group, in double precision."""
    return [
        f"const double t{i} = load<acc>(p{i} + {source.index(i)});" for i in numbers if i in only
    ]


def moments(source: Source, mean: str, spread: str) -> list[str]:
    """M and V of a group, kept for the backward; where others need them, with all digits."""
    if source.program.about_zero:
        found = f"const double M = 0, V = {spread} / N;"
    else:
        found = (
            f"const double M = {mean}, V = {spread} > 0 || {spread} != {spread} ? {spread} / N : 0;"
        )
    kept = source.moments()
    lines = [found, *[f"moments[{at}group] = acc({name});" for name, at in kept]]
    if source.program.means:
        rests = [(name, f"(groups * {len(kept)} + {at}group)") for name, at in kept]
        lines += [f"moments[{at}] = rounded_off({name});" for name, at in rests]
    return lines


def updates(source: Source) -> list[str]:
    """What buffers take of a group."""
    named = [(f"new{i}", value) for i, value in enumerate(source.program.updates)]
    lines = of_groups(named) if named else []
    return lines + [f"update{i}[group] = acc(new{i});" for i in range(len(named))]


def group_gradients(source: Source, of_group: list[int]) -> list[str]:
    """What a group makes of its sums: dM, dV, and what tensors take that are constant in it."""
    made = source.gradients
    named = [("dM", made.mean), ("dV", made.variance)]
    named += [(f"own{i}", made.groups[i]) for i in of_group]
    return [*of_groups(named), *[f"k{i}[group] = own{i};" for i in of_group]]


def gathered(source: Source, number: int, adds: list[str]) -> list[str]:
    """The gradient of a tensor: lines add what groups, rows or columns have kept to ``sum``."""
    return [
        "  {",
        f"    std::vector<double> sum({source.size(number)});",
        *indented(adds, 4),
        f"    for (int64_t j = 0; j < int64_t(sum.size()); ++j) store(q{number} + j, acc(sum[j]));",
        "  }",
    ]
