"""Kernels over dense rows whose groups share means: see ``rows.py`` and ``across.py``."""

from __future__ import annotations

from .across import Across
from .pieces import Sums, decode, group_gradients, group_tensors, indented, updates
from .printing import Source
from .rows import Rows, measured, scattered


def rows_across_source(source: Source) -> str:
    """The functions ``forward`` and ``backward``."""
    rows = Rows(source)

    def each(body: list[str]) -> list[str]:
        return [
            "for (int64_t group = set * together; group < (set + 1) * together; ++group) {",
            *decode(source.layout.kept, "group", "  "),
            *indented(body, 2),
            "}",
        ]

    across = Across(source, each)
    return "\n".join([*_forward(rows, across), "", *_backward(rows, across)])


def _forward(rows: Rows, across: Across) -> list[str]:
    source, element = rows.source, rows.element
    return [
        source.signature("forward", source.forward_arguments(), ["y"]),
        *_head(rows, across),
        *_function(rows, "measure", measured(rows)),
        *across.average(),
        *_function(
            rows,
            "apply",
            [
                *_known(rows, across, rows.of_group),
                *updates(source),
                *rows.sweep([*element.fetched(element.reads), *element.forward()], "y"),
            ],
        ),
        *_driver("measure", ["average"]),
        "}",
    ]


def _backward(rows: Rows, across: Across) -> list[str]:
    source, element = rows.source, rows.element
    of_group = [i for i in rows.of_group if i in source.free()]
    sums = Sums(source, [], [])
    group_sums = [(s.symbol, sums.lane(s.element, s.degree)) for s in source.gradients.sums]
    lanes = list(sums.lanes.values())
    adds = [f"add({name}, {name}_rest, V({term}), part);" for name, term in sums.terms()]
    flush = [f"const double {name}_sum = total({name}, {name}_rest);" for name in lanes]
    flush += [f"{symbol} += {text};" for symbol, text in group_sums]
    flush += [f"clear({name}, {name}_rest);" for name in lanes]
    body = [
        *element.fetched(element.reads_back),
        *element.backward(),
        *adds,
        *element.residual_gradient(),
    ]
    collected = [
        *_known(rows, across, source.used()),
        *[f"double {symbol} = 0;" for symbol, _ in group_sums],
        *[f"slots {name}{{}}; finer {name}_rest = 0;" for name in lanes],
        *rows.sweep_summed([], body, flush, by_row=False),
        *across.keep_sums(),
    ]
    applied = [
        *_known(rows, across, source.used()),
        *across.gradients(),
        *group_gradients(source, of_group),
        "if (dx != nullptr) {",
        "  const acc along = acc(2 * dV / N), level = acc(dM / N);",
        *(["  const acc middle = acc(M);"] if element.needs_mean else []),
        *indented(
            rows.sweep(
                [
                    *element.fetched(element.reads_back),
                    *element.backward(),
                    element.input_gradient(),
                ],
                "dx",
            ),
            2,
        ),
        "}",
    ]
    return [
        source.signature("backward", source.backward_arguments(), ["dx", "dresidual"]),
        *_head(rows, across),
        *across.head_back(),
        *[f"  std::vector<double> k{i}(groups);" for i in of_group],
        *across.average(),
        *_function(rows, "collect", collected),
        *across.turn(),
        *_function(rows, "apply", applied),
        *_driver("collect", ["turn"], before="average"),
        *scattered(rows, of_group, [], []),
        "}",
    ]


def _head(rows: Rows, across: Across) -> list[str]:
    return [*rows.head(), *across.head(), "  const int64_t together = groups / sets;"]


def _function(rows: Rows, name: str, body: list[str]) -> list[str]:
    """A step of a group."""
    return [
        f"  auto {name} = [&](int64_t group) {{",
        *indented([*rows.group(), *body], 4),
        "  };",
    ]


def _known(rows: Rows, across: Across, only: list[int]) -> list[str]:
    """The coefficients of a group."""
    source = rows.source
    return [
        *source.statistics("group", "groups"),
        *source.stopped(),
        *group_tensors(source, rows.of_group, only),
        *across.loads(),
        *source.coefficients(),
        *[f"const acc {name} = acc({name}_);" for name in source.names()],
    ]


def _driver(first: str, then: list[str], before: str = "") -> list[str]:
    """All sets: each at once, or step by step."""
    start = [f"{before}(set);"] if before else []
    between = [f"{name}(set);" for name in then]
    parallel = "#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)"
    whole = "for (int64_t group = set * together; group < (set + 1) * together; ++group)"
    return [
        "  if (sets >= threads) {",
        parallel,
        "    for (int64_t set = 0; set < sets; ++set) {",
        *indented([*start, f"{whole} {first}(group);", *between, f"{whole} apply(group);"], 6),
        "    }",
        "  } else {",
        *([f"    for (int64_t set = 0; set < sets; ++set) {start[0]}"] if start else []),
        parallel,
        f"    for (int64_t group = 0; group < groups; ++group) {first}(group);",
        *[f"    for (int64_t set = 0; set < sets; ++set) {each}" for each in between],
        parallel,
        "    for (int64_t group = 0; group < groups; ++group) apply(group);",
        "  }",
    ]
