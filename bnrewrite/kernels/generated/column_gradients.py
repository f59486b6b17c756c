"""The backward over columns: sums of each column, what they make of M and V, then dx."""

from __future__ import annotations

import sympy

from .column_blocks import Columns, added
from .pieces import (
    Sums,
    decode,
    gathered,
    group_gradients,
    group_tensors,
    indented,
    inside,
    inside_sums,
)
from .printing import Source


def backward(source: Source) -> list[str]:
    """The function ``backward``."""
    columns = Columns(source)
    element, names = columns.element, columns.names()
    free = source.free()
    sums = Sums(source, columns.of_row, columns.of_column)
    group_sums = [(s.symbol, sums.lane(s.element, s.degree)) for s in source.gradients.sums]
    of_column = {i: inside_sums(source, sums, i) for i in columns.of_column if i in free}
    of_row = [i for i in columns.of_row if i in free]
    of_group = [i for i in columns.of_group if i in free]
    lanes = list(sums.lanes.values())
    loads = columns.loads()
    columns.arrays += ["level", "along", *(["middle"] if element.needs_mean else [])]
    collected = [
        *element.fetched(element.reads_back),
        *element.backward(),
        *[f"{name}_here += {term};" for name, term in sums.terms()],
        *[
            f"add(row{i}[k], row{i}_rest[k], fresh(V({inside(source, i, names)}), part));"
            for i in of_row
        ],
        *element.residual_gradient(),
    ]
    by_row = [
        f"for (int64_t k = 0; k < tall; ++k) {{ to{i}[row + k] += total(row{i}[k], row{i}_rest[k]);"
        f" row{i}[k] = vec{{}}; row{i}_rest[k] = 0; }}"
        for i in of_row
    ]
    written = [
        *element.fetched(element.reads_back),
        *element.backward(),
        element.input_gradient(),
    ]
    prepared = [*source.statistics("group", "groups"), *columns.fill(source.used())]
    prepared[-1:] = [
        "  level[q] = 0; along[q] = 0;" + (" middle[q] = acc(M);" if element.needs_mean else ""),
        "}",
    ]
    return [
        source.signature("backward", source.backward_arguments(), ["dx", "dresidual"]),
        *columns.head(),
        f"  const int64_t sums = {max(len(lanes), 1)}, space = {len(columns.arrays)} * wide;",
        *[f"  std::vector<double> k{i}(groups);" for i in of_group],
        *[f"  std::vector<double> k{i}(outside * columns);" for i in of_column],
        *[f"  std::vector<double> whole{i}(threads * rows);" for i in of_row],
        "  auto add = [](vec &lanes, acc &rest, auto value) {",
        "    if constexpr (std::is_same_v<decltype(value), vec>) lanes += value; else rest +="
        " value;",
        "  };",
        "  (void)add;",
        *columns.of_task("prepare", "acc *values", prepared),
        *collecting(columns, lanes, loads, collected, of_row, by_row),
        *columns.of_task(
            "finish",
            "const double *totals, acc *values",
            _finished(columns, lanes, group_sums, of_column, of_group),
        ),
        *columns.apply(written, "    if (dx == nullptr) return;"),
        *_driver(),
        *scattered(columns, of_group, list(of_column), of_row),
        "}",
    ]


def collecting(
    columns: Columns,
    lanes: list[str],
    loads: list[str],
    collected: list[str],
    of_row: list[int],
    by_row: list[str],
) -> list[str]:
    """The function that adds up the sums of the columns of a task."""
    kept = [added(name, f"{name}_here") for name in lanes]
    if by_row:  # before it is too much for single precision
        kept += ["if (q % BLOCK == BLOCK - W) {", *indented(by_row, 2), "}"]
    return [
        "  auto collect = [&](int64_t task, int64_t begin, int64_t end, acc *values, double"
        " *totals, acc *scratch) {",
        *columns.task(),
        *columns.pointers("    "),
        *[f"    acc *__restrict {name} = scratch + {n} * wide;" for n, name in enumerate(lanes)],
        "    for (int64_t q = 0; q < sums * wide; ++q) { totals[q] = 0; scratch[q] = 0; }",
        *[f"    vec row{i}[TALL]{{}}; acc row{i}_rest[TALL]{{}};" for i in of_row],
        *[f"    double *to{i} = whole{i}.data() + omp_get_thread_num() * rows;" for i in of_row],
        "    for (int64_t block = begin; block < end; block += ROWS) {",
        "      const int64_t stop = std::min(block + ROWS, end);",
        "      int64_t row = block;",
        *indented(
            columns.sweep(
                "stop",
                collected,
                head=[*loads, *[f"V {name}_here{{}};" for name in lanes]],
                tail=kept,
                after=by_row,
            ),
            6,
        ),
        "      for (int64_t q = 0; q < sums * wide; ++q) { totals[q] += scratch[q]; scratch[q] ="
        " 0; }",
        "    }",
        "  };",
    ]


def _finished(
    columns: Columns,
    lanes: list[str],
    group_sums: list[tuple[sympy.Symbol, str]],
    of_column: dict[int, str],
    of_group: list[int],
) -> list[str]:
    """What the sums of a group's columns make: level and along, and what tensors take."""
    source = columns.source
    inner = [f"const double {name}_sum = totals[{n} * wide + q];" for n, name in enumerate(lanes)]
    if columns.several:
        inner.insert(0, f"const int64_t i{columns.loops[-1]} = q - first;")
    inner += [f"const acc t{i} = load<acc>(p{i} + {source.index(i)});" for i in columns.of_column]
    inner += [f"{symbol} += {text};" for symbol, text in group_sums]
    if of_column:
        inner += [f"const double {n} = {n}_; (void){n};" for n in source.names()]
        inner += [f"k{i}[place * columns + from + q] = {text};" for i, text in of_column.items()]
    return [
        *source.statistics("group", "groups"),
        *source.stopped(),
        *group_tensors(source, columns.of_group, source.used()),
        *(source.coefficients() if of_column else []),
        *[f"double {symbol} = 0;" for symbol, _ in group_sums],
        "for (int64_t q = first; q < first + within; ++q) {",
        *indented(inner, 2),
        "}",
        *group_gradients(source, of_group),
        "for (int64_t q = first; q < first + within; ++q) {",
        "  level[q] = acc(dM / N); along[q] = acc(2 * dV / N);",
        "}",
    ]


def _driver() -> list[str]:
    """All tasks: each at once, or in parts with the sums added up between."""
    return [
        "  const int64_t many = sums * wide;",
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


def scattered(
    columns: Columns, of_group: list[int], of_column: list[int], of_row: list[int]
) -> list[str]:
    """What groups, columns and rows add to tensors."""
    source = columns.source
    layout = source.layout
    reduced = [i for i in layout.reduced if i not in columns.loops]
    lines: list[str] = []
    for numbers, loops, count in (
        (of_group, [*layout.kept, *columns.kept], "groups"),
        (of_column, [*layout.kept, *columns.loops], "outside * columns"),
    ):
        for i in numbers:
            adds = [
                f"for (int64_t one = 0; one < {count}; ++one) {{",
                *decode(loops, "one", "  "),
                f"  sum[{source.index(i)}] += k{i}[one];",
                "}",
            ]
            lines += gathered(source, i, adds)
    for i in of_row:
        adds = [
            "for (int64_t thread = 0; thread < threads; ++thread)",
            "  for (int64_t row = 0; row < rows; ++row) {",
            *decode(reduced, "row", "    "),
            f"    sum[{source.index(i)}] += whole{i}[thread * rows + row];",
            "  }",
        ]
        lines += gathered(source, i, adds)
    return lines
