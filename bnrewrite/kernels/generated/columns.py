"""Kernels over columns: what is reduced lies apart in memory, and many groups side by side.

One task is a block of columns and all rows below it, or a part of them where there are fewer tasks
than threads. Where a group is made of several columns, their moments and sums are merged last.
"""

from __future__ import annotations

from .pieces import Sums, decode, indented, inside, inside_sums, offset
from .printing import Source, Unprintable, of_elements, of_groups

CACHE = 65536  # elements of a task that a core's cache holds between two passes


def columns_source(source: Source) -> str:
    """The functions ``forward`` and ``backward``."""
    return "\n".join([*_forward(source), "", *_backward(source)])


class _Columns:
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
        moving = {program.symbol(i) for i in self.of_row}
        self.terms = {"a": program.scale, "b": program.shift}
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

    def head(self) -> list[str]:
        """How the work is cut."""
        layout = self.source.layout
        outside = " * ".join(f"n{i}" for i in layout.kept) or "1"
        rows = " * ".join(f"n{i}" for i in layout.reduced if i not in self.loops) or "1"
        columns = " * ".join(f"n{i}" for i in self.loops)
        within = f"n{self.loops[-1]}" if self.several else "1"
        wide = "columns" if self.several else (
            f"std::min(columns, std::max(int64_t(64), {CACHE} / rows / W * W))"
        )  # fmt: skip
        return [
            f"  const int64_t outside = {outside}, rows = {rows}, columns = {columns};",
            f"  const int64_t within = {within}, groups = outside * (columns / within);",
            f"  const int64_t wide = {wide}, blocks = (columns + wide - 1) / wide;",
            "  const int64_t tasks = outside * blocks;",
            "  const int64_t parts = tasks >= threads ? 1 : std::min(rows, (threads + tasks - 1) / tasks);",
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
        self, end: str, body: list[str], *, head: list[str], tail: list[str], after: list[str]
    ) -> list[str]:
        """Rows from ``row`` to an end, several at once: their sums are taken in registers first."""
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
            "  auto sweep = [&](auto count) {",
            "    each(0, width, [&](auto tag, int64_t q) {",
            "      using V = decltype(tag);",
            *indented(head, 6),
            "      for (int64_t k = 0; k < count; ++k) {",
            "        const int64_t at = places[k] + q;",
            *[f"        const acc t{i} = row_t{i}[k];" for i in numbers],
            *indented(body, 8),
            "      }",
            *indented(tail, 6),
            "    });",
            "  };",
            "  if (tall == TALL) sweep(std::integral_constant<int64_t, TALL>{}); else sweep(tall);",
            *indented(after, 2),
            "}",
        ]

    def affine(self) -> tuple[str, str]:
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

    def group(self, only: list[int]) -> list[str]:
        """The tensors of a group."""
        return [
            f"const double t{i} = load<acc>(p{i} + {self.source.index(i)});"
            for i in self.of_group
            if i in only
        ]

    def fill(self, only: list[int]) -> list[str]:
        """The arrays of the columns of one group, whose M and V are known."""
        source = self.source
        lines = [*source.stopped(), *self.group(only)]
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


def _forward(source: Source) -> list[str]:
    program, columns = source.program, _Columns(source)
    scale, shift = columns.affine()
    u = "(value - centre_q)" if source.has_centre else "value"
    made = f"({scale}) * {u}" + (f" + {shift}" if shift else "")
    made += " + load<V>(residual + at)" if program.residual else ""
    named = [(f"new{i}", value) for i, value in enumerate(program.updates)]
    updates = of_groups(named) if named else []
    updates += [f"updates[{i} * groups + group] = acc(new{i});" for i in range(len(named))]
    zero = program.about_zero
    merged = [
        "double count = 0, mean = 0, spread = 0;",
        "for (int64_t q = first; q < first + within; ++q)",
        "  merge(count, mean, spread, double(rows), means[q], 0, 0), spread += spreads[q];"
        if not zero
        else "  spread += spreads[q];",
        "(void)count; (void)mean;",
    ]
    if zero:
        merged += ["const double M = 0, V = spread / N;", "moments[group] = acc(V);"]
    else:
        merged += [
            "const double M = mean, V = spread > 0 || spread != spread ? spread / N : 0;",
            "moments[group] = acc(M); moments[groups + group] = acc(V);",
        ]
    return [
        source.signature("forward", source.forward_arguments()),
        *columns.head(),
        *_measure(columns, zero),
        "  auto finish = [&](int64_t task, const double *means, const double *spreads, acc *values) {",
        *columns.task(),
        *columns.pointers("    "),
        *columns.each_group([*merged, *columns.fill(columns.of_group), *updates]),
        "  };",
        "  auto apply = [&](int64_t task, int64_t begin, int64_t end, acc *values) {",
        *columns.task(),
        *columns.pointers("    "),
        "    int64_t row = begin;",
        *indented(
            columns.sweep(
                "end",
                [
                    "const V value = load<V>(x + at);",
                    f"const V made = {made};",
                    f"store(y + at, V({source.activated('made')}));",
                ],
                head=columns.loads(),
                tail=[],
                after=[],
            ),
            4,
        ),
        "  };",
        *_driver(len(columns.arrays)),
        "}",
    ]


def _driver(arrays: int) -> list[str]:
    """All tasks: each at once, or in parts with the moments merged between."""
    return [
        f"  const int64_t space = {max(arrays, 1)} * wide;",
        "  if (parts == 1) {",
        "#pragma omp parallel num_threads(threads) if (threads > 1)",
        "    {",
        "      std::vector<double> means(wide), spreads(wide); std::vector<acc> values(space), scratch(3 * wide);",
        "#pragma omp for schedule(static)",
        "      for (int64_t task = 0; task < tasks; ++task) {",
        "        measure(task, 0, rows, means.data(), spreads.data(), scratch.data());",
        "        finish(task, means.data(), spreads.data(), values.data());",
        "        apply(task, 0, rows, values.data());",
        "      }",
        "    }",
        "    return;",
        "  }",
        "  std::vector<double> means(tasks * parts * wide), spreads(tasks * parts * wide);",
        "  std::vector<acc> values(tasks * space);",
        "#pragma omp parallel for schedule(static) num_threads(threads)",
        "  for (int64_t piece = 0; piece < tasks * parts; ++piece) {",
        "    const int64_t part = piece % parts;",
        "    std::vector<acc> scratch(3 * wide);",
        "    measure(piece / parts, rows * part / parts, rows * (part + 1) / parts, means.data() + piece * wide,",
        "            spreads.data() + piece * wide, scratch.data());",
        "  }",
        "  for (int64_t task = 0; task < tasks; ++task) {",
        "    double *means0 = means.data() + task * parts * wide, *spreads0 = spreads.data() + task * parts * wide;",
        "    for (int64_t q = 0; q < wide; ++q) {",
        "      double count = double(rows / parts), mean = means0[q], spread = spreads0[q];",
        "      for (int64_t part = 1; part < parts; ++part) {",
        "        const int64_t n = rows * (part + 1) / parts - rows * part / parts;",
        "        merge(count, mean, spread, double(n), means0[part * wide + q], 0, 0);",
        "        spread += spreads0[part * wide + q];",
        "      }",
        "      means0[q] = mean; spreads0[q] = spread;",
        "    }",
        "    finish(task, means0, spreads0, values.data() + task * space);",
        "  }",
        "#pragma omp parallel for schedule(static) num_threads(threads)",
        "  for (int64_t piece = 0; piece < tasks * parts; ++piece) {",
        "    const int64_t part = piece % parts;",
        "    apply(piece / parts, rows * part / parts, rows * (part + 1) / parts, values.data() + piece / parts * space);",
        "  }",
    ]


def _measure(columns: _Columns, zero: bool) -> list[str]:
    """The moments of the columns of a task over some rows."""
    pivot = [
        "    const int64_t few = std::min(end - begin, ROWS);",
        "    bool is_first = true;",
        "    int64_t row = begin;",
        *indented(
            columns.sweep(
                "begin + few",
                ["sum += load<V>(x + at) - first;"],
                head=[
                    "const V first = is_first ? load<V>(x + places[0] + q) : load<V>(pivot + q);",
                    "if (is_first) store(pivot + q, first);",
                    "V sum{};",
                ],
                tail=["store(sums + q, V(load<V>(sums + q) + sum));"],
                after=["is_first = false;"],
            ),
            4,
        ),
        "    for (int64_t q = 0; q < width; ++q) { pivot[q] = pivot_at(pivot[q] + sums[q] / acc(few)); sums[q] = 0; }",
    ]
    merged = [
        "      for (int64_t q = 0; q < width; ++q) {",
        "        const double sum = sums[q], block = pivot[q] + sum / n, distance = block - means[q];",
        "        means[q] = between(means[q], block, distance, share);",
        "        spreads[q] += (squares[q] - sum * (sum / n)) + distance * distance * (count * share);",
        "        pivot[q] = pivot_at(means[q]); sums[q] = squares[q] = 0;",
        "      }",
    ]
    if zero:
        merged = [
            "      for (int64_t q = 0; q < width; ++q) { spreads[q] += squares[q]; squares[q] = 0; }"
        ]
    adds = ["square += d * d;"] if zero else ["sum += d;", "square += d * d;"]
    head = ["V square{};"]
    tail = ["store(squares + q, V(load<V>(squares + q) + square));"]
    if not zero:
        head += ["const V middle = load<V>(pivot + q);", "V sum{};"]
        tail += ["store(sums + q, V(load<V>(sums + q) + sum));"]
    value = "load<V>(x + at)" + ("" if zero else " - middle")
    return [
        "  auto measure = [&](int64_t task, int64_t begin, int64_t end, double *means, double *spreads, acc *scratch) {",
        *columns.task(),
        "    acc *__restrict pivot = scratch, *__restrict sums = scratch + wide, *__restrict squares = sums + wide;",
        "    for (int64_t q = 0; q < 3 * wide; ++q) scratch[q] = 0;",
        "    for (int64_t q = 0; q < wide; ++q) means[q] = spreads[q] = 0;",
        *(["    int64_t row = begin;"] if zero else [*pivot, "    row = begin;"]),
        "    double count = 0; (void)sums;",
        "    for (int64_t block = begin; block < end; block += ROWS) {",
        "      const int64_t stop = std::min(block + ROWS, end);",
        "      row = block;",
        *indented(
            columns.sweep("stop", [f"const V d = {value};", *adds], head=head, tail=tail, after=[]),
            6,
        ),
        "      const double n = double(stop - block), share = n / (count + n); (void)share;",
        *merged,
        "      count += n;",
        "    }",
        "  };",
    ]


def _backward(source: Source) -> list[str]:
    program, columns, made = source.program, _Columns(source), source.gradients
    free = source.free()
    sums = Sums(source, columns.of_row, columns.of_column)
    group_sums = [(s.symbol, sums.lane(s.element, s.degree)) for s in made.sums]
    of_column = {i: inside_sums(source, sums, i) for i in columns.of_column if i in free}
    of_row = [i for i in columns.of_row if i in free]
    of_group = [i for i in columns.of_group if i in free]
    scale, shift = columns.affine()
    read = _read(source, scale, shift)
    lanes = list(sums.lanes.items())
    adds = [
        f"sum{n} += {' * '.join([*(['(' + key + ')'] if key else []), 'gu' if degree else 'g'])};"
        for n, ((key, degree), _) in enumerate(lanes)
    ]
    names = columns.names()
    adds += [f"add(row{i}[k], row{i}_rest[k], V({inside(source, i, names)}));" for i in of_row]
    adds += ["store(dresidual + at, V(g));"] if program.residual else []
    held = [f"V sum{n}{{}};" for n in range(len(lanes))]
    stored = [f"store(lane{n} + q, V(load<V>(lane{n} + q) + sum{n}));" for n in range(len(lanes))]
    by_row = [
        f"for (int64_t k = 0; k < tall; ++k) {{ to{i}[row + k] += total(row{i}[k], row{i}_rest[k]);"
        f" row{i}[k] = vec{{}}; row{i}_rest[k] = 0; }}"
        for i in of_row
    ]
    loads = columns.loads()
    count = max(len(lanes), 1)
    zero = program.about_zero
    middle = [] if zero or source.centred_at_mean else ["middle"]
    columns.arrays += ["level", "along", *middle]
    distance = "value" if zero else "u" if source.centred_at_mean else "(value - middle_q)"
    named = [("dM", made.mean), ("dV", made.variance)]
    named += [(f"own{i}", made.groups[i]) for i in of_group]
    prepared = [*source.statistics("group", "groups"), *columns.fill(source.used())]
    prepared[-1:] = [
        "  level[q] = 0; along[q] = 0;" + (" middle[q] = acc(M);" if middle else ""),
        "}",
    ]
    finished = [
        *source.statistics("group", "groups"),
        *source.stopped(),
        *columns.group(source.used()),
        *(source.coefficients() if of_column else []),
        *[f"double {symbol} = 0;" for symbol, _ in group_sums],
    ]
    inner = [f"  const double lane{n}_sum = totals[{n} * wide + q];" for n in range(len(lanes))]
    if columns.several:
        inner.insert(0, f"  const int64_t i{columns.loops[-1]} = q - first;")
    inner += [f"  const acc t{i} = load<acc>(p{i} + {source.index(i)});" for i in columns.of_column]
    inner += [f"  {symbol} += {text};" for symbol, text in group_sums]
    if of_column:
        inner += [f"  const double {n} = {n}_; (void){n};" for n in source.names()]
        inner += [f"  k{i}[place * columns + from + q] = {text};" for i, text in of_column.items()]
    finished += ["for (int64_t q = first; q < first + within; ++q) {", *inner, "}"]
    finished += of_groups(named)
    finished += [f"k{i}[group] = own{i};" for i in of_group]
    finished += [
        "for (int64_t q = first; q < first + within; ++q) {",
        "  level[q] = acc(dM / N); along[q] = acc(2 * dV / N);",
        "}",
    ]
    lines = [
        source.signature("backward", source.backward_arguments()),
        *columns.head(),
        *[f"  std::vector<double> k{i}(groups);" for i in of_group],
        *[f"  std::vector<double> k{i}(outside * columns);" for i in of_column],
        *[f"  std::vector<double> whole{i}(threads * rows);" for i in of_row],
        "  auto add = [](vec &lanes, acc &rest, auto value) {",
        "    if constexpr (std::is_same_v<decltype(value), vec>) lanes += value; else rest += value;",
        "  };",
        "  (void)add;",
        "  auto prepare = [&](int64_t task, acc *values) {",
        *columns.task(),
        *columns.pointers("    "),
        *columns.each_group(prepared),
        "  };",
        "  auto collect = [&](int64_t task, int64_t begin, int64_t end, acc *values, double *totals, acc *scratch) {",
        *columns.task(),
        *columns.pointers("    "),
        *[f"    acc *__restrict lane{n} = scratch + {n} * wide;" for n in range(len(lanes))],
        f"    for (int64_t q = 0; q < {count} * wide; ++q) {{ totals[q] = 0; scratch[q] = 0; }}",
        *[f"    vec row{i}[TALL]{{}}; acc row{i}_rest[TALL]{{}};" for i in of_row],
        *[f"    double *to{i} = whole{i}.data() + omp_get_thread_num() * rows;" for i in of_row],
        "    for (int64_t block = begin; block < end; block += ROWS) {",
        "      const int64_t stop = std::min(block + ROWS, end);",
        "      int64_t row = block;",
        *indented(
            columns.sweep("stop", [*read, *adds], head=[*loads, *held], tail=stored, after=by_row),
            6,
        ),
        f"      for (int64_t q = 0; q < {len(lanes)} * wide; ++q) {{ totals[q] += scratch[q]; scratch[q] = 0; }}",
        "    }",
        "  };",
        "  auto finish = [&](int64_t task, const double *totals, acc *values) {",
        *columns.task(),
        *columns.pointers("    "),
        *columns.each_group(finished),
        "  };",
        "  auto apply = [&](int64_t task, int64_t begin, int64_t end, acc *values) {",
        "    if (dx == nullptr) return;",
        *columns.task(),
        *columns.pointers("    "),
        "    int64_t row = begin;",
        *indented(
            columns.sweep(
                "end",
                [*read, f"store(dx + at, V(({scale}) * g + level_q + along_q * {distance}));"],
                head=columns.loads(),
                tail=[],
                after=[],
            ),
            4,
        ),
        "  };",
        *_backward_driver(len(columns.arrays), count),
        *_scattered(source, columns, of_group, list(of_column), of_row),
        "}",
    ]
    return lines


def _read(source: Source, scale: str, shift: str) -> list[str]:
    """The value, u, and the cotangent behind the activation, of an element."""
    u = "value - centre_q" if source.has_centre else "value"
    lines = ["const V value = load<V>(x + at);", f"const V u = {u};"]
    if not source.program.activation:
        return [*lines, "const V g = load<V>(dy + at);", "const V gu = g * u; (void)gu;"]
    made = f"({scale}) * u" + (f" + {shift}" if shift else "")
    if source.program.residual:
        made = "load<V>(y + at)"
    return [
        *lines,
        f"const V made = {made};",
        "V g = load<V>(dy + at);",
        f"g = {source.masked('made')};",
        "const V gu = g * u; (void)gu;",
    ]


def _backward_driver(arrays: int, lanes: int) -> list[str]:
    return [
        f"  const int64_t space = {arrays} * wide, many = {lanes} * wide;",
        "  if (parts == 1) {",
        "#pragma omp parallel num_threads(threads) if (threads > 1)",
        "    {",
        "      std::vector<double> totals(many); std::vector<acc> values(space), scratch(many);",
        "#pragma omp for schedule(static)",
        "      for (int64_t task = 0; task < tasks; ++task) {",
        "        prepare(task, values.data());",
        "        collect(task, 0, rows, values.data(), totals.data(), scratch.data());",
        "        finish(task, totals.data(), values.data());",
        "        apply(task, 0, rows, values.data());",
        "      }",
        "    }",
        "  } else {",
        "    std::vector<double> totals(tasks * parts * many); std::vector<acc> values(tasks * space);",
        "    for (int64_t task = 0; task < tasks; ++task) prepare(task, values.data() + task * space);",
        "#pragma omp parallel for schedule(static) num_threads(threads)",
        "    for (int64_t piece = 0; piece < tasks * parts; ++piece) {",
        "      const int64_t task = piece / parts, part = piece % parts;",
        "      std::vector<acc> scratch(many);",
        "      collect(task, rows * part / parts, rows * (part + 1) / parts, values.data() + task * space,",
        "              totals.data() + piece * many, scratch.data());",
        "    }",
        "    for (int64_t task = 0; task < tasks; ++task) {",
        "      double *totals0 = totals.data() + task * parts * many;",
        "      for (int64_t part = 1; part < parts; ++part)",
        "        for (int64_t q = 0; q < many; ++q) totals0[q] += totals0[part * many + q];",
        "      finish(task, totals0, values.data() + task * space);",
        "    }",
        "#pragma omp parallel for schedule(static) num_threads(threads)",
        "    for (int64_t piece = 0; piece < tasks * parts; ++piece) {",
        "      const int64_t task = piece / parts, part = piece % parts;",
        "      apply(task, rows * part / parts, rows * (part + 1) / parts, values.data() + task * space);",
        "    }",
        "  }",
    ]


def _scattered(
    source: Source, columns: _Columns, of_group: list[int], of_column: list[int], of_row: list[int]
) -> list[str]:
    """What groups, columns and rows add to tensors."""
    layout = source.layout
    groups = [*layout.kept, *columns.kept]
    everything = [*layout.kept, *columns.loops]
    reduced = [i for i in layout.reduced if i not in columns.loops]
    lines = []
    for numbers, loops, count in (
        (of_group, groups, "groups"),
        (of_column, everything, "outside * columns"),
    ):
        for i in numbers:
            size = " * ".join(f"n{loop}" for loop in source.runs(i)) or "1"
            lines += [
                "  {",
                f"    std::vector<double> sum({size});",
                f"    for (int64_t one = 0; one < {count}; ++one) {{",
                *decode(loops, "one", "      "),
                f"      sum[{source.index(i)}] += k{i}[one];",
                "    }",
                f"    for (int64_t j = 0; j < int64_t(sum.size()); ++j) store(q{i} + j, acc(sum[j]));",
                "  }",
            ]
    for i in of_row:
        size = " * ".join(f"n{loop}" for loop in source.runs(i))
        lines += [
            "  {",
            f"    std::vector<double> sum({size});",
            "    for (int64_t thread = 0; thread < threads; ++thread)",
            "      for (int64_t row = 0; row < rows; ++row) {",
            *decode(reduced, "row", "        "),
            f"        sum[{source.index(i)}] += whole{i}[thread * rows + row];",
            "      }",
            f"    for (int64_t j = 0; j < int64_t(sum.size()); ++j) store(q{i} + j, acc(sum[j]));",
            "  }",
        ]
    return lines
