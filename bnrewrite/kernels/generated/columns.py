"""Kernels over columns: what is reduced lies apart in memory, and many groups side by side.

One task is a block of columns and all rows below it, or a part of them where there are fewer tasks
than threads. Where a group is made of several columns, their moments and sums are merged last.
"""

from __future__ import annotations

from .column_blocks import Columns, added
from .column_gradients import backward
from .pieces import indented, moments, updates
from .printing import Source

PARTS = (  # the moments of a task from those of its parts
    "    for (int64_t q = 0; q < wide; ++q) {",
    "      double count = double(rows / parts), mean = means0[q], spread = spreads0[q];",
    "      for (int64_t part = 1; part < parts; ++part) {",
    "        const int64_t n = rows * (part + 1) / parts - rows * part / parts;",
    "        merge(count, mean, spread, double(n), means0[part * wide + q], 0, 0);",
    "        spread += spreads0[part * wide + q];",
    "      }",
    "      means0[q] = mean; spreads0[q] = spread;",
    "    }",
)


def columns_source(source: Source) -> str:
    """The functions ``forward`` and ``backward``."""
    return "\n".join([*_forward(source), "", *backward(source)])


def _forward(source: Source) -> list[str]:
    columns = Columns(source)
    element = columns.element
    zero = source.program.about_zero
    finished = [
        *merged(zero),
        *moments(source, "mean", "spread"),
        *columns.fill(columns.of_group),
        *updates(source),
    ]
    return [
        source.signature("forward", source.forward_arguments(), ["y"]),
        *columns.head(),
        *measured(columns, zero),
        *columns.of_task(
            "finish", "const double *means, const double *spreads, acc *values", finished
        ),
        *columns.apply([*element.fetched(element.reads), *element.forward()]),
        *_driver(len(columns.arrays)),
        "}",
    ]


def merged(zero: bool) -> list[str]:
    """The moments of a group from those of its columns."""
    together = (
        "  spread += spreads[q];"
        if zero
        else "  merge(count, mean, spread, double(rows), means[q], 0, 0), spread += spreads[q];"
    )
    return [
        "double count = 0, mean = 0, spread = 0; (void)count; (void)mean;",
        "for (int64_t q = first; q < first + within; ++q)",
        together,
    ]


def _driver(arrays: int) -> list[str]:
    """All tasks: each at once, or in parts with the moments merged between."""
    return [
        f"  const int64_t space = {max(arrays, 1)} * wide;",
        "  if (parts == 1) {",
        "#pragma omp parallel num_threads(threads) if (threads > 1)",
        "    {",
        "      std::vector<double> means(wide), spreads(wide); std::vector<acc> values(space),"
        " scratch(3 * wide);",
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
        "    measure(piece / parts, rows * part / parts, rows * (part + 1) / parts,"
        " means.data() + piece * wide,",
        "            spreads.data() + piece * wide, scratch.data());",
        "  }",
        "  for (int64_t task = 0; task < tasks; ++task) {",
        "    double *means0 = means.data() + task * parts * wide, *spreads0 = spreads.data() +"
        " task * parts * wide;",
        *PARTS,
        "    finish(task, means0, spreads0, values.data() + task * space);",
        "  }",
        "#pragma omp parallel for schedule(static) num_threads(threads)",
        "  for (int64_t piece = 0; piece < tasks * parts; ++piece) {",
        "    const int64_t part = piece % parts;",
        "    apply(piece / parts, rows * part / parts, rows * (part + 1) / parts, values.data()"
        " + piece / parts * space);",
        "  }",
    ]


def measured(columns: Columns, zero: bool) -> list[str]:
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
                tail=[added("sums", "sum")],
                after=["is_first = false;"],
            ),
            4,
        ),
        "    for (int64_t q = 0; q < width; ++q) { pivot[q] = pivot_at(pivot[q] + sums[q] /"
        " acc(few)); sums[q] = 0; }",
    ]
    merged = [
        "      for (int64_t q = 0; q < width; ++q) {",
        "        const double sum = sums[q], block = pivot[q] + sum / n, distance = block -"
        " means[q];",
        "        means[q] = between(means[q], block, distance, share);",
        "        spreads[q] += (squares[q] - sum * (sum / n)) + distance * distance * (count *"
        " share);",
        "        pivot[q] = pivot_at(means[q]); sums[q] = squares[q] = 0;",
        "      }",
    ]
    if zero:
        merged = [
            "      for (int64_t q = 0; q < width; ++q) { spreads[q] += squares[q]; squares[q] ="
            " 0; }"
        ]
    adds = ["square += d * d;"] if zero else ["sum += d;", "square += d * d;"]
    head = ["V square{};"]
    tail = [added("squares", "square")]
    if not zero:
        head += ["const V middle = load<V>(pivot + q);", "V sum{};"]
        tail += [added("sums", "sum")]
    value = "load<V>(x + at)" + ("" if zero else " - middle")
    return [
        "  auto measure = [&](int64_t task, int64_t begin, int64_t end, double *means, double"
        " *spreads, acc *scratch) {",
        *columns.task(),
        "    acc *__restrict pivot = scratch, *__restrict sums = scratch + wide, *__restrict"
        " squares = sums + wide;",
        "    for (int64_t q = 0; q < 3 * wide; ++q) scratch[q] = 0;",
        "    for (int64_t q = 0; q < wide; ++q) means[q] = spreads[q] = 0;",
        *(["    int64_t row = begin;"] if zero else [*pivot, "    row = begin;"]),
        "    double count = 0; (void)sums;",
        "    for (int64_t block = begin; block < end; block += MOST) {",
        "      const int64_t stop = std::min(block + MOST, end);",
        "      row = block;",
        *indented(
            columns.sweep(
                "stop",
                [*columns.element.fetched(["x"]), f"const V d = {value};", *adds],
                head=head,
                tail=tail,
            ),
            6,
        ),
        "      const double n = double(stop - block), share = n / (count + n); (void)share;",
        *merged,
        "      count += n;",
        "    }",
        "  };",
    ]
