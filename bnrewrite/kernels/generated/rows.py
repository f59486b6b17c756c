"""Kernels over dense rows: a group is made of rows of ``L`` elements that lie next to each other.

One task is a group: its moments, then y, while the group is in the cache. The backward adds up the
sums of the group, makes dM and dV of them, and writes dx. What a tensor inside a group takes is
added up by each thread, in double precision beyond ``ROWS`` groups.
"""

from __future__ import annotations

from .pieces import Sums, decode, indented, inside, inside_sums, offset
from .printing import Source, of_groups


def rows_source(source: Source) -> str:
    """The functions ``forward`` and ``backward``."""
    return "\n".join([*_forward(source), "", *_backward(source)])


def _groups(source: Source) -> list[str]:
    kept = source.layout.kept
    count = " * ".join([f"n{i}" for i in kept]) or "1"
    lines = [f"  const int64_t groups = {count}, length = n{len(source.layout.loops) - 1};"]
    outer = " * ".join([f"n{i}" for i in source.layout.reduced[:-1]]) or "1"
    return [
        *lines,
        f"  const int64_t outer = {outer};",
        "  const double N = double(outer) * length;",
    ]


class _Tensors:
    """Where the tensors of a program are read: for each group, each row, or each element."""

    def __init__(self, source: Source) -> None:
        program, layout = source.program, source.layout
        last = len(layout.loops) - 1
        numbers = range(len(program.tensors))
        self.source = source
        self.last = last
        self.of_group = [i for i in numbers if not program.inside(i)]
        self.of_element = [i for i in numbers if last in source.runs(i)]
        self.of_row = [i for i in numbers if program.inside(i) and i not in self.of_element]

    def group(self, only: list[int]) -> list[str]:
        return [
            f"const double t{i} = load<acc>(p{i} + {self.source.index(i)});"
            for i in self.of_group
            if i in only
        ]

    def row(self) -> list[str]:
        lines = [f"const acc t{i} = load<acc>(p{i} + {self.source.index(i)});" for i in self.of_row]
        for i in self.of_element:
            lines.append(f"const int64_t at{i} = {self.source.index(i, without=self.last)};")
        return lines

    def element(self) -> list[str]:
        return [f"const V t{i} = load<V>(p{i} + at{i} + j);" for i in self.of_element]


def _forward(source: Source) -> list[str]:
    program, tensors = source.program, _Tensors(source)
    reduced = source.layout.reduced[:-1]
    scale, shift = source.affine()
    u = "(value - centre)" if source.has_centre else "value"
    pre = f"({scale}) * {u}" + (f" + ({shift})" if shift else "")
    pre += " + load<V>(residual + at + j)" if program.residual else ""
    return [
        source.signature("forward", source.forward_arguments()),
        *_groups(source),
        "#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)",
        "  for (int64_t group = 0; group < groups; ++group) {",
        *decode(source.layout.kept, "group", "    "),
        f"    const int64_t base = {offset(source.layout.kept)};",
        *_moments(source, reduced),
        *indented(source.stopped(), 4),
        *indented(tensors.group(tensors.of_group), 4),
        *indented(source.coefficients(), 4),
        *[f"    const acc {name} = acc({name}_);" for name in source.names()],
        *_updates(source),
        "    for (int64_t row = 0; row < outer; ++row) {",
        *decode(reduced, "row", "      "),
        f"      const int64_t at = base + {offset(reduced)};",
        *indented(tensors.row(), 6),
        "      each(0, length, [&](auto tag, int64_t j) {",
        "        using V = decltype(tag);",
        *indented(tensors.element(), 8),
        "        const V value = load<V>(x + at + j);",
        f"        const V made = {pre};",
        f"        store(y + at + j, V({source.activated('made')}));",
        "      });",
        "    }",
        "  }",
        "}",
    ]


def _updates(source: Source) -> list[str]:
    named = [(f"new{i}", value) for i, value in enumerate(source.program.updates)]
    lines = indented(of_groups(named), 4) if named else []
    return lines + [f"    updates[{i} * groups + group] = acc(new{i});" for i in range(len(named))]


def _moments(source: Source, reduced: list[int]) -> list[str]:
    zero = source.program.about_zero
    if zero:
        first = ["    const acc pivot = 0;"]
    else:
        first = [
            "    acc pivot = load<acc>(x + base);",
            "    {",
            "      slots lanes{}; double rest = 0;",
            "      const int64_t end = length < BLOCK ? length : BLOCK;",
            "      each_summed(0, end, [&](auto tag, int64_t j, auto slot) {",
            "        using V = decltype(tag);",
            "        add(lanes, rest, V(load<V>(x + base + j) - pivot), slot);",
            "      });",
            "      pivot = pivot_at(pivot + total(lanes, rest) / end);",
            "    }",
        ]
    adds = [] if zero else ["add(lanes, rest, d, slot);"]
    flush = [
        "merge(count, mean, spread, n, pivot, total(lanes, rest), total(squares, rest2));",
        "clear(lanes, rest); clear(squares, rest2); n = 0;",
        "pivot = pivot_at(mean);",
    ]
    if zero:
        flush = ["spread += total(squares, rest2); clear(squares, rest2); n = 0;"]
    lines = [
        *first,
        "    double count = 0, mean = 0, spread = 0;",
        "    {",
        "      slots lanes{}, squares{}; double rest = 0, rest2 = 0; int64_t n = 0;",
        "      (void)lanes; (void)rest; (void)count; (void)mean;",
        "      for (int64_t row = 0; row < outer; ++row) {",
        *decode(reduced, "row", "        "),
        f"        const auto *from = x + base + {offset(reduced)};",
        "        for (int64_t begin = 0; begin < length; begin += BLOCK) {",
        "          const int64_t end = begin + BLOCK < length ? begin + BLOCK : length;",
        "          each_summed(begin, end, [&](auto tag, int64_t j, auto slot) {",
        "            using V = decltype(tag);",
        "            const V d = load<V>(from + j) - pivot;",
        *indented([*adds, "add(squares, rest2, V(d * d), slot);"], 12),
        "          });",
        "          n += end - begin;",
        "          if (n >= BLOCK) {",
        *indented(flush, 12),
        "          }",
        "        }",
        "      }",
        "      if (n > 0) {",
        *indented(flush, 8),
        "      }",
        "    }",
    ]
    if zero:
        return [*lines, "    const double M = 0, V = spread / N;", "    moments[group] = acc(V);"]
    return [
        *lines,
        "    const double M = mean, V = spread > 0 || spread != spread ? spread / N : 0;",
        "    moments[group] = acc(M); moments[groups + group] = acc(V);",
    ]


def _backward(source: Source) -> list[str]:
    program, tensors, made = source.program, _Tensors(source), source.gradients
    reduced = source.layout.reduced[:-1]
    free = source.free()
    sums = Sums(source, tensors.of_element, tensors.of_row)
    group_sums = [(s, sums.lane(s.element, s.degree)) for s in made.sums]
    by_row = {i: inside_sums(source, sums, i) for i in tensors.of_row if i in free}
    of_element = [i for i in tensors.of_element if i in free]
    of_group = [i for i in tensors.of_group if i in free]
    by_rows = bool(tensors.of_row)
    scale, shift = source.affine()
    lane = list(sums.lanes.values())
    read = _read(source, scale, shift)
    adds = [
        f"add({name}, {name}_rest,"
        f" V({' * '.join([*(['(' + key + ')'] if key else []), 'gu' if degree else 'g'])}), slot);"
        for (key, degree), name in sums.lanes.items()
    ]
    adds += [
        f"store(d{i} + at{i} + j, V(load<V>(d{i} + at{i} + j) + {inside(source, i)}));"
        for i in of_element
    ]
    flush = [f"{s.symbol} += {text};" for s, text in group_sums]
    flush += [f"k{i}[group * outer + row] = {by_row[i]};" for i in by_row]
    sizes = {i: " * ".join(f"n{loop}" for loop in source.runs(i)) or "1" for i in free}
    totals = [f"const double {name}_sum = total({name}, {name}_rest);" for name in lane]
    clear = [f"clear({name}, {name}_rest);" for name in lane]
    flushed = indented([*totals, *flush, *clear, "n = 0;"], 10)
    lines = [
        source.signature("backward", source.backward_arguments()),
        *_groups(source),
        *[f"  std::vector<double> k{i}(groups);" for i in of_group],
        *[f"  std::vector<double> k{i}(groups * outer);" for i in by_row],
        *[f"  const int64_t size{i} = {sizes[i]};" for i in of_element],
        *[f"  std::vector<double> whole{i}(threads * size{i});" for i in of_element],
        "#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)",
        "  for (int64_t thread = 0; thread < threads; ++thread) {",
        *[
            f"    std::vector<acc> part{i}(size{i}); acc *__restrict d{i} = part{i}.data();"
            for i in of_element
        ],
        "    int64_t waiting = 0; (void)waiting;",
        "    for (int64_t group = groups * thread / threads; group < groups * (thread + 1) /"
        " threads; ++group) {",
        *indented(decode(source.layout.kept, "group", ""), 6),
        f"      const int64_t base = {offset(source.layout.kept)};",
        *indented(source.statistics("group", "groups"), 6),
        *indented(source.stopped(), 6),
        *indented(tensors.group(source.used()), 6),
        *indented(source.coefficients(), 6),
        *[f"      const acc {name} = acc({name}_);" for name in source.names()],
        *[f"      double {s.symbol} = 0;" for s, _ in group_sums],
        *[f"      slots {name}{{}}; double {name}_rest = 0;" for name in lane],
        "      int64_t n = 0; (void)n;",
        "      for (int64_t row = 0; row < outer; ++row) {",
        *decode(reduced, "row", "        "),
        f"        const int64_t at = base + {offset(reduced)};",
        *indented(tensors.row(), 8),
        "        for (int64_t begin = 0; begin < length; begin += BLOCK) {",
        "          const int64_t end = begin + BLOCK < length ? begin + BLOCK : length;",
        "          each_summed(begin, end, [&](auto tag, int64_t j, auto slot) {",
        "            using V = decltype(tag);",
        *indented([*tensors.element(), *read, *adds], 12),
        *indented(["store(dresidual + at + j, V(g));"] if program.residual else [], 12),
        "          });",
        "          n += end - begin;",
    ]  # fmt: skip
    if by_rows:
        lines += ["        }", "        {", *flushed, "        }", "      }"]
    else:
        lines += ["          if (n >= BLOCK) {", *flushed, "          }", "        }", "      }"]
        lines += [
            "      if (n > 0) {",
            "        const int64_t row = 0; (void)row;",
            *flushed,
            "      }",
        ]
    named = [("dM", made.mean), ("dV", made.variance)]
    named += [(f"own{i}", made.groups[i]) for i in of_group]
    lines += indented(of_groups(named), 6)
    lines += [f"      k{i}[group] = own{i};" for i in of_group]
    lines += [
        "      if (dx != nullptr) {",
        *indented(_input_gradient(source, tensors, read, reduced, scale), 8),
        "      }",
    ]
    if of_element:
        whole = [f"double *to{i} = whole{i}.data() + thread * size{i};" for i in of_element]
        lines += [
            "      waiting += outer;",
            "      if (waiting >= ROWS || group + 1 == groups * (thread + 1) / threads) {",
            *indented(whole, 8),
            *[
                f"        for (int64_t j = 0; j < size{i}; ++j) {{"
                f" to{i}[j] += d{i}[j]; d{i}[j] = 0; }}"
                for i in of_element
            ],
            "        waiting = 0;",
            "      }",
        ]  # fmt: skip
    lines += ["    }", "  }"]
    for i in of_element:
        lines += [
            f"  for (int64_t j = 0; j < size{i}; ++j) {{",
            f"    for (int64_t thread = 1; thread < threads; ++thread) whole{i}[j] +="
            f" whole{i}[thread * size{i} + j];",
            f"    store(q{i} + j, acc(whole{i}[j]));",
            "  }",
        ]
    lines += _scattered(source, of_group, list(by_row), reduced, sizes)
    return [*lines, "}"]


def _read(source: Source, scale: str, shift: str) -> list[str]:
    """The value, u, and the cotangent behind the activation, of an element."""
    program = source.program
    lines = ["const V value = load<V>(x + at + j);"]
    lines.append(f"const V u = {'value - centre' if source.has_centre else 'value'};")
    if not program.activation:
        return [*lines, "const V g = load<V>(dy + at + j);", "const V gu = g * u; (void)gu;"]
    made = f"({scale}) * u" + (f" + ({shift})" if shift else "")
    if program.residual:
        made = "load<V>(y + at + j)"
    return [
        *lines,
        f"const V made = {made};",
        "V g = load<V>(dy + at + j);",
        f"g = {source.masked('made')};",
        "const V gu = g * u; (void)gu;",
    ]


def _input_gradient(
    source: Source, tensors: _Tensors, read: list[str], reduced: list[int], scale: str
) -> list[str]:
    zero = source.program.about_zero
    lines = ["const acc along = acc(2 * dV / N);"]
    if zero or source.centred_at_mean:
        lines.append("const acc level = acc(dM / N);")
        distance = "value" if zero else "u"
    else:
        lines += ["const acc level = acc(dM / N), middle = acc(M);"]
        distance = "(value - middle)"
    return [
        *lines,
        "for (int64_t row = 0; row < outer; ++row) {",
        *decode(reduced, "row", "  "),
        f"  const int64_t at = base + {offset(reduced)};",
        *indented(tensors.row(), 2),
        "  each(0, length, [&](auto tag, int64_t j) {",
        "    using V = decltype(tag);",
        *indented([*tensors.element(), *read], 4),
        f"    store(dx + at + j, V(({scale}) * g + level + along * {distance}));",
        "  });",
        "}",
    ]


def _scattered(
    source: Source,
    of_group: list[int],
    by_row: list[int],
    reduced: list[int],
    sizes: dict[int, str],
) -> list[str]:
    """What groups, and their rows, add to tensors."""
    lines: list[str] = []
    for i in (*of_group, *by_row):
        rows = "outer" if i in by_row else "1"
        lines += [
            "  {",
            f"    std::vector<double> sum({sizes[i]});",
            "    for (int64_t group = 0; group < groups; ++group) {",
            *decode(source.layout.kept, "group", "      "),
            f"      for (int64_t row = 0; row < {rows}; ++row) {{",
            *(decode(reduced, "row", "        ") if i in by_row else []),
            f"        sum[{source.index(i)}] += k{i}[group * {rows} + row];",
            "      }",
            "    }",
            f"    for (int64_t j = 0; j < int64_t(sum.size()); ++j) store(q{i} + j, acc(sum[j]));",
            "  }",
        ]
    return lines
