"""Speed and memory of the result: hand-written, native and optimised, in one interleaved run.

    python -m benchmarks.norms      every case; writes norms.{json,md,png} to benchmarks/results
    python -m benchmarks.norms --only "layer_norm, 8x512x768" --rounds 11 --output elsewhere

A case is a norm at a size and a memory layout, in training (forward and backward: time per step,
bytes kept for the backward) and in evaluation (forward only).
"""

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import bnrewrite
from benchmarks import plots
from benchmarks.cases import HAND, NATIVE, OPTIMISED, PEERS, Case, cases
from benchmarks.measure import CLOCKS, Clock, interleaved, machine, saved_bytes, training_step
from benchmarks.tables import RESULTS, Results


@dataclass(frozen=True)
class Result:
    """One case: milliseconds per peer, ratios of the optimised one, bytes saved for backward."""

    norm: str
    size: str
    layout: str
    mode: str
    milliseconds: dict[str, float]
    spread: dict[str, float]
    over_native: float
    over_hand_written: float
    saved: dict[str, int] | None  # None in evaluation
    lowerings: dict[str, int]  # how many sites became what


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Measure what was asked for, print the table, and write the three files."""
    parser = argparse.ArgumentParser(description="hand-written, native and optimised norms")
    parser.add_argument("--only", help="cases whose text contains this")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--clock", choices=sorted(CLOCKS), default="wall", help="process: one thread on a busy CPU"
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    chosen, console = cases(options.only), Console()
    if not chosen:
        parser.error(f"{options.only!r} is in none of {[str(case) for case in cases()]}")

    results = [
        measure(case, rounds=options.rounds, device=options.device, clock=CLOCKS[options.clock])
        for case in track(chosen, "measuring", console=console, transient=True)
    ]
    table = Results(
        name="norms",
        headings=HEADINGS,
        rows=[_cells(result) for result in results],
        records=[asdict(result) for result in results],
        remark="Medians of interleaved rounds; ratios are medians of the rounds' ratios. "
        '"16 on" a shape is a stack of sixteen norms in one model.',
        device=options.device,
    )
    table.show()
    table.write(options.output)
    _plot(results, options.output / "norms.png", str(machine(options.device)["device"]))
    console.print(f"written: {options.output}/norms.json, norms.md, norms.png")
    return results


def measure(case: Case, *, rounds: int, device: str, clock: Clock) -> Result:
    """Check that the peers of a case agree, and time them in turns."""
    torch.manual_seed(0)
    x, cotangent = case.tensor(device), case.tensor(device)
    case.check(x)
    peers = case.peers(x)
    with torch.set_grad_enabled(case.training):
        report = bnrewrite.explain(peers[HAND], x.requires_grad_(case.training))
        calls = {
            name: training_step(peer, [x], cotangent) if case.training else _forward(peer, x)
            for name, peer in peers.items()
        }
        timings = interleaved(calls, rounds=rounds, device=device, clock=clock)
    saved = None
    if case.training:
        saved = {
            name: saved_bytes(_forward(peer, x), peer.parameters()) for name, peer in peers.items()
        }
    return Result(
        norm=case.norm.name,
        size=str(case.size),
        layout=case.layout,
        mode=case.mode,
        milliseconds={name: timing.median * 1e3 for name, timing in timings.items()},
        spread={name: timing.spread for name, timing in timings.items()},
        over_native=timings[OPTIMISED].ratio(timings[NATIVE]),
        over_hand_written=timings[OPTIMISED].ratio(timings[HAND]),
        saved=saved,
        lowerings=dict(Counter(site.lowering or "left" for site in report.sites)),
    )


def _forward(peer: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    return lambda: peer(x)


HEADINGS = (
    "norm",
    "size",
    "layout",
    "mode",
    *(f"{peer} ms" for peer in PEERS),
    "optimised / native",
    "optimised / hand-written",
    "MiB saved for backward (" + " / ".join(PEERS) + ")",
    "lowering",
)


def _cells(result: Result) -> list[str]:
    saved = result.saved
    return [
        result.norm,
        result.size,
        result.layout,
        result.mode,
        *(f"{result.milliseconds[peer]:.3g}" for peer in PEERS),
        f"{result.over_native:.2f}",
        f"{result.over_hand_written:.2f}",
        "" if saved is None else " / ".join(f"{saved[peer] / 2**20:.3g}" for peer in PEERS),
        ", ".join(f"{number} {lowering}" for lowering, number in result.lowerings.items()),
    ]


def _plot(results: list[Result], path: Path, device: str) -> None:
    ratios = {
        peer: [each.milliseconds[peer] / each.milliseconds[NATIVE] for each in results]
        for peer in (HAND, OPTIMISED)
    }
    labels = [f"{each.norm}, {each.size}, {each.layout}, {each.mode}" for each in results]
    plots.bars(path, labels, ratios, quantity="time", title=device)


if __name__ == "__main__":
    main()
