"""The rewriter's own time per norm site, on models of 10 to 1,000 sites.

    python -m benchmarks.rewriter                     writes benchmarks/results/rewriter.{json,md}
    python -m benchmarks.rewriter --sites 10 30

CPU time, by three clocks per model: Dynamo's tracing (paid by any torch.compile), torch's second
tracer, which capture calls for functional ATen, and bnrewrite's own time: everything else that
happens between Dynamo's graph and the rewritten one, of which the passes are shown by themselves.
A model of five sites goes first and is not in the table: it pays for imports.
"""

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from torch import fx, nn
from torch._functorch.aot_autograd import aot_export_module

import bnrewrite.passes
from benchmarks import hand_written
from benchmarks.tables import RESULTS, Results
from bnrewrite.capture import backend

SITES = (10, 100, 300, 1000)
CHANNELS, WIDTH = 16, 8

FAMILIES: tuple[Callable[[], nn.Module], ...] = (
    lambda: hand_written.BatchNorm(CHANNELS),
    lambda: hand_written.LayerNorm(WIDTH),
    lambda: hand_written.RMSNorm(WIDTH),
    lambda: hand_written.GroupNorm(4, CHANNELS),
    lambda: hand_written.L2Normalize(1),
)


@dataclass(frozen=True)
class Result:
    """CPU seconds for one model with `sites` hand-written norms."""

    sites: int
    rewritten: int
    nodes: int
    dynamo: float
    tracer: float
    passes: float
    own: float  # passes and all that is around them, without the tracer

    def per_site(self, seconds: float) -> float:
        """Milliseconds per site."""
        return seconds / self.sites * 1e3


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Measure each size, print the table, and write the two files."""
    parser = argparse.ArgumentParser(description="bnrewrite's own time per norm site")
    parser.add_argument("--sites", type=int, nargs="+", default=list(SITES))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    console = Console()

    run_model(len(FAMILIES))  # the first
    results = []
    for sites in options.sites:
        console.print(f"[dim]{sites} sites ...[/]")
        results.append(run_model(sites))
    table = Results(
        name="rewriter",
        headings=HEADINGS,
        rows=[_cells(result) for result in results],
        records=[asdict(result) for result in results],
        remark="One run per size.",
    )
    table.show()
    table.write(options.output)
    console.print(f"written: {options.output}/rewriter.json, rewriter.md")
    return results


class Stopwatch:
    """A function, called through, with the seconds that its one call took and what it returned."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.started, self.seconds = 0.0, 0.0
        self.result: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.started = time.process_time()
        self.result = self.function(*args, **kwargs)
        self.seconds = time.process_time() - self.started
        return self.result


def run_model(sites: int) -> Result:
    """Capture and rewrite a model in which the five families take turns, a tanh between them."""
    torch.compiler.reset()
    gc.collect()
    layers = [FAMILIES[index % len(FAMILIES)]() for index in range(sites)]
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh())))
    tracer = Stopwatch(aot_export_module)
    passes = Stopwatch(bnrewrite.passes.rewrite)
    whole = Stopwatch(backend.bnrewrite)

    nodes: list[int] = []

    def compiler(graph: fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        nodes.append(len(graph.graph.nodes))
        run: Callable[..., Any] = whole(graph, inputs, options={"backend": "eager"})
        return run

    with (
        patch("bnrewrite.capture.canonical.aot_export_module", tracer),
        patch("bnrewrite.passes.rewrite", passes),
    ):
        x = torch.randn(4, CHANNELS, WIDTH, WIDTH)
        start = time.process_time()
        torch.compile(model, backend=compiler, fullgraph=True)(x)
    return Result(
        sites=sites,
        rewritten=sum(site.status == "rewritten" for site in passes.result),
        nodes=nodes[0],
        dynamo=whole.started - start,
        tracer=tracer.seconds,
        passes=passes.seconds,
        own=whole.seconds - tracer.seconds,
    )


HEADINGS = (
    "sites",
    "rewritten",
    "graph nodes",
    "passes, ms per site",
    "own time, ms per site",
    "torch's tracer, ms per site",
    "Dynamo, ms per site",
    "own time, s",
)


def _cells(result: Result) -> list[str]:
    return [
        str(result.sites),
        str(result.rewritten),
        str(result.nodes),
        f"{result.per_site(result.passes):.2f}",
        f"{result.per_site(result.own):.2f}",
        f"{result.per_site(result.tracer):.1f}",
        f"{result.per_site(result.dynamo):.1f}",
        f"{result.own:.2f}",
    ]


if __name__ == "__main__":
    main()
