"""Columns as blocks: how the work is cut, swept and given its coefficients."""

from __future__ import annotations

from collections.abc import Sequence

from .elements import Element
from .pieces import decode, group_tensors, indented, offset
from .printing import Source, Unprintable, of_elements

CACHE = 65536  # elements of a task that a core's cache holds between two passes
WIDE = 4096  # columns of a task where it does not: a thread then reads one stream
LEAST = 64  # columns of a task that are read at once, if there are so many


class Columns:
    """The loops and tensors of a program over columns."""

    def __init__(self, source: Source) -> None:
        program, layout = source.program, source.layout
        first = len(layout.loops) - layout.columns
        self.source = source
        self.loops = list(range(first, len(layout.loops)))
        self.kept = [i for i in self.loops if not layout.loops[i].reduced]
        self.several = layout.loops[-1].reduced  # columns make a group
        numbers = range(len(program.tensors))
        rows = set(layout.reduced)
        self.of_group = [i for i in numbers if not program.inside(i)]
        self.of_row = [i for i in numbers if rows & set(source.runs(i))]
        self.of_column = [i for i in numbers if program.inside(i) and i not in self.of_row]
        if any(set(source.runs(i)) - rows for i in self.of_row):
            raise Unprintable("a tensor along the rows and the columns")
        moving, still = ({program.symbol(i) for i in t} for t in (self.of_row, self.of_column))
        self.terms = {"a": program.scale, "b": program.shift}
        elements = [term.element.free_symbols for terms in self.terms.values() for term in terms]
        if any(symbols & moving and symbols & still for symbols in elements):
            raise Unprintable("a product of tensors along the rows and along the columns")
        self.still = {  # terms that are constant along a column
            letter: [i for i, t in enumerate(terms) if not t.element.free_symbols & moving]
            for letter, terms in self.terms.items()
        }
        self.arrays = ["centre"] * source.has_centre
        self.arrays += [f"{letter}s" for letter in "ab" if self.still[letter]]
        self.arrays += [
            f"{letter}{i}"
            for letter, terms in self.terms.items()
            for i, term in enumerate(terms)
            if term.group != 1 and (i not in self.still[letter])
        ]
        self.element = Element(source, "at", self._affine(), "_q")

    def head(self) -> list[str]:
        """How the work is cut."""
        layout = self.source.layout
        outside = " * ".join(f"n{i}" for i in layout.kept) or "1"
        rows = " * ".join(f"n{i}" for i in layout.reduced if i not in self.loops) or "1"
        columns = " * ".join(f"n{i}" for i in self.loops)
        within = f"n{self.loops[-1]}" if self.several else "1"
        wide = f"rows > {CACHE} / {LEAST} ? {WIDE} : {CACHE} / rows"
        wide = f"std::min(columns, std::max(({LEAST} + step - 1) / step, ({wide}) / step) * step)"
        return [
            f"  const int64_t outside = {outside}, rows = {rows}, columns = {columns};",
            f"  const int64_t within = {within}, groups = outside * (columns / within);",
            "  const int64_t step = filled_by(within);",
            f"  const int64_t wide = {wide}, blocks = (columns + wide - 1) / wide;",
            "  const int64_t tasks = outside * blocks;",
            "  const int64_t parts = tasks >= threads ? 1 : std::min(rows, (threads + tasks -"
            " 1) / tasks);",
            "  const double N = double(rows) * within; (void)N;",
        ]

    def task(self, *, indices: bool = True) -> list[str]:
        """The block of a task."""
        layout = self.source.layout
        lines = [
            "    const int64_t place = task / blocks, from = task % blocks * wide;",
            "    const int64_t width = std::min(wide, columns - from);",
        ]
        if indices:
            lines += decode(layout.kept, "place", "    ")
        base = offset(layout.kept) if indices else "0"
        return [*lines, f"    const int64_t base = {base} + from; (void)base;"]

    def sweep(
        self,
        end: str,
        body: list[str],
        *,
        head: Sequence[str] = (),
        tail: Sequence[str] = (),
        after: Sequence[str] = (),
    ) -> list[str]:
        """Rows from ``row`` to an end, several at once: their sums are taken in registers first.

        ``ahead`` is how far the elements lie that are read ``AHEAD`` steps later: rows that are
        short, or far apart, are no stream that a processor sees by itself.
        """
        reduced = [i for i in self.source.layout.reduced if i not in self.loops]
        numbers = self.of_row
        return [
            f"for (; row < {end}; row += TALL) {{",
            f"  const int64_t tall = std::min(TALL, {end} - row);",
            "  int64_t places[TALL];",
            *[f"  acc row_t{i}[TALL];" for i in numbers],
            "  for (int64_t k = 0; k < tall; ++k) {",
            "    const int64_t here = row + k;",
            *decode(reduced, "here", "    "),
            f"    places[k] = base + {offset(reduced)};",
            *[f"    row_t{i}[k] = load<acc>(p{i} + {self.source.index(i)});" for i in numbers],
            "  }",
            "  const bool is_late = row + TALL * AHEAD >= end;  // of the task",
            "  const int64_t ahead = is_late ? NEAR : (places[1] - places[0]) * TALL * AHEAD;",
            "  (void)ahead;",
            "  auto sweep = [&](auto count) {",
            "    each(width, [&](auto tag, int64_t q, auto part) {",
            "      using V = decltype(tag); (void)part;",
            *indented(list(head), 6),
            "      for (int64_t k = 0; k < count; ++k) {",
            "        const int64_t at = places[k] + q;",
            *[f"        const acc t{i} = row_t{i}[k];" for i in numbers],
            *indented(body, 8),
            "      }",
            *indented(list(tail), 6),
            "    });",
            "  };",
            "  if (tall == TALL) sweep(std::integral_constant<int64_t, TALL>{}); else sweep(tall);",
            *indented(list(after), 2),
            "}",
        ]

    def of_task(self, name: str, given: str, body: list[str]) -> list[str]:
        """The step of a name for the groups of a task; what is given may be ``values``."""
        return [
            f"  auto {name} = [&](int64_t task, {given}) {{",
            *self.task(),
            *(self.pointers("    ") if "*values" in given else []),
            *self.each_group(body),
            "  };",
        ]

    def apply(self, body: list[str], *first: str) -> list[str]:
        """The step that writes the rows of a task."""
        return [
            "  auto apply = [&](int64_t task, int64_t begin, int64_t end, acc *values) {",
            *first,
            *self.task(),
            *self.pointers("    "),
            "    int64_t row = begin;",
            *indented(self.sweep("end", body, head=self.loads()), 4),
            "  };",
        ]

    def _affine(self) -> tuple[str, str]:
        """A and B of an element, from arrays of the columns."""
        written = []
        for letter, terms in self.terms.items():
            parts = [f"{letter}s_q"] if self.still[letter] else []
            for i, term in enumerate(terms):
                if i not in self.still[letter]:
                    factors = [f"{letter}{i}_q"] * (term.group != 1)
                    parts.append(" * ".join([*factors, f"({of_elements(term.element)})"]))
            written.append(" + ".join(parts))
        return written[0], written[1]

    def names(self) -> dict[str, str]:
        """How an element reads the values of its group."""
        return {name: f"{name}_q" for name in self.arrays}

    def loads(self) -> list[str]:
        """The values of the arrays in a column."""
        return [f"const V {name}_q = load<V>({name} + q); (void){name}_q;" for name in self.arrays]

    def pointers(self, indent: str) -> list[str]:
        """The arrays of a task."""
        return [
            f"{indent}acc *__restrict {name} = values + {i} * wide; (void){name};"
            for i, name in enumerate(self.arrays)
        ]

    def fill(self, only: list[int]) -> list[str]:
        """The arrays of the columns of one group, whose M and V are known."""
        source = self.source
        lines = [*source.stopped(), *group_tensors(source, self.of_group, only)]
        lines += source.coefficients()
        lines += [f"const acc {n}_value = acc({n}_); (void){n}_value;" for n in source.names()]
        lines += ["for (int64_t q = first; q < first + within; ++q) {"]
        if self.several:
            lines.append(f"  const int64_t i{self.loops[-1]} = q - first;")
        lines += [
            f"  const acc t{i} = load<acc>(p{i} + {source.index(i)});" for i in self.of_column
        ]
        for name in self.arrays:
            if name in ("as", "bs"):
                letter = name[0]
                parts = []
                for i in self.still[letter]:
                    term = self.terms[letter][i]
                    factors = [f"{letter}{i}_value"] * (term.group != 1)
                    if term.element != 1 or not factors:
                        factors.append(f"({of_elements(term.element)})")
                    parts.append(" * ".join(factors))
                lines.append(f"  {name}[q] = {' + '.join(parts)};")
            elif name in source.names():
                lines.append(f"  {name}[q] = {name}_value;")
        return [*lines, "}"]

    def each_group(self, body: list[str]) -> list[str]:
        """A loop over the groups of a task: ``first`` is the first column of each."""
        return [
            "    for (int64_t first = 0; first < width; first += within) {",
            "      const int64_t column = (from + first) / within;",
            "      const int64_t group = place * (columns / within) + column; (void)group;",
            *decode(self.kept, "column", "      "),
            *indented(body, 6),
            "    }",
        ]


def added(name: str, value: str) -> str:
    """Add what is new of a value to the sums of the columns at ``q``."""
    return f"store_fresh({name} + q, V(load<V>({name} + q) + {value}), part, false);"
