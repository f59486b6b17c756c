"""The kernels for GPUs in one run of some minutes: built, checked and timed, with a table last.

    python -m benchmarks.gpu_norms                      everything; writes gpu_norms.{json,md}
    python -m benchmarks.gpu_norms --only group_norm    some of the cases

Per case, that is a norm at a size, a layout and a dtype: the model with the generated kernels is
checked against the user's code in float64, over several steps, and in a CUDA graph. Then a forward
and backward of it is timed beside those of the user's code, of the native module, of torch.compile
of both, of Liger where it is installed, of a CUDA graph of ours and of the native one, and beside a
copy of the tensor. Peers take turns in every round, in random order, each behind a write of 256 MiB
that empties the cache; times are those between two CUDA events. Before all that, the operators are
checked by ``torch.library.opcheck`` and inside ``torch.compile``. Exits with 1 where something is
wrong; says so, and exits with 0, where there is no GPU.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import random
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import bnrewrite
from benchmarks.cases import HAND, NATIVE
from benchmarks.measure import Timing, training_step
from benchmarks.network_cases import COMPILED, Case, cases
from benchmarks.tables import RESULTS, Results
from bnrewrite.errors import first_line, with_its_name

OURS, COPY = "generated", "copy"
GRAPHS = {OURS: "generated, graph", NATIVE: "native, graph"}
PEERS = (HAND, NATIVE, *COMPILED.values(), "liger", OURS, *GRAPHS.values(), COPY)
BUDGET = 400  # seconds, after which no further case is begun
FLUSH = 2**28  # bytes
LAYER = "x[a b] over b; t0[b]; t1[b]; centre = M; scale = t0*(V + 1.0e-5)**(-1/2); shift = t1"
BATCH = (
    "x[n c h] over n h; t0[c]; t1[c] fixed; centre = M; scale = t0*(V + 1.0e-5)**(-1/2); "
    "u0 = 0.9*t1 + 0.1*V; relu; residual"
)
RESPONSE = (
    "x[n c h] over h about zero; t0[c]; t1[c]; m0[n] = Root(N*V); "
    "scale = t0*Root(N*V)/(m0 + 1.0e-6) + 1; shift = t1; relu"
)

Step = Callable[[], Any]


@dataclass(frozen=True)
class Result:
    """One case: milliseconds per peer, and what is wrong with it."""

    norm: str
    shape: str
    layout: str
    dtype: str
    milliseconds: dict[str, float]
    spread: dict[str, float]
    over_native: float
    over_limit: float
    lowering: str
    wrong: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything; the exit code."""
    parser = argparse.ArgumentParser(description="norms on a GPU")
    parser.add_argument("--only", help="cases whose text contains this")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    chosen, console = cases(options.only), Console(width=160)
    if not chosen:
        parser.error(f"{options.only!r} is in none of {[str(case) for case in cases()]}")
    if not torch.cuda.is_available():
        console.print("torch sees no GPU here: nothing was measured")
        return 0
    start = time.monotonic()
    wrong = [f"operators: {sentence}" for sentence in operators_are_wrong()]
    results: list[Result] = []
    for case in chosen:
        if time.monotonic() - start > options.budget:
            console.print(f"left out for want of time: {case}")
            continue
        results.append(measured(case, options.rounds))
        console.print(f"{time.monotonic() - start:4.0f} s  {case}  {results[-1].milliseconds}")
    wrong += [f"{r.norm}, {r.shape}, {r.layout}, {r.dtype}: {r.wrong}" for r in results if r.wrong]
    table = tabulated(results)
    if results and options.only is None:
        table.write(options.output)
    table.show()
    for each in wrong:
        console.print(f"WRONG: {each}", markup=False)
    return 1 if wrong else 0


def tabulated(results: Sequence[Result], device: str = "cuda") -> Results:
    """The table, and what its files say of the machine."""
    versions = f"triton {_version('triton')}, CUDA {torch.version.cuda}"
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return Results(
        name="gpu_norms",
        headings=(
            "norm", "shape", "layout", "dtype", *(f"{peer} ms" for peer in PEERS),
            "generated / native", "generated, graph / limit", "lowering",
        ),
        rows=[_cells(result) for result in results],
        records=[asdict(result) | {"date": today, "versions": versions} for result in results],
        remark=f"{today}, {versions}. Forward and backward in training; medians of interleaved "
        "rounds, between CUDA events, behind a write that empties the cache. The limit is the time "
        "of copies of as many bytes as the norm has to move.",
        device=device,
    )  # fmt: skip


def _cells(result: Result) -> list[str]:
    times = result.milliseconds
    return [
        result.norm, result.shape, result.layout, result.dtype,
        *(f"{times[peer]:.3f}" if peer in times else "" for peer in PEERS),
        f"{result.over_native:.2f}", f"{result.over_limit:.2f}", result.lowering,
    ]  # fmt: skip


def _version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def operators_are_wrong() -> list[str]:
    """What ``opcheck`` and a compiled call find; empty where all is well."""
    from bnrewrite.kernels.triton import operators  # its operators are registered by the import

    assert operators
    op: Any = torch.ops.bnrewrite.norm_forward
    told = []

    def draw(*shape: int) -> Tensor:  # float64 tells a formula from a rounding
        return torch.randn(shape, device="cuda", dtype=torch.float64, requires_grad=True)

    layer = (LAYER, draw(64, 384), [draw(384), draw(384)])
    batch = (BATCH, draw(16, 24, 50), [draw(24), draw(24).detach().abs(), draw(16, 24, 50)])
    response = (RESPONSE, draw(16, 24, 50), [draw(24), draw(24)])
    for arguments in (layer, batch, response):
        found = torch.library.opcheck(op.default, arguments, raise_exception=False)
        told += [f"{name}: {outcome}" for name, outcome in found.items() if outcome != "SUCCESS"]
    for text, x, tensors in (layer, response):

        def call(x: Tensor, weight: Tensor, bias: Tensor, *, text: str = text) -> Tensor:
            made: Tensor = op(text, x.sin(), [weight, bias])[0]
            return made.cos()

        given = (x, *tensors)
        values = []
        for each in (call, torch.compile(call, fullgraph=True)):
            y = each(*given)
            values.append([y, *torch.autograd.grad(y, given, torch.ones_like(y))])
        try:
            for mine, eager in zip(*reversed(values), strict=True):
                torch.testing.assert_close(mine, eager)
        except AssertionError as error:
            told.append(f"inside torch.compile: {first_line(error)}")
    return told


def measured(case: Case, rounds: int) -> Result:
    """Check a case, and time its peers."""
    torch.compiler.reset()
    models = case.models("cuda")
    *inputs, cotangent = case.tensors("cuda")
    for x in inputs:
        x.requires_grad_()
    ours = bnrewrite.optimize(copy.deepcopy(models[HAND]), backend="eager", kernels="generated")
    wrong, lowering = _wrong(models[HAND], ours, inputs)
    candidates: dict[str, nn.Module] = {**models, OURS: ours}
    for name, told in COMPILED.items():
        candidates[told] = torch.compile(copy.deepcopy(models[name]), dynamic=False)  # type: ignore[assignment]
    liger = case.liger(models[NATIVE])
    if liger is not None:
        candidates["liger"] = liger
    steps: dict[str, Step] = {
        name: training_step(model, inputs, cotangent) for name, model in candidates.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # compilers tell how they might be made faster
        failing = []
        for name, step in steps.items():
            try:
                for _ in range(3):
                    step()
            except Exception as error:  # one peer that fails must not hide the others
                failing.append(name)
                wrong.append(f"{name} fails: {with_its_name(error, 120)}")
    steps = {name: step for name, step in steps.items() if name not in failing}
    for name, told in GRAPHS.items():
        if name in steps:
            steps[told], is_same = _graph(steps[name], inputs, candidates[name])
            if name == OURS and not is_same:
                wrong.append("a CUDA graph gives other values than a call")
    target = torch.empty_like(inputs[0])
    steps[COPY] = lambda: target.copy_(inputs[0].detach())
    timings = timed(steps, rounds)
    limit = timings[COPY].median * case.norm.passes / 2  # a copy is two passes
    nothing = float("nan")
    return Result(
        norm=case.norm.name,
        shape="x".join(map(str, case.shape)),
        layout=case.layout,
        dtype=case.dtype,
        milliseconds={name: round(timing.median * 1e3, 4) for name, timing in timings.items()},
        spread={name: round(timing.spread, 3) for name, timing in timings.items()},
        over_native=timings[OURS].ratio(timings[NATIVE]) if OURS in timings else nothing,
        over_limit=timings[GRAPHS[OURS]].median / limit if GRAPHS[OURS] in timings else nothing,
        lowering=lowering,
        wrong="; ".join(wrong),
    )


def _wrong(hand: nn.Module, ours: nn.Module, inputs: Sequence[Tensor]) -> tuple[list[str], str]:
    """What is not as the user's code in float64 has it, and the lowerings of the sites."""
    report = bnrewrite.explain(ours, *inputs)
    lowering = ", ".join(site.lowering or "left" for site in report.sites)
    found = bnrewrite.verify(hand, ours, *inputs, steps=2)
    wrong = [] if found.ok else ["values: " + " ".join(str(found).split())[:300]]
    if lowering != "generated":
        wrong.append(f"the lowerings are {lowering!r}")
    return wrong, lowering


def _graph(step: Step, inputs: Sequence[Tensor], model: nn.Module) -> tuple[Step, bool]:
    """A step as a CUDA graph, and whether it makes of other inputs what a call makes of them."""
    make: Any = torch.cuda.Stream
    side = make()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made: Any = step()
    with torch.no_grad():
        for x in inputs:
            x.mul_(0.5).add_(0.25)
        before = [buffer.clone() for buffer in model.buffers()]
        graph.replay()
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.copy_(value)
    expected: Any = step()
    return graph.replay, all(map(torch.equal, made, expected))


def timed(steps: dict[str, Step], rounds: int) -> dict[str, Timing]:
    """Seconds of each step in each round, between two CUDA events."""
    flush = torch.empty(FLUSH, dtype=torch.uint8, device="cuda")
    order, shuffle = list(steps), random.Random(0).shuffle
    event: Any = torch.cuda.Event
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        shuffle(order)
        events = {}
        for name in order:
            flush.zero_()
            pair = [event(enable_timing=True) for _ in range(2)]
            pair[0].record()
            steps[name]()
            pair[1].record()
            events[name] = pair
        torch.cuda.synchronize()
        for name, (begin, end) in events.items():
            samples[name].append(begin.elapsed_time(end) / 1e3)
    return {name: Timing(tuple(seconds)) for name, seconds in samples.items()}


if __name__ == "__main__":
    sys.exit(main())
