"""Training for long, with everything in between that a run has: nothing drifts, nothing grows.

    torchrun --nproc-per-node 2 -m benchmarks.soak          writes benchmarks/results/soak.{json,md}
    torchrun --nproc-per-node 2 -m benchmarks.soak --steps 100 --seed 7

Optimised models and their native twins (`benchmarks.twins`) train on the same batches, of sizes
that are drawn, some of them empty. Events are dealt from a shuffled deck: gradients accumulated
under `no_sync`, evaluation, an update of the averaged weights, a checkpoint, and going back to the
last one, or to that of the twin. At each checkpoint parameters, buffers, the optimiser's state and
the average have to be those of the twin.

All is in float64, and the twin is never set right by the optimised model: two float32 runs part
after some hundred steps whatever computes them, because training amplifies rounding. In float64
rounding has no time to grow to half of the digits, which is the bound; another formula, a lost or a
doubled update is some orders of magnitude beyond it.
"""

from __future__ import annotations

import argparse
import gc
import random
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor
from torch._dynamo.utils import counters

import bnrewrite
from benchmarks.tables import RESULTS, Results
from benchmarks.twins import HALF_OF_THE_DIGITS, MODELS, WIDTH, Trainer, difference, twins

DECK = {"step": 12, "no_sync": 3, "eval": 2, "ema": 1, "save": 1, "load": 1}
ROUND = sum(DECK.values())
LEAST, MOST = {"synchronised": 0}, 5  # samples per process; two at least where they are alone
SITES = 3  # of a model: two batch norms and a layer norm
GRAPHS = 3 * 3  # of a model: training, evaluation, its average's; one sample, one size, any size
RESIDENT = 4 * 2**20  # bytes, by which a process may grow: the allocator keeps pages for itself


@dataclass(frozen=True)
class Memory:
    """What a process holds after some steps."""

    steps: int
    tensors: int
    objects: int  # of Python, those of the record apart
    resident: int  # bytes
    graphs: int  # that Dynamo has compiled so far


@dataclass
class Record:
    """What one process saw."""

    steps: int
    seed: int
    processes: int
    events: dict[str, int] = field(default_factory=dict)
    differences: dict[str, dict[str, float]] = field(default_factory=dict)  # by model, by kind
    sites: dict[str, int] = field(default_factory=dict)  # that were rewritten, by model
    memory: list[Memory] = field(default_factory=list)
    seconds: float = 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, print and write what was seen; 1 where something is wrong."""
    parser = argparse.ArgumentParser(description="a long run beside its native twin")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        record = run(options.steps, options.seed)
        every: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(every, faults(record))
        wrong = [f"rank {rank}: {text}" for rank, each in enumerate(every) for text in each]
        if dist.get_rank() == 0:
            table = _table(record)
            table.show()
            table.write(options.output)
            Console().print("\n".join(wrong) or f"written: {options.output}/soak.json, soak.md")
    finally:
        dist.destroy_process_group()
    return 1 if wrong else 0


def run(steps: int, seed: int, models: Sequence[str] = MODELS) -> Record:
    """Train models and their twins; every process of the default group has to call it.

    Args:
        steps: of each model; rounded up to whole decks of events.
        seed: of the events and of the sizes of batches.
        models: of `benchmarks.twins.MODELS`.
    """
    start = time.perf_counter()
    rounds = -(-steps // ROUND)
    record = Record(rounds * ROUND, seed, dist.get_world_size())
    before = counters["stats"]["unique_graphs"]
    with (
        warnings.catch_warnings(),
        torch._dynamo.config.patch(fail_on_recompile_limit_hit=True),
        tempfile.TemporaryDirectory() as own,
    ):
        warnings.simplefilter("error", bnrewrite.BnrewriteWarning)
        folders = [own]
        dist.broadcast_object_list(folders)
        soak = _Soak(record, models, Path(folders[0]))
        for number in range(rounds):
            soak.deal()
            record.memory.append(
                _memory((number + 1) * ROUND, counters["stats"]["unique_graphs"] - before)
            )
        record.sites = soak.sites()
        dist.barrier()
    record.seconds = time.perf_counter() - start
    return record


def faults(record: Record) -> list[str]:
    """What is wrong with a run, in sentences.

    Memory is looked at from the middle of a run on: until then every kind of event has happened,
    with batches of several sizes. A leak in the rarest event leaves a tensor per deck, one in a
    step an object per step: half of that is the limit. What C++ alone holds shows in the process's
    memory: autograd history that is not cut keeps several activations a step, some 10 kB.
    """
    found = [
        f"{model}: {kind} differ by {error:.2g}, more than {HALF_OF_THE_DIGITS:.2g}"
        for model, kinds in record.differences.items()
        for kind, error in kinds.items()
        if not error <= HALF_OF_THE_DIGITS
    ]
    found += [
        f"{model}: {count} norms were rewritten, not {SITES}"
        for model, count in record.sites.items()
        if count != SITES
    ]
    middle, end = record.memory[len(record.memory) // 2], record.memory[-1]
    steps = end.steps - middle.steps
    limits = {"tensors": steps / ROUND / 2, "objects": steps / 2, "resident": RESIDENT}
    for name, limit in limits.items():
        grown = getattr(end, name) - getattr(middle, name)
        if grown > limit:
            found.append(f"{name} grew by {grown} in {steps} steps")
    most = GRAPHS * len(record.sites)
    if end.graphs > most:
        found.append(f"{end.graphs} graphs were compiled, more than {most}")
    return found


class _Soak:
    """Pairs of twins, and what happens to them."""

    def __init__(self, record: Record, models: Sequence[str], folder: Path) -> None:
        self.record, self.source, self.folder = record, random.Random(record.seed), folder
        self.pairs = {name: twins(name) for name in models}
        self.batches = torch.Generator().manual_seed(record.seed)
        self.save()

    def deal(self) -> None:
        """One deck: every kind of event, in an order that is drawn; each with a step."""
        deck = [event for event, count in DECK.items() for _ in range(count)]
        self.source.shuffle(deck)
        for event in deck:
            self.step(2 if event == "no_sync" else 1)
            if event in ("eval", "ema", "save", "load"):
                getattr(self, event)()
            self.record.events[event] = self.record.events.get(event, 0) + 1

    def step(self, batches: int) -> None:
        """A training step of all models."""
        for name, pair in self.pairs.items():
            drawn = [self.batch(LEAST.get(name, 2)) for _ in range(batches)]
            for trainer in pair:
                trainer.train(drawn)

    def batch(self, least: int) -> tuple[Tensor, list[int]]:
        """Samples of all processes, and how many each has; two at least."""
        sizes = [self.source.randint(least, MOST) for _ in range(self.record.processes)]
        sizes[self.source.randrange(len(sizes))] += 2 if sum(sizes) < 2 else 0
        return self.samples(sum(sizes)), sizes

    def samples(self, count: int) -> Tensor:
        shape = (count, 3, WIDTH, WIDTH)
        return torch.randn(shape, generator=self.batches, dtype=torch.double)

    def eval(self) -> None:
        """Outputs in evaluation are those of the twin."""
        for x in map(self.samples, (1, self.source.randint(2, MOST))):
            for name, (own, native) in self.pairs.items():
                found, wanted = own.evaluate(x), native.evaluate(x)
                for kind, value in found.items():
                    self.note(name, kind, {"": value}, {"": wanted[kind]})

    def ema(self) -> None:
        """Take the weights and the statistics into their average."""
        for pair in self.pairs.values():
            for trainer in pair:
                trainer.ema.update_parameters(trainer.model)

    def save(self) -> None:
        """A checkpoint, at which the whole state is compared."""
        for name, pair in self.pairs.items():
            found, wanted = (trainer.state() for trainer in pair)
            for kind, value in found.items():
                self.note(name, kind, value, wanted[kind])
            for number, trainer in enumerate(pair):
                trainer.save(self.path(name, number))

    def load(self) -> None:
        """Back to the last checkpoint: each to its own, or each to its twin's."""
        crossed = self.source.randrange(2)
        for name, pair in self.pairs.items():
            for number, trainer in enumerate(pair):
                trainer.load(self.path(name, number ^ crossed))

    def path(self, name: str, number: int) -> Path:
        return self.folder / f"{name} {number}.pt"

    def note(
        self, name: str, kind: str, found: dict[str, Tensor], wanted: dict[str, Tensor]
    ) -> None:
        """Remember the largest difference of a kind."""
        kinds = self.record.differences.setdefault(name, {})
        kinds[kind] = max(kinds.get(kind, 0.0), difference(found, wanted))

    def sites(self) -> dict[str, int]:
        """How many norms of each model are rewritten."""
        return {name: _sites(own) for name, (own, _) in self.pairs.items()}


def _sites(trainer: Trainer) -> int:
    x = torch.randn(4, 3, WIDTH, WIDTH, dtype=torch.double)
    sites = bnrewrite.explain(trainer.model, x).sites
    return sum(site.status == "rewritten" for site in sites)


def _memory(steps: int, graphs: int) -> Memory:
    gc.collect()
    objects = gc.get_objects()
    tensors = sum(issubclass(type(each), Tensor) for each in objects)
    own = sum(type(each) is Memory for each in objects)
    return Memory(steps, tensors, len(objects) - own, _resident(), graphs)


def _resident() -> int:
    """Bytes in memory now; where the system does not say, the most there ever were."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except OSError:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
    return pages * resource.getpagesize()


def _table(record: Record) -> Results:
    """One row per model and kind, and the process's memory below; of that, a tenth is kept."""
    kept = [*record.memory[:-1:10], record.memory[-1]]
    rows = [
        [model, kind, f"{error:.1e}", f"{HALF_OF_THE_DIGITS:.1e}"]
        for model, kinds in record.differences.items()
        for kind, error in kinds.items()
    ]
    middle, end = record.memory[len(record.memory) // 2], record.memory[-1]
    for name in ("tensors", "objects", "resident", "graphs"):
        before, after = getattr(middle, name), getattr(end, name)
        rows.append([f"{middle.steps} to {end.steps}", name, f"{before} to {after}", ""])
    events = Counter(record.events)
    return Results(
        name="soak",
        headings=("model or steps", "of", "largest difference, or from and to", "bound"),
        rows=rows,
        records=[asdict(replace(record, memory=kept))],
        remark=f"Started by `torchrun --nproc-per-node {record.processes}`; first process of "
        f"{record.processes}; seed {record.seed}; steps of each model, by what followed: "
        + ", ".join(f"{count} {event}" for event, count in sorted(events.items())) + ".",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
