"""Kernels over dense rows: a group is made of rows of ``L`` elements that lie next to each other.

One task is a group: its moments, then y, while the group is in the cache. The backward adds up the
sums of the group, makes dM and dV of them, and writes dx. What a tensor inside a group takes is
added up by each thread, in double precision beyond ``ROWS`` of them.
"""

from __future__ import annotations

import itertools

from .elements import Element
from .pieces import (
    Sums,
    decode,
    gathered,
    group_gradients,
    group_tensors,
    indented,
    inside,
    inside_sums,
    moments,
    offset,
    updates,
)
from .printing import Source


def rows_source(source: Source) -> str:
    """The functions ``forward`` and ``backward``."""
    rows = Rows(source)
    return "\n".join([*_forward(rows), "", *_backward(rows)])


class Rows:
    """The loops, and where the tensors are read: for each group, each row, or each element."""

    def __init__(self, source: Source) -> None:
        program, layout = source.program, source.layout
        numbers = range(len(program.tensors))
        self.source = source
        self.last = len(layout.loops) - 1
        self.reduced = layout.reduced[:-1]
        self.of_group = [i for i in numbers if not program.inside(i)]
        self.of_element = [i for i in numbers if self.last in source.runs(i)]
        self.of_row = [i for i in numbers if program.inside(i) and i not in self.of_element]
        self.element = Element(source, "at + j", source.affine())

    def head(self) -> list[str]:
        """The lengths, and how many rows ahead memory is asked for."""
        groups = " * ".join([f"n{i}" for i in self.source.layout.kept]) or "1"
        outer = " * ".join([f"n{i}" for i in self.reduced]) or "1"
        return [
            f"  const int64_t groups = {groups}, length = n{self.last}, outer = {outer};",
            "  const double N = double(outer) * length; (void)N;",
            "  const int64_t lead = outer == 1 || length > 2 * FAR ? 0"
            " : std::min(outer, (FAR + length - 1) / length); (void)lead;",
            "  auto place = [&](int64_t row) {",
            *decode(self.reduced, "row", "    "),
            f"    return {offset(self.reduced)};",
            "  };",
        ]

    def group(self) -> list[str]:
        """Where a group lies, and how far from it the next one."""
        kept = self.source.layout.kept
        return [
            "auto start = [&](int64_t group) {",
            *decode(kept, "group", "  "),
            f"  return {offset(kept)};",
            "};",
            *decode(kept, "group", ""),
            f"const int64_t base = {offset(kept)};",
            "const int64_t following = group + 1 < groups ? start(group + 1) - base : 0;",
            "(void)following;",
        ]

    def each_row(self, body: list[str]) -> list[str]:
        """A loop over the rows of a group."""
        return [
            "for (int64_t row = 0; row < outer; ++row) {",
            *decode(self.reduced, "row", "  "),
            f"  const int64_t at = base + {offset(self.reduced)};",
            *indented(body, 2),
            "}",
        ]

    def lead(self) -> list[str]:
        """How far from an element the one lies that is read ``FAR`` elements later.

        Short rows that lie apart are no stream that a processor sees by itself: some rows later, in
        the next group behind the last one.
        """
        return [
            "const int64_t later = row + lead;",
            "const int64_t ahead = lead == 0 ? FAR : later < outer ? place(later) - place(row)",
            "    : following + place(later - outer) - place(row);",
            "(void)ahead;",
        ]

    def row_tensors(self) -> list[str]:
        """The tensors of a row, and where those of its elements begin."""
        index = self.source.index
        lines = [f"const acc t{i} = load<acc>(p{i} + {index(i)});" for i in self.of_row]
        return lines + [
            f"const int64_t at{i} = {index(i, without=self.last)};" for i in self.of_element
        ]

    def element_tensors(self) -> list[str]:
        """The tensors of an element."""
        return [f"const V t{i} = load<V>(p{i} + at{i} + j);" for i in self.of_element]

    def sweep(self, body: list[str], result: str) -> list[str]:
        """A loop over the elements of a group, of which those of a result are made."""
        return self.each_row(
            [
                *self.lead(),
                *self.row_tensors(),
                "each(length, [&](auto tag, int64_t j, auto part) {",
                "  using V = decltype(tag);",
                *indented([*self.claimed(result), *self.element_tensors(), *body], 2),
                "});",
            ]
        )

    def claimed(self, result: str) -> list[str]:
        """Ask for where a result is written a while later."""
        return [f"if (lead > 0 && !past_{result}) fetch_to_write({result} + at + j + ahead);"]

    def sweep_summed(
        self,
        start: list[str],
        body: list[str],
        flush: list[str],
        *,
        by_row: bool,
        after: list[str] | None = None,
    ) -> list[str]:
        """The same for sums, flushed every ``BLOCK`` elements, and after each row where wanted."""
        end = indented([*flush, "n = 0;"], 2)
        blocks = [
            "for (int64_t begin = 0; begin < length; begin += BLOCK) {",
            "  const int64_t end = begin + BLOCK < length ? begin + BLOCK : length;",
            "  each_summed(begin, end, [&](auto tag, int64_t j, auto part) {",
            "    using V = decltype(tag);",
            *indented(body, 4),
            "  });",
            "  n += end - begin;",
            "  if (n >= BLOCK) {",
            *indented(end, 2),
            "  }",
            "}",
        ]
        last = ["if (n > 0) {", *end, "}"]
        return [
            "int64_t n = 0;",
            *self.each_row(
                [*self.lead(), *start, *blocks, *(last if by_row else []), *(after or [])]
            ),
            *([] if by_row else last),
        ]


def _forward(rows: Rows) -> list[str]:
    source = rows.source
    residual = rows.element.fetched(rows.element.reads[1:])  # x is in the cache
    return [
        source.signature("forward", source.forward_arguments(), ["y"]),
        *rows.head(),
        "#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)",
        "  for (int64_t group = 0; group < groups; ++group) {",
        *indented(
            [
                *rows.group(),
                *measured(rows),
                *source.stopped(),
                *group_tensors(source, rows.of_group, rows.of_group),
                *source.coefficients(),
                *[f"const acc {name} = acc({name}_);" for name in source.names()],
                *updates(source),
                *rows.sweep([*residual, *rows.element.forward()], "y"),
            ],
            4,
        ),
        "  }",
        "}",
    ]


def measured(rows: Rows) -> list[str]:
    """M and V of a group, kept for the backward."""
    zero = rows.source.program.about_zero
    first = [
        "acc pivot = load<acc>(x + base);",
        "{",
        "  slots lanes{}; finer rest = 0;",
        "  const int64_t end = length < BLOCK ? length : BLOCK;",
        "  each_summed(0, end, [&](auto tag, int64_t j, auto part) {",
        "    using V = decltype(tag);",
        "    add(lanes, rest, V(load<V>(x + base + j) - pivot), part);",
        "  });",
        "  pivot = pivot_at(pivot + total(lanes, rest) / end);",
        "}",
    ]
    flush = [
        "merge(count, mean, spread, n, pivot, total(lanes, rest), total(squares, rest2));",
        "clear(lanes, rest); clear(squares, rest2);",
        "pivot = pivot_at(mean);",
    ]
    if zero:
        first = ["const acc pivot = 0;"]
        flush = ["spread += total(squares, rest2); clear(squares, rest2);"]
    body = [
        *rows.element.fetched(["x"]),
        "const V d = load<V>(x + at + j) - pivot;",
        *([] if zero else ["add(lanes, rest, d, part);"]),
        "add(squares, rest2, V(d * d), part);",
    ]
    return [
        *first,
        "double count = 0, mean = 0, spread = 0; (void)count; (void)mean;",
        "{",
        "  slots lanes{}, squares{}; finer rest = 0, rest2 = 0; (void)lanes; (void)rest;",
        *indented(rows.sweep_summed([], body, flush, by_row=False), 2),
        "}",
        *moments(rows.source, "mean", "spread"),
    ]


def _backward(rows: Rows) -> list[str]:
    source, element = rows.source, rows.element
    free = source.free()
    sums = Sums(source, rows.of_element, rows.of_row)
    group_sums = [(s.symbol, sums.lane(s.element, s.degree)) for s in source.gradients.sums]
    by_row = {i: inside_sums(source, sums, i) for i in rows.of_row if i in free}
    of_element = [i for i in rows.of_element if i in free]
    of_group = [i for i in rows.of_group if i in free]
    lanes = list(sums.lanes.values())
    adds = [f"add({name}, {name}_rest, V({term}), part);" for name, term in sums.terms()]
    adds += [
        f"store(d{i} + at{i} + j,"
        f" V(load<V>(d{i} + at{i} + j) + fresh(V({inside(source, i)}), part)));"
        for i in of_element
    ]
    flush = [f"const double {name}_sum = total({name}, {name}_rest);" for name in lanes]
    flush += [f"{symbol} += {text};" for symbol, text in group_sums]
    flush += [f"k{i}[group * outer + row] += {text};" for i, text in by_row.items()]
    flush += [f"clear({name}, {name}_rest);" for name in lanes]
    body = [
        *(element.fetched(element.reads_back) if rows.reduced or source.program.activation else []),
        *rows.element_tensors(),
        *element.backward(),
        *adds,
        *(rows.claimed("dresidual") if source.program.residual else []),
        *element.residual_gradient(),
    ]
    group = [
        *rows.group(),
        *source.statistics("group", "groups"),
        *source.stopped(),
        *group_tensors(source, rows.of_group, source.used()),
        *source.coefficients(),
        *[f"const acc {name} = acc({name}_);" for name in source.names()],
        *[f"double {symbol} = 0;" for symbol, _ in group_sums],
        *[f"slots {name}{{}}; finer {name}_rest = 0;" for name in lanes],
        *rows.sweep_summed(
            rows.row_tensors(),
            body,
            flush,
            by_row=bool(rows.of_row),
            after=_full(rows, of_element),
        ),
        *group_gradients(source, of_group),
        "if (dx != nullptr) {",
        "  const acc along = acc(2 * dV / N), level = acc(dM / N);",
        *(["  const acc middle = acc(M);"] if element.needs_mean else []),
        *indented(rows.sweep([*element.backward(), element.input_gradient()], "dx"), 2),
        "}",
    ]
    return [
        source.signature("backward", source.backward_arguments(), ["dx", "dresidual"]),
        *rows.head(),
        *[f"  std::vector<double> k{i}(groups);" for i in of_group],
        *[f"  std::vector<double> k{i}(groups * outer);" for i in by_row],
        *[f"  const int64_t size{i} = {source.size(i)};" for i in of_element],
        *[f"  std::vector<double> whole{i}(threads * size{i});" for i in of_element],
        "#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)",
        "  for (int64_t thread = 0; thread < threads; ++thread) {",
        *[
            f"    std::vector<acc> part{i}(size{i}); acc *__restrict d{i} = part{i}.data();"
            for i in of_element
        ],
        "    const int64_t last = groups * (thread + 1) / threads;",
        *_pass_on(of_element),
        "    for (int64_t group = groups * thread / threads; group < last; ++group) {",
        *indented(group, 6),
        "    }",
        "    pass_on();",
        "  }",
        *scattered(rows, of_group, list(by_row), of_element),
        "}",
    ]


def _pass_on(of_element: list[int]) -> list[str]:
    """What a thread has added up in single precision goes on."""
    lines = ["    int64_t waiting = 0;", "    auto pass_on = [&] {"]
    for i in of_element:
        lines += [
            f"      double *to{i} = whole{i}.data() + thread * size{i};",
            f"      for (int64_t j = 0; j < size{i}; ++j) {{ to{i}[j] += d{i}[j]; d{i}[j] = 0; }}",
        ]
    return [*lines, "      waiting = 0;", "    };"]


def _full(rows: Rows, of_element: list[int]) -> list[str]:
    """Before it is too much: each row may be another one of the tensors, or the same again."""
    if not of_element:
        return []
    runs = [set(rows.source.runs(i)) for i in of_element]
    loops = list(reversed(rows.reduced))
    others = itertools.takewhile(lambda loop: all(loop in own for own in runs), loops)
    apart = "".join(f" * n{loop}" for loop in others)
    return [f"if (++waiting >= ROWS{apart}) pass_on();"]


def scattered(
    rows: Rows, of_group: list[int], by_row: list[int], of_element: list[int]
) -> list[str]:
    """What groups, their rows, and threads add to tensors."""
    source = rows.source
    lines: list[str] = []
    for i in (*of_group, *by_row):
        several = i in by_row
        add = f"sum[{source.index(i)}] += k{i}[{'group * outer + row' if several else 'group'}];"
        adds = [
            "for (int64_t group = 0; group < groups; ++group) {",
            *decode(source.layout.kept, "group", "  "),
            "  const int64_t base = 0; (void)base;",
            *indented(rows.each_row([add]) if several else [add], 2),
            "}",
        ]
        lines += gathered(source, i, adds)
    for i in of_element:
        adds = [
            "for (int64_t thread = 0; thread < threads; ++thread)",
            f"  for (int64_t j = 0; j < size{i}; ++j) sum[j] += whole{i}[thread * size{i} + j];",
        ]
        lines += gathered(source, i, adds)
    return lines
