"""The whole check of ONNX on a GPU in one run of some minutes, with a short table last.

    python -m benchmarks.gpu_onnx            every model in float32, float16 and bfloat16
    python -m benchmarks.gpu_onnx --only Llama --rounds 11

Per model and dtype: the file is exported for the CUDA provider, run there against the model in
float64, its norms must stand on the GPU; then it is timed beside the file of the native twin.
Before that the table of kernels and the sessions' tests run on the CUDA provider. Exits with 1
where something is wrong; says so, and exits with 0, where there is no GPU.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import bnrewrite
from benchmarks.measure import interleaved, machine
from benchmarks.onnx_models import Pair, pairs
from bnrewrite.errors import with_its_name
from bnrewrite.onnx import SessionError
from bnrewrite.onnx.translate import quiet

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TESTS = ("tests/test_onnx_kernels.py", "tests/test_onnx_session.py")
BUDGET = 420  # seconds, after which no further model is begun


@dataclass(frozen=True)
class Line:
    """What was found of one model in one dtype; `wrong` is empty where all is well."""

    model: str
    dtype: str
    nodes: str
    error: str
    milliseconds: str
    over_native: str
    wrong: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything; the exit code."""
    parser = argparse.ArgumentParser(description="ONNX on a GPU")
    parser.add_argument("--only", help="models whose name contains this")
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args(arguments)
    console = Console(width=120)
    if not torch.cuda.is_available():
        console.print("torch sees no GPU here: nothing was checked")
        return 0
    chosen = pairs(options.only)
    if not chosen:
        parser.error(f"{options.only!r} is in none of {[pair.name for pair in pairs()]}")
    start = time.monotonic()
    wrong = _tests(console)
    lines: list[Line] = []
    for pair in chosen:
        for dtype in DTYPES:
            if time.monotonic() - start > BUDGET:
                console.print(f"left out for want of time: {pair.name}, {dtype}")
                continue
            lines.append(_line(pair, dtype, options.rounds))
            console.print(lines[-1])
    wrong += [f"{line.model}, {line.dtype}: {line.wrong}" for line in lines if line.wrong]
    console.print(_table(lines))
    console.print(machine("cuda")["device"], f"{time.monotonic() - start:.0f} s")
    for each in wrong:
        console.print(f"WRONG: {each}")
    return 1 if wrong else 0


def _tests(console: Console) -> list[str]:
    """The tests that depend on the provider."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    root = Path(__file__).parents[1]
    outcome = subprocess.run(command, cwd=root, capture_output=True, text=True)
    console.print("\n".join(outcome.stdout.splitlines()[-15:]), markup=False)
    return [] if outcome.returncode == 0 else [f"{' '.join(TESTS)} fail"]


def _line(pair: Pair, dtype: torch.dtype, rounds: int) -> Line:
    name = str(dtype).removeprefix("torch.")
    try:
        return _measured(pair, dtype, name, rounds)
    except Exception as error:  # one model that fails must not hide the others
        return Line(pair.name, name, "", "", "", "", with_its_name(error))


def _measured(pair: Pair, dtype: torch.dtype, name: str, rounds: int) -> Line:
    hand, arguments = _on_gpu(pair.hand, pair.arguments, dtype)
    native, _ = _on_gpu(pair.native, pair.arguments, dtype)
    with tempfile.TemporaryDirectory() as folder:
        files = {
            each: Path(folder) / f"{each}.onnx" for each in ("exporter", "bnrewrite", "native")
        }
        result = bnrewrite.export_onnx(hand, (), files["bnrewrite"], kwargs=arguments)
        with quiet():
            for each, model in (("exporter", hand), ("native", native)):
                torch.onnx.export(
                    model, (), files[each], kwargs=arguments, dynamo=True, opset_version=23,
                    verbose=False,
                )  # fmt: skip
        inputs = {each: arguments[each] for each in pair.input_names}
        calls = {each: _call(path, inputs) for each, path in files.items()}
        running = {each: call for each, call in calls.items() if call is not None}
        timings = interleaved(running, rounds=rounds, device="cuda")
    ours = timings["bnrewrite"]
    ratio = f"{ours.ratio(timings['native']):.2f}" if "native" in timings else "native fails"
    checks = [check for each in result.verifications.values() for check in each]
    told = [note for note in result.notes if note.startswith("checked on")]
    return Line(
        model=pair.name,
        dtype=name,
        nodes="/".join(str(sum(t.values())) for t in result.placement.values()),
        error=f"{max(check.optimized for check in checks):.1e}",
        milliseconds=" ".join(f"{each} {1e3 * t.median:.3f}" for each, t in timings.items()),
        over_native=ratio,
        wrong="; ".join(told) or _wrong_places(files["bnrewrite"].name, calls),
    )


def _wrong_places(name: str, calls: dict[str, Any]) -> str:
    """Outputs must be on the GPU."""
    call = calls["bnrewrite"]
    if call is None:
        return f"{name} does not load on the CUDA provider"
    outputs = call()
    found = outputs if isinstance(outputs, tuple) else (outputs,)
    return "" if all(each.is_cuda for each in found) else "an output is not on the GPU"


def _on_gpu(
    model: nn.Module, arguments: dict[str, Any], dtype: torch.dtype
) -> tuple[nn.Module, dict[str, Any]]:
    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to("cuda", dtype if value.is_floating_point() else value.dtype)

    given: dict[str, Any] = tree_map(moved, arguments)
    return copy.deepcopy(model).to("cuda", dtype).eval(), given


def _call(path: Path, inputs: dict[str, Tensor]) -> Callable[[], Any] | None:
    """A call of a session on the GPU; None where the exporter's file does not load there."""
    try:
        session = bnrewrite.Session(path, "cuda")
    except SessionError:
        return None
    return lambda: session(**inputs)


def _table(lines: Sequence[Line]) -> Table:
    table = Table(
        "model", "dtype", "nodes by provider", "error", "ms per call", "/ native", "wrong"
    )
    for line in lines:
        table.add_row(*(str(each) for each in vars(line).values()))
    return table


if __name__ == "__main__":
    sys.exit(main())
