"""How long a formula that is new takes to become a kernel: compiled, and found in the cache.

    python -m benchmarks.kernel_builds    writes kernel_builds.{json,md} to benchmarks/results

The first call of each formula, forward kernel and backward kernel, less the second; in a process of
its own whose cache is empty, and in one that finds what that one has left. What a process does once
whatever the formula is, is done before.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.tables import RESULTS, Results
from bnrewrite.kernels.generated.call import norm_with_updates
from bnrewrite.kernels.generated.program import parse

FIRST = "x[a b] over b; centre = M; scale = (V + 1.0e-5)**(-1/2); gelu"
AFFINE = "centre = M; scale = t0*(V + 1.0e-5)**(-1/2); shift = t1"
FORMULAS = {
    "batch norm, ReLU": f"x[n c h w] over n h w; t0[c]; t1[c]; {AFFINE}; relu",
    "batch norm, residual, ReLU": f"x[n c h w] over n h w; t0[c]; t1[c]; {AFFINE}; relu; residual",
    "batch norm by stored statistics": (
        "x[n c h w] over n h w; t0[c]; t1[c]; t2[c] fixed; t3[c] fixed; "
        "centre = 0.1*M + 0.9*t2; scale = t0*(0.9*t3 + 0.1*V*N/(N-1) + 1.0e-5)**(-1/2); "
        "shift = t1; u0 = 0.1*M + 0.9*t2; u1 = 0.9*t3 + 0.1*V*N/(N-1)"
    ),
    "group norm, SiLU": f"x[n (g=4 c) h w] over c h w; t0[g c]; t1[g c]; {AFFINE}; silu",
    "layer norm": f"x[n c h w] over w; t0[w]; t1[w]; {AFFINE}",
    "layer norm, GELU": f"x[n c h w] over w; t0[w]; t1[w]; {AFFINE}; gelu",
    "RMS norm": "x[n c h w] over w about zero; t0[w]; scale = t0*(V + 1.0e-6)**(-1/2)",
    "L2": "x[n c h w] over c about zero; scale = 1/Larger(Root(N*V), 1.0e-12)",
}


@dataclass(frozen=True)
class Result:
    """Milliseconds until a formula has run for the first time."""

    formula: str
    compiled: float
    cached: float


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Measure, print the table, and write it."""
    parser = argparse.ArgumentParser(description="time from a formula to its kernel")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as cache:
        compiled, cached = (_in_a_process(cache) for _ in range(2))
    results = [Result(name, compiled[name], cached[name]) for name in FORMULAS]
    table = Results(
        name="kernel_builds",
        headings=("formula", "compiled ms", "found in the cache ms"),
        rows=[[r.formula, f"{r.compiled:.0f}", f"{r.cached:.1f}"] for r in results],
        records=[asdict(result) for result in results],
        remark="The first forward and backward of a formula less the second.",
    )
    table.show()
    table.write(options.output)
    return results


def _in_a_process(cache: str) -> dict[str, float]:
    environment = {**os.environ, "BNREWRITE_CACHE": cache}
    program = "from benchmarks.kernel_builds import first_calls; first_calls()"
    outcome = subprocess.run(
        [sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True
    )
    found: dict[str, float] = json.loads(outcome.stdout)
    return found


def first_calls() -> None:
    """Print the milliseconds of each formula's first call as JSON."""
    _milliseconds(FIRST, torch.randn(64, 80))
    x = torch.randn(4, 32, 16, 64)
    print(json.dumps({name: _milliseconds(text, x) for name, text in FORMULAS.items()}))


def _milliseconds(text: str, x: Tensor) -> float:
    program = parse(text)
    parse.cache_clear()
    sizes = program.axis_sizes(x.shape)
    given = [torch.rand([sizes[axis] for axis in axes]) for axes in program.tensors]
    given += [torch.randn_like(x)] * program.residual
    x = x.requires_grad_()
    times = []
    for _ in range(2):
        start = time.perf_counter()
        y, *_ = norm_with_updates(text, x, *given)
        torch.autograd.grad(y, x, y.detach())
        times.append(time.perf_counter() - start)
    return (times[0] - times[1]) * 1e3


if __name__ == "__main__":
    main()
