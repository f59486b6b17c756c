"""Fills the table by which lowerings are chosen: what each costs, by device, layout, dtype, size.

    python -m benchmarks.costs                   the table of CPUs, on one thread, in some minutes
    python -m benchmarks.costs --stage inductor  that of CPUs where Inductor runs the graph
    python -m benchmarks.costs --device cuda     that of GPUs
    python -m benchmarks.costs --only "layer_norm, rows"            some cells; nothing is written
    python -m benchmarks.costs --only "layer_norm, rows" --update   they replace those of the table

Writes ``passes/costs_<device>.json``, which is a part of the package, and its table for people,
``benchmarks/results/costs_<device>.md``; with ``--stage inductor``, ``costs_<device>_inductor``. A
cell is one hand-written norm in every lowering that it has in the stage: captured by Dynamo once,
compiled by this package's backend for each, and called without Dynamo's guards, which a model pays
once and not for each of its norms. Inductor has cells of norms behind a sum too: it makes the sum
where it takes the moments, unless a kernel does. The lowerings take turns
(docs/decisions/0008-measuring.md), and their lower quartiles count: what disturbs a call only ever
adds to it, and a wrong cell is a wrong choice. In training the time is that of forward and
backward.
"""

import argparse
import datetime
import gc
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, fx, nn

from benchmarks.cost_cases import EXPONENTS, Case, cases
from benchmarks.measure import CLOCKS, Clock, interleaved, machine, origin
from benchmarks.tables import RESULTS, markdown
from bnrewrite.capture.backend import Compiler
from bnrewrite.capture.look import Look
from bnrewrite.kernels import why_no_kernels, why_no_triton
from bnrewrite.options import Options
from bnrewrite.passes.cost_table import LOWERINGS, ORDER, Table, fastest, name_of_file, read_table

PACKAGE = Path(__file__).parents[1] / "passes"

Times = dict[str, float]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write what was measured; the exit code."""
    parser = argparse.ArgumentParser(description="the costs of lowerings")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--stage", choices=sorted(ORDER), default="eager")
    parser.add_argument("--only", help="cells whose text contains this")
    parser.add_argument("--update", action="store_true", help="write these into the table")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--clock", choices=sorted(CLOCKS), help="process: of a CPU with one thread, the default"
    )
    parser.add_argument("--table", type=Path, default=PACKAGE, help="folder of the JSON")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the Markdown")
    options = parser.parse_args(arguments)
    device, stage, console = str(options.device), str(options.stage), Console(width=160)
    if (device, stage) not in EXPONENTS:
        parser.error(f"there are no cells of {device}, {stage}")
    chosen = list(cases(device, stage, options.only))
    alone = device == "cpu" and options.threads == 1
    clock = options.clock or ("process" if alone else "wall")
    if not chosen:
        parser.error(f"{options.only!r} is in none of {[*map(str, cases(device, stage))]}")
    if clock == "process" and not alone:
        parser.error("the process's clock counts the time of all threads, and none of a GPU's")
    if device == "cuda" and not torch.cuda.is_available():
        console.print("torch sees no GPU here: nothing was measured")
        return 0
    why_not = why_no_triton() if device == "cuda" else why_no_kernels()
    if why_not is not None:
        console.print(f"there are no kernels to measure: {why_not}")
        return 1
    start, threads = time.monotonic(), torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        found = measure_all(chosen, options.rounds, (device, stage), CLOCKS[clock], console)
        where = machine(device)
    finally:
        torch.set_num_threads(threads)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    about = where | {"clock": clock, "rounds": options.rounds, "date": today}
    table = tabulated(found)
    path = options.table / name_of_file(device, stage)
    if options.update:
        text = path.read_text(encoding="utf-8")
        before = read_table(text)
        if before.sizes != table.sizes:
            parser.error(f"{path.name} has cells of {before.sizes} elements, not {table.sizes}")
        table = Table(table.sizes, {**before.microseconds, **table.microseconds})
        about = json.loads(text)["measured"] | {"updated": f"{options.only}, {today}"}
    text = people(table, about, stage)
    console.print(text, markup=False)
    if options.only is None or options.update:
        options.output.mkdir(parents=True, exist_ok=True)
        path.write_text(as_json(table, about), encoding="utf-8")
        (options.output / path.name).with_suffix(".md").write_text(text, encoding="utf-8")
    console.print(f"{len(found)} cells in {time.monotonic() - start:.0f} s")
    return 0


def measure_all(
    chosen: Sequence[Case], rounds: int, where: tuple[str, str], clock: Clock, console: Console
) -> dict[Case, Times]:
    """The times of all cells on a device in a stage, once everything is built."""
    if "cpu" in where:
        from bnrewrite.kernels.generated import runtime

        runtime.build()
    found = {}
    for case in track(chosen, "measuring", console=console, transient=True):
        found[case] = measure(case, rounds, where, clock)
        if case.exponent == EXPONENTS[where][-1]:
            gc.collect()  # what Dynamo keeps in cycles holds the largest tensors
    return found


def measure(case: Case, rounds: int, where: tuple[str, str], clock: Clock) -> Times:
    """Microseconds of each lowering that a cell's norm has."""
    torch.manual_seed(0)
    device, stage = where
    given, model = case.tensors(device), case.model(device)
    with torch.set_grad_enabled(case.training):
        given = [x.requires_grad_(case.training) for x in given]
        steps = lowered(model, given, case.tensors(device), stage)
        timings = interleaved(steps, rounds=rounds, device=device, clock=clock)
    quartiles = {name: quantiles(timing.samples, n=4)[0] for name, timing in timings.items()}
    return {name: float(f"{seconds * 1e6:.3g}") for name, seconds in quartiles.items()}


def lowered(
    model: nn.Module, inputs: Sequence[Tensor], cotangents: Sequence[Tensor], stage: str
) -> dict[str, Callable[[], Any]]:
    """A step of the model in each lowering that it has: forward, with gradients also backward."""
    runs: dict[str, Callable[..., Any]] = {}
    given: list[Any] = []

    def backend(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        for lowering in ORDER[stage]:
            looks: list[Look] = []
            compiler = Compiler(stage, Options(kernels=lowering), observe=looks.append)
            run = compiler(graph, inputs)
            if [site.lowering for site in looks[0].sites] == [lowering]:
                runs[lowering] = run

        def keep(*taken: Any) -> Any:
            given[:] = taken
            return graph(*taken)

        return keep

    torch.compiler.reset()  # else the second shape of a norm turns its graph dynamic
    expected = torch.compile(model, backend=backend)(*inputs)
    expected = expected if isinstance(expected, tuple) else (expected,)
    wanted = [each for each in given if isinstance(each, Tensor) and each.requires_grad]

    def step(run: Callable[..., Any]) -> Callable[[], Any]:
        made = run(*given)
        places = [i for i, each in enumerate(made) if each.shape == inputs[0].shape]
        if inputs[0].dtype == torch.float64:  # tells a formula from a rounding
            torch.testing.assert_close(tuple(made[i] for i in places), expected)
        if not torch.is_grad_enabled():
            return lambda: run(*given)

        def training() -> Any:
            found = run(*given)
            return torch.autograd.grad([found[i] for i in places], wanted, cotangents)

        return training

    return {lowering: step(run) for lowering, run in runs.items()}


def tabulated(found: Mapping[Case, Times]) -> Table:
    """The cells as a table."""
    entries: dict[str, dict[str, tuple[float, ...]]] = {}
    for case, times in found.items():
        entry = entries.setdefault(case.work.key, {})
        for lowering in LOWERINGS:
            if lowering in times:
                entry[lowering] = (*entry.get(lowering, ()), times[lowering])
    sizes = tuple(sorted({2**case.exponent for case in found}))
    for key, entry in entries.items():
        if any(len(times) != len(sizes) for times in entry.values()):
            raise RuntimeError(f"{key}: a lowering was written for some of the sizes {sizes} only")
    return Table(sizes, entries)


def as_json(table: Table, about: Mapping[str, Any]) -> str:
    """The text of a table's file, one line for each entry."""
    lines = [
        f"  {json.dumps(key)}: {json.dumps(entry)}" for key, entry in table.microseconds.items()
    ]
    return (
        f'{{\n "measured": {json.dumps(dict(about))},\n "sizes": {json.dumps(table.sizes)},\n'
        ' "microseconds": {\n' + ",\n".join(lines) + "\n }\n}\n"
    )


def people(table: Table, about: Mapping[str, Any], stage: str) -> str:
    """The table in Markdown: the fastest in bold, where two are as fast the one that is taken."""
    rows = []
    for key, entry in table.microseconds.items():
        cells = []
        for place in range(len(table.sizes)):
            times = {lowering: each[place] for lowering, each in entry.items()}
            taken = fastest(times, ORDER[stage], stage)
            cells.append(
                " / ".join(
                    f"**{times[each]:g}**" if each == taken else f"{times.get(each, '-')}"
                    for each in ORDER[stage]
                )
            )
        rows.append([key, *cells])
    again = f"; again: {about['updated']}" if "updated" in about else ""
    return (
        f"Measured with `{about['command']}` on {origin(about)}, {about['date']}{again}. "
        f"Microseconds of a norm by the number of its elements: {' / '.join(ORDER[stage])}. "
        "In bold what is taken, if it may be.\n\n"
        + markdown(["norm, layout, dtype, mode", *(f"{size:,}" for size in table.sizes)], rows)
        + "\n"
    )


if __name__ == "__main__":
    raise SystemExit(main())
