"""The backward over columns: sums of each column, what they make of M and V, then dx."""

from __future__ import annotations

from .column_blocks import Columns
from .pieces import Sums, decode, indented, inside, inside_sums
from .printing import Source, of_groups


def backward(source: Source) -> list[str]:
    """The function ``backward``."""
    program, columns, made = source.program, Columns(source), source.gradients
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
    return [
        source.signature("backward", source.backward_arguments()),
        *columns.head(),
        *[f"  std::vector<double> k{i}(groups);" for i in of_group],
        *[f"  std::vector<double> k{i}(outside * columns);" for i in of_column],
        *[f"  std::vector<double> whole{i}(threads * rows);" for i in of_row],
        "  auto add = [](vec &lanes, acc &rest, auto value) {",
        "    if constexpr (std::is_same_v<decltype(value), vec>) lanes += value; else rest +="
        " value;",
        "  };",
        "  (void)add;",
        "  auto prepare = [&](int64_t task, acc *values) {",
        *columns.task(),
        *columns.pointers("    "),
        *columns.each_group(prepared),
        "  };",
        "  auto collect = [&](int64_t task, int64_t begin, int64_t end, acc *values, double"
        " *totals, acc *scratch) {",
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
        f"      for (int64_t q = 0; q < {len(lanes)} * wide; ++q) {{ totals[q] += scratch[q];"
        f" scratch[q] = 0; }}",
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
        "    std::vector<double> totals(tasks * parts * many); std::vector<acc> values(tasks *"
        " space);",
        "    for (int64_t task = 0; task < tasks; ++task) prepare(task, values.data() + task *"
        " space);",
        "#pragma omp parallel for schedule(static) num_threads(threads)",
        "    for (int64_t piece = 0; piece < tasks * parts; ++piece) {",
        "      const int64_t task = piece / parts, part = piece % parts;",
        "      std::vector<acc> scratch(many);",
        "      collect(task, rows * part / parts, rows * (part + 1) / parts, values.data() +"
        " task * space,",
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
        "      apply(task, rows * part / parts, rows * (part + 1) / parts, values.data() + task"
        " * space);",
        "    }",
        "  }",
    ]


def _scattered(
    source: Source, columns: Columns, of_group: list[int], of_column: list[int], of_row: list[int]
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
                f"    for (int64_t j = 0; j < int64_t(sum.size()); ++j) store(q{i} + j,"
                f" acc(sum[j]));",
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
