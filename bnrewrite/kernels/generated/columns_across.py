"""Kernels over columns whose groups share means: see ``columns.py`` and ``across.py``."""

from __future__ import annotations

from .across import Across
from .column_blocks import Columns
from .column_gradients import collecting, scattered
from .columns import PARTS, measured, merged
from .pieces import Sums, decode, group_gradients, group_tensors, indented, moments, updates
from .printing import Source

PARALLEL = "#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)"
PIECE = (
    "const int64_t task = piece / parts, part = piece % parts, begin = rows * part / parts,"
    " end = rows * (part + 1) / parts;"
)


def columns_across_source(source: Source) -> str:
    """The functions ``forward`` and ``backward``."""
    return "\n".join([*_forward(source), "", *_backward(source)])


def _across(columns: Columns) -> Across:
    def each(body: list[str]) -> list[str]:
        return [
            "for (int64_t place = set * together; place < (set + 1) * together; ++place) {",
            *decode(columns.source.layout.kept, "place", "  "),
            "  for (int64_t column = 0; column < columns / within; ++column) {",
            "    const int64_t group = place * (columns / within) + column;",
            *decode(columns.kept, "column", "    "),
            *indented(body, 4),
            "  }",
            "}",
        ]

    return Across(columns.source, each)


def _forward(source: Source) -> list[str]:
    columns = Columns(source)
    element = columns.element
    across = _across(columns)
    zero = source.program.about_zero
    finished = [*merged(zero), *moments(source, "mean", "spread")]
    filled = [
        *source.statistics("group", "groups"),
        *across.loads(),
        *columns.fill(columns.of_group),
        *updates(source),
    ]
    body = [*element.fetched(element.reads), *element.forward()]
    return [
        source.signature("forward", source.forward_arguments(), ["y"]),
        *_head(columns, across),
        *measured(columns, zero),
        *columns.of_task("finish", "const double *means, const double *spreads", finished),
        *across.average(),
        *columns.of_task("fill", "acc *values", filled),
        *columns.apply(body),
        *_forward_driver(len(columns.arrays)),
        "}",
    ]


def _backward(source: Source) -> list[str]:
    columns = Columns(source)
    across, element = _across(columns), columns.element
    of_group = [i for i in columns.of_group if i in source.free()]
    sums = Sums(source, [], [])
    group_sums = [(s.symbol, sums.lane(s.element, s.degree)) for s in source.gradients.sums]
    lanes = list(sums.lanes.values())
    loads = columns.loads()
    columns.arrays += ["level", "along", *(["middle"] if element.needs_mean else [])]
    collected = [
        *element.fetched(element.reads_back),
        *element.backward(),
        *[f"{name}_here += {term};" for name, term in sums.terms()],
        *element.residual_gradient(),
    ]
    written = [*element.fetched(element.reads_back), *element.backward(), element.input_gradient()]
    summed = [
        *[f"double {symbol} = 0;" for symbol, _ in group_sums],
        "for (int64_t q = first; q < first + within; ++q) {",
        *[f"  const double {name}_sum = totals[{n} * wide + q];" for n, name in enumerate(lanes)],
        *[f"  {symbol} += {text};" for symbol, text in group_sums],
        "}",
        *across.keep_sums(),
    ]
    known = [*source.statistics("group", "groups"), *across.loads()]
    prepared = [*known, *columns.fill(source.used())]
    finished = [
        *known,
        *source.stopped(),
        *group_tensors(source, columns.of_group, source.used()),
        *across.gradients(),
        *group_gradients(source, of_group),
        "for (int64_t q = first; q < first + within; ++q) {",
        "  level[q] = acc(dM / N); along[q] = acc(2 * dV / N);",
        *(["  middle[q] = acc(M);"] if element.needs_mean else []),
        "}",
    ]
    return [
        source.signature("backward", source.backward_arguments(), ["dx", "dresidual"]),
        *_head(columns, across),
        *across.head_back(),
        f"  const int64_t sums = {max(len(lanes), 1)}, space = {len(columns.arrays)} * wide;",
        *[f"  std::vector<double> k{i}(groups);" for i in of_group],
        *across.average(),
        *columns.of_task("prepare", "acc *values", prepared),
        *collecting(columns, lanes, loads, collected, [], []),
        *columns.of_task("keep", "const double *totals", summed),
        *across.turn(),
        *columns.of_task("finish", "acc *values", finished),
        *columns.apply(written, "    if (dx == nullptr) return;"),
        *_backward_driver(),
        *scattered(columns, of_group, [], []),
        "}",
    ]


def _head(columns: Columns, across: Across) -> list[str]:
    lengths = "  const int64_t together = outside / sets, many = tasks / sets;"
    return [*columns.head(), *across.head(), lengths]


def _forward_driver(arrays: int) -> list[str]:
    """All sets: each at once, or step by step, a task in parts with its moments merged between."""
    return [
        f"  const int64_t space = {max(arrays, 1)} * wide;",
        "  if (sets >= threads) {",
        "#pragma omp parallel num_threads(threads) if (threads > 1)",
        "    {",
        "      std::vector<double> means(wide), spreads(wide); std::vector<acc> values(space),"
        " scratch(3 * wide);",
        "#pragma omp for schedule(static)",
        "      for (int64_t set = 0; set < sets; ++set) {",
        "        for (int64_t task = set * many; task < (set + 1) * many; ++task) {",
        "          measure(task, 0, rows, means.data(), spreads.data(), scratch.data());",
        "          finish(task, means.data(), spreads.data());",
        "        }",
        "        average(set);",
        "        for (int64_t task = set * many; task < (set + 1) * many; ++task) {",
        "          fill(task, values.data());",
        "          apply(task, 0, rows, values.data());",
        "        }",
        "      }",
        "    }",
        "    return;",
        "  }",
        "  std::vector<double> means(tasks * parts * wide), spreads(tasks * parts * wide);",
        "  std::vector<acc> values(tasks * space);",
        PARALLEL,
        "  for (int64_t piece = 0; piece < tasks * parts; ++piece) {",
        f"    {PIECE}",
        "    std::vector<acc> scratch(3 * wide);",
        "    measure(task, begin, end, means.data() + piece * wide, spreads.data() + piece * wide,"
        " scratch.data());",
        "  }",
        "  for (int64_t task = 0; task < tasks; ++task) {",
        "    double *means0 = means.data() + task * parts * wide, *spreads0 = spreads.data() +"
        " task * parts * wide;",
        *PARTS,
        "    finish(task, means0, spreads0);",
        "  }",
        "  for (int64_t set = 0; set < sets; ++set) average(set);",
        "  for (int64_t task = 0; task < tasks; ++task) fill(task, values.data() + task * space);",
        PARALLEL,
        "  for (int64_t piece = 0; piece < tasks * parts; ++piece) {",
        f"    {PIECE}",
        "    apply(task, begin, end, values.data() + task * space);",
        "  }",
    ]


def _backward_driver() -> list[str]:
    """All sets: each at once, or step by step, a task in parts with its sums added up between."""
    return [
        "  const int64_t wanted = sums * wide;",
        "  if (sets >= threads) {",
        "#pragma omp parallel num_threads(threads) if (threads > 1)",
        "    {",
        "      std::vector<double> totals(wanted); std::vector<acc> values(many * space),"
        " scratch(wanted);",
        "#pragma omp for schedule(static)",
        "      for (int64_t set = 0; set < sets; ++set) {",
        "        average(set);",
        "        for (int64_t task = set * many; task < (set + 1) * many; ++task) {",
        "          acc *own = values.data() + (task - set * many) * space;",
        "          prepare(task, own);",
        "          collect(task, 0, rows, own, totals.data(), scratch.data());",
        "          keep(task, totals.data());",
        "        }",
        "        turn(set);",
        "        for (int64_t task = set * many; task < (set + 1) * many; ++task) {",
        "          acc *own = values.data() + (task - set * many) * space;",
        "          finish(task, own);",
        "          apply(task, 0, rows, own);",
        "        }",
        "      }",
        "    }",
        "  } else {",
        "    std::vector<double> totals(tasks * parts * wanted); std::vector<acc> values(tasks *"
        " space);",
        "    for (int64_t set = 0; set < sets; ++set) average(set);",
        "    for (int64_t task = 0; task < tasks; ++task) prepare(task, values.data() + task *"
        " space);",
        PARALLEL,
        "    for (int64_t piece = 0; piece < tasks * parts; ++piece) {",
        f"      {PIECE}",
        "      std::vector<acc> scratch(wanted);",
        "      collect(task, begin, end, values.data() + task * space, totals.data() + piece *"
        " wanted, scratch.data());",
        "    }",
        "    for (int64_t task = 0; task < tasks; ++task) {",
        "      double *totals0 = totals.data() + task * parts * wanted;",
        "      for (int64_t part = 1; part < parts; ++part)",
        "        for (int64_t q = 0; q < wanted; ++q) totals0[q] += totals0[part * wanted + q];",
        "      keep(task, totals0);",
        "    }",
        "    for (int64_t set = 0; set < sets; ++set) turn(set);",
        "    for (int64_t task = 0; task < tasks; ++task) finish(task, values.data() + task *"
        " space);",
        PARALLEL,
        "    for (int64_t piece = 0; piece < tasks * parts; ++piece) {",
        f"      {PIECE}",
        "      apply(task, begin, end, values.data() + task * space);",
        "    }",
        "  }",
    ]
