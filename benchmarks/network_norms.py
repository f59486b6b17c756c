"""A training step of hand-written norms at the sizes of known networks, beside what limits it.

    python -m benchmarks.network_norms            writes network_norms.{json,md,png}, a roofline
    python -m benchmarks.network_norms --compile  with torch.compile of both: compiled_norms.*
    python -m benchmarks.network_norms --only "batch_norm + relu, 32x64x56x56" --output elsewhere

Peers take turns in every round: the user's code, the native module (for a formula that no operator
has, batch norm and ReLU), the optimised model, torch.compile of the first two, and copies of as
many bytes as the step must move, as many of them into new tensors as it has results: the limit.
"""

import argparse
import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import bnrewrite
from benchmarks import plots
from benchmarks.cases import HAND, NATIVE, OPTIMISED
from benchmarks.measure import (
    CLOCKS,
    Clock,
    interleaved,
    machine,
    origin,
    saved_bytes,
    training_step,
)
from benchmarks.network_cases import COMPILED, DTYPES, Case, cases, under_compile
from benchmarks.tables import RESULTS, Results

LIMIT = "copies"
PEERS = (HAND, NATIVE, *COMPILED.values(), OPTIMISED, LIMIT)


@dataclass(frozen=True)
class Result:
    """One case: milliseconds of a step per peer, ratios of the optimised one, bytes kept."""

    norm: str
    shape: str
    layout: str
    dtype: str
    equal: bool
    megabytes: float  # that a step must move
    milliseconds: dict[str, float]
    spread: dict[str, float]
    over: dict[str, float]
    saved: dict[str, int]
    lowerings: dict[str, int]


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Measure what was asked for, print the table, and write the files."""
    parser = argparse.ArgumentParser(description="norms at the sizes of known networks, on a CPU")
    parser.add_argument("--only", help="cases whose text contains this")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--compile", action="store_true", help="torch.compile as further peers")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    chosen, console = cases(options.only, [options.dtype]), Console()
    if not chosen:
        parser.error(f"{options.only!r} is in none of {[str(case) for case in cases()]}")
    clock = CLOCKS[options.clock]
    results = [
        measure(case, options.rounds, clock, compiled=options.compile)
        for case in track(chosen, "measuring", console=console, transient=True)
    ]
    table = tabulated(results)
    table.show()
    table.write(options.output)
    _plot(results, options.output)
    for text in summary(results):
        console.print(text, soft_wrap=True)
    return results


def measure(case: Case, rounds: int, clock: Clock, *, compiled: bool = False) -> Result:
    """Check the optimised model of a case against float64, and time its peers.

    Raises:
        AssertionError: the optimised model computes something else than the user's.
    """
    torch.compiler.reset()
    models = case.models("cpu")
    *inputs, cotangent = case.tensors("cpu")
    for x in inputs:
        x.requires_grad_()
    peers = {**models, OPTIMISED: bnrewrite.optimize(copy.deepcopy(models[HAND]), backend="eager")}
    few = [x.detach()[:2].clone(memory_format=torch.preserve_format) for x in inputs]
    found = bnrewrite.verify(models[HAND], copy.deepcopy(peers[OPTIMISED]), *few, steps=2)
    assert found.ok, f"{case}: {found}"
    report = bnrewrite.explain(models[HAND], *inputs)
    torch.compiler.reset()  # else the size that was checked makes the next one dynamic
    if compiled:
        peers |= {told: under_compile(models[name]) for name, told in COMPILED.items()}
    calls: dict[str, Callable[[], object]] = {
        name: training_step(model, inputs, cotangent) for name, model in peers.items()
    }
    calls[LIMIT] = copies(inputs[0].detach(), case.norm.passes, case.norm.results)
    timings = interleaved(calls, rounds=rounds, clock=clock)
    return Result(
        norm=case.norm.name,
        shape="x".join(map(str, case.shape)),
        layout=case.layout,
        dtype=case.dtype,
        equal=case.norm.equal,
        megabytes=case.norm.passes * cotangent.nbytes / 1e6,
        milliseconds={name: timing.median * 1e3 for name, timing in timings.items()},
        spread={name: timing.spread for name, timing in timings.items()},
        over={
            name: timings[OPTIMISED].ratio(each)
            for name, each in timings.items()
            if name != OPTIMISED
        },
        saved={
            name: saved_bytes(_forward(peers[name], inputs), peers[name].parameters())
            for name in (HAND, NATIVE, OPTIMISED)
        },
        lowerings=dict(Counter(site.lowering or "left" for site in report.sites)),
    )


def copies(x: Tensor, passes: int, results: int) -> Callable[[], list[Tensor]]:
    """A call that reads or writes x so many times, some of the writes into new tensors."""
    flat = x.permute(sorted(range(x.dim()), key=x.stride, reverse=True)).reshape(-1)
    assert flat.data_ptr() == x.data_ptr()
    target, rest = torch.empty_like(flat), passes / 2 - results  # a copy is two passes
    whole, part = int(rest), int(flat.numel() * (rest % 1))

    def call() -> list[Tensor]:
        made = [flat.clone() for _ in range(results)]
        for _ in range(whole):
            target.copy_(flat)
        target[:part].copy_(flat[:part])
        return made

    return call


def _forward(model: nn.Module, inputs: Sequence[Tensor]) -> Callable[[], Tensor]:
    return lambda: model(*inputs)


def tabulated(results: Sequence[Result]) -> Results:
    """The table, and what its files say."""
    peers = [peer for peer in PEERS if any(peer in each.milliseconds for each in results)]
    others = [peer for peer in peers if peer != OPTIMISED]
    return Results(
        name=_name(results),
        headings=(
            "norm", "shape", "layout", "dtype", *(f"{peer} ms" for peer in peers),
            *(f"optimised / {peer}" for peer in others),
            f"MiB saved for backward ({HAND} / {NATIVE} / {OPTIMISED})", "lowering",
        ),
        rows=[_cells(result, peers, others) for result in results],
        records=[asdict(result) for result in results],
        remark="Forward and backward in training; medians of interleaved rounds, ratios are "
        "medians of the rounds' ratios. Copies move as many bytes as the step must.",
    )  # fmt: skip


def _name(results: Sequence[Result]) -> str:
    return "compiled_norms" if COMPILED[HAND] in results[0].milliseconds else "network_norms"


def _cells(result: Result, peers: Sequence[str], others: Sequence[str]) -> list[str]:
    return [
        result.norm, result.shape, result.layout, result.dtype,
        *(f"{result.milliseconds[peer]:.3g}" for peer in peers),
        *(f"{result.over[peer]:.2f}" for peer in others),
        " / ".join(f"{bytes_ / 2**20:.3g}" for bytes_ in result.saved.values()),
        ", ".join(f"{number} {lowering}" for lowering, number in result.lowerings.items()),
    ]  # fmt: skip


def summary(results: Sequence[Result]) -> list[str]:
    """A line per norm: the median and the worst ratio to each peer."""
    lines = []
    for norm in dict.fromkeys(each.norm for each in results):
        found = [each.over for each in results if each.norm == norm]
        parts = [
            f"{peer} {median(over[peer] for over in found):.2f}, "
            f"at most {max(over[peer] for over in found):.2f}"
            for peer in found[0]
        ]
        lines.append(f"{norm}: optimised over " + "; ".join(parts))
    return lines


def _plot(results: Sequence[Result], folder: Path) -> None:
    device = origin(machine())
    plots.bars(
        folder / f"{_name(results)}.png",
        [f"{each.norm}, {each.shape}, {each.layout}" for each in results],
        {
            peer: [each.milliseconds[peer] / each.milliseconds[NATIVE] for each in results]
            for peer in (HAND, COMPILED[HAND], OPTIMISED)
            if peer in results[0].milliseconds
        },
        quantity="time of a training step",
        title=device,
    )
    with plots.plot(folder / f"{_name(results)}_roofline.png", (8, 5), device) as axes:
        for peer, marker in ((HAND, "x"), (NATIVE, "^"), (OPTIMISED, "o"), (LIMIT, "_")):
            found = [each for each in results if each.equal or peer != NATIVE]
            speeds = [each.megabytes / each.milliseconds[peer] for each in found]  # MB/ms = GB/s
            axes.scatter([each.megabytes for each in found], speeds, marker=marker, label=peer)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("MB that a training step must move")
        axes.set_ylabel("GB/s, of these bytes (more is faster)")


if __name__ == "__main__":
    main()
