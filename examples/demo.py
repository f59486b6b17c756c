"""The main job on real input: `make demo`, or `python -m examples.demo`.

Trains the forum's net (hand-written BatchNorm) on scikit-learn's digits three times side by side:
as it was written, optimised, and with torch's own BatchNorm; shows what was found, what it cost and
whether the contract holds. Then the thread's other reading, which cannot be trained as written.
Writes examples/output/demo.json and nothing else.
"""

import argparse
import copy
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import bnrewrite
from benchmarks.measure import Timing, saved_bytes
from examples import digits as images_of_digits
from examples.digits import Digits
from examples.forum_net import BatchNorm, LiteralBatchNorm, NativeBatchNorm, Net
from examples.training import (
    BATCH,
    Steps,
    accuracy,
    autograd_nodes,
    train_alone,
    train_in_turns,
)

OUTPUT = Path(__file__).parent / "output"
HAND, OPTIMISED, NATIVE = "hand-written", "optimised", "native"


@dataclass(frozen=True)
class Outcome:
    """What one of the nets ended with."""

    milliseconds: float  # per step: forward, backward, optimiser
    over_native: float
    first_step: float  # seconds, capture included
    saved: int  # bytes kept for the backward of one batch
    accuracy: float
    running_mean: float  # mean of the absolute values over the channels
    running_var: float  # mean over the channels
    same_buffers: bool  # still the tensor objects that the module was made with
    autograd_nodes: int  # that hang on running_mean


def main(arguments: Sequence[str] | None = None) -> dict[str, object]:
    """Run the demo; returns what it also writes as JSON."""
    parser = argparse.ArgumentParser(description="bnrewrite on the net of the forum thread")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    console, start, digits = Console(), time.perf_counter(), images_of_digits.load()

    console.rule("what bnrewrite finds in the forum's net")
    report = bnrewrite.explain(_net(BatchNorm), digits.train_images[:BATCH])
    print(report)

    console.rule(f"side by side: epochs {options.epochs}, batches of {BATCH} digits as 3x32x32")
    outcomes = _side_by_side(digits, options.epochs)
    console.print(_comparison(outcomes))

    console.rule("the contract: errors against a float64 run of the hand-written net")
    verified = _verify(BatchNorm, digits)

    console.rule("the thread to the letter: normalising with the running statistics just updated")
    literal = _to_the_letter(digits, console)

    record: dict[str, object] = {
        "report": json.loads(report.to_json()),
        "outcomes": {name: asdict(outcome) for name, outcome in outcomes.items()},
        "verified": verified,
        "literal": literal,
        "seconds": time.perf_counter() - start,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "demo.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    console.rule(f"{record['seconds']:.0f} s; the figures are in {path.name}")
    return record


def _net(norm: type[BatchNorm]) -> Net:
    torch.manual_seed(0)
    return Net(norm)


def _native_twin(hand: Net) -> Net:
    native = Net(NativeBatchNorm)
    native.load_state_dict(hand.state_dict(), strict=False)  # all but num_batches_tracked
    return native


def _side_by_side(digits: Digits, epochs: int) -> dict[str, Outcome]:
    hand = _net(BatchNorm)
    nets = {
        HAND: hand,
        OPTIMISED: bnrewrite.optimize(copy.deepcopy(hand), backend="eager"),
        NATIVE: _native_twin(hand),
    }
    buffers = {name: net.bn1.running_mean for name, net in nets.items()}
    steps = train_in_turns(nets, digits, epochs)
    timings = {name: Timing(taken.seconds) for name, taken in steps.items()}
    return {
        name: _outcome(net, digits, steps[name], timings[name], timings[NATIVE], buffers[name])
        for name, net in nets.items()
    }


def _outcome(
    net: Net, digits: Digits, steps: Steps, timing: Timing, native: Timing, buffer: Tensor | None
) -> Outcome:
    running_mean, running_var = net.bn1.running_mean, net.bn1.running_var
    assert running_mean is not None
    assert running_var is not None
    accurate = accuracy(net, digits)
    return Outcome(
        milliseconds=timing.median * 1e3,
        over_native=timing.ratio(native),
        first_step=steps.first,
        accuracy=accurate,
        running_mean=running_mean.abs().mean().item(),
        running_var=running_var.mean().item(),
        same_buffers=running_mean is buffer,
        autograd_nodes=autograd_nodes(running_mean),
        saved=saved_bytes(  # last: it moves the running statistics
            lambda: net(digits.train_images[:BATCH]), net.parameters()
        ),
    )


def _comparison(outcomes: dict[str, Outcome]) -> Table:
    table = Table("", *outcomes, show_lines=False)
    shown = outcomes.values()
    table.add_row("time per step", *(f"{o.milliseconds:.1f} ms" for o in shown))
    table.add_row("relative to native", *(f"{o.over_native:.2f}" for o in shown))
    table.add_row("first step (with capture)", *(f"{o.first_step:.2f} s" for o in shown))
    table.add_row("saved for backward", *(f"{o.saved / 2**20:.1f} MiB" for o in shown))
    table.add_row("accuracy on unseen digits", *(f"{o.accuracy:.1%}" for o in shown))
    table.add_row("mean |running_mean|: 0 before", *(f"{o.running_mean:.6f}" for o in shown))
    table.add_row("mean running_var: 1 before", *(f"{o.running_var:.6f}" for o in shown))
    table.add_row("buffers: the same objects", *("yes" if o.same_buffers else "no" for o in shown))
    table.add_row("autograd nodes on a buffer", *(str(o.autograd_nodes) for o in shown))
    return table


def _verify(norm: type[BatchNorm], digits: Digits) -> bool:
    optimised = bnrewrite.optimize(_net(norm), backend="eager")
    few = digits.train_images[:16]  # it runs five models
    verification = bnrewrite.verify(_net(norm), optimised, few, steps=3)
    print(verification)
    return verification.ok


def _to_the_letter(digits: Digits, console: Console) -> dict[str, object]:
    torch.compiler.reset()  # else the batch is a symbol in the formula: two sizes have been seen
    print(bnrewrite.explain(_net(LiteralBatchNorm), digits.train_images[:BATCH]))
    try:
        train_alone(_net(LiteralBatchNorm), digits, epochs=1)
        failure = None
    except RuntimeError as error:
        failure = str(error).split(". ")[0]
    console.print(f"as it was written, it {'trains' if failure is None else 'raises: ' + failure}")
    net = bnrewrite.optimize(_net(LiteralBatchNorm), backend="eager")
    train_alone(net, digits, epochs=1)
    reached = accuracy(net, digits)
    console.print(f"optimised, it trains: accuracy {reached:.1%} after one epoch")
    return {
        "hand_written_failure": failure,
        "accuracy": reached,
        "verified": _verify(LiteralBatchNorm, digits),
    }


if __name__ == "__main__":
    main()
