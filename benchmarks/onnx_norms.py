"""ONNX files of hand-written norms: what each tool makes of them, and how fast they are.

    python -m benchmarks.onnx_norms     writes onnx_norms.{json,md} to benchmarks/results
    python -m benchmarks.onnx_norms --only Llama --rounds 11 --output elsewhere

Peers, all run by onnxruntime's CPU provider:

- exporter: the file of `torch.onnx.export(optimize=False)`, onnxruntime's optimiser off;
- onnxruntime: the same file with its optimiser on, as in all that follow;
- onnxscript: `torch.onnx.export` with its default optimiser, onnxscript's rewrite rules;
- onnxsim: the first file through onnxsim, where it is installed;
- bnrewrite: `bnrewrite.export_onnx`;
- native: the same model with PyTorch's own norms, exported as "onnxscript".
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from rich.console import Console
from rich.progress import track

import bnrewrite
from benchmarks.measure import CLOCKS, Clock, interleaved
from benchmarks.onnx_models import Pair, pairs
from benchmarks.tables import RESULTS, Results
from bnrewrite.onnx.translate import quiet

PEERS = ("exporter", "onnxruntime", "onnxscript", "onnxsim", "bnrewrite", "native")
OURS, NATIVE = "bnrewrite", "native"
# operations on numbers, of which norms that are written out consist
POINTWISE = ("Add", "Sub", "Mul", "Div", "Sqrt", "Reciprocal", "Pow")
REDUCTIONS = ("ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2", "ReduceL1", "ReduceMax")
ARITHMETIC = frozenset((*POINTWISE, *REDUCTIONS))
HEADINGS = (
    "model", "norms", "file", "nodes", "loose", "nodes loaded", "size", "median", "/ native",
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """One file of one model.

    Attributes:
        nodes: in the file.
        loose: operations of arithmetic in it that the native twin's file does not have.
        loaded: nodes that onnxruntime runs.
        size: bytes.
        milliseconds: median per call.
        spread: of the samples, quartiles over the median.
        over_native: median of the rounds' ratios to the native twin.
    """

    model: str
    norms: int
    peer: str
    nodes: int
    loose: int
    loaded: int
    size: int
    milliseconds: float
    spread: float
    over_native: float


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Measure what was asked for, print the table, and write the two files."""
    parser = argparse.ArgumentParser(description="ONNX files of hand-written norms")
    parser.add_argument("--only", help="models whose name contains this")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    chosen, console = pairs(options.only), Console()
    if not chosen:
        parser.error(f"{options.only!r} is in none of {[pair.name for pair in pairs()]}")
    torch.set_num_threads(1)
    results = [
        result
        for pair in track(chosen, "measuring", console=console, transient=True)
        for result in measure(pair, options.rounds, CLOCKS[options.clock])
    ]
    table = Results(
        name="onnx_norms",
        headings=HEADINGS,
        rows=[_cells(result) for result in results],
        records=[asdict(result) for result in results],
        remark=f"onnxruntime {onnxruntime.__version__} on its CPU provider with one thread; "
        "medians of interleaved rounds, ratios are medians of the rounds' ratios. Loose: "
        "operations of arithmetic that the native twin's file does not have.",
    )
    table.show()
    table.write(options.output)
    return results


def measure(pair: Pair, rounds: int, clock: Clock) -> list[Result]:
    """All files of a model."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        report, files = exports(pair, folder)
        sessions = {
            peer: session(path, optimise=peer != "exporter") for peer, path in files.items()
        }
        given = {key: pair.arguments[key].numpy() for key in pair.input_names}
        calls = {peer: _call(each, given) for peer, each in sessions.items()}
        timings = interleaved(calls, rounds=rounds, clock=clock)
        native = operations(files[NATIVE])
        return [
            Result(
                model=pair.name,
                norms=report,
                peer=peer,
                nodes=sum(operations(path).values()),
                loose=loose(operations(path), native),
                loaded=loaded(path, optimise=peer != "exporter"),
                size=path.stat().st_size,
                milliseconds=1e3 * timings[peer].median,
                spread=timings[peer].spread,
                over_native=timings[peer].ratio(timings[NATIVE]),
            )
            for peer, path in files.items()
        ]


def exports(pair: Pair, folder: Path) -> tuple[int, dict[str, Path]]:
    """The number of norms that were rewritten, and the files by peer."""
    files = {peer: folder / f"{peer}.onnx" for peer in PEERS if peer != "onnxruntime"}
    files["onnxruntime"] = files["exporter"]
    with quiet():
        for peer, model, optimise in (
            ("exporter", pair.hand, False),
            ("onnxscript", pair.hand, True),
            (NATIVE, pair.native, True),
        ):
            torch.onnx.export(
                model, (), files[peer], kwargs=pair.arguments, dynamo=True, optimize=optimise,
                opset_version=23, verbose=False, external_data=False,
            )  # fmt: skip
    written = bnrewrite.export_onnx(pair.hand, (), files[OURS], kwargs=pair.arguments, target="cpu")
    if not simplified(files["exporter"], files["onnxsim"]):
        del files["onnxsim"]
    return len(written.report.rewritten), {peer: files[peer] for peer in PEERS if peer in files}


def simplified(source: Path, to: Path) -> bool:
    """Whether onnxsim is installed and takes the file."""
    try:
        onnxsim: Any = importlib.import_module("onnxsim")
    except ImportError:
        return False
    model, fine = onnxsim.simplify(onnx.load(source))
    if fine:
        onnx.save(model, to)
    return bool(fine)


def session(path: Path, *, optimise: bool, written: Path | None = None) -> Any:
    """Onnxruntime's session with one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL
    if written is not None:
        options.optimized_model_filepath = str(written)
    return onnxruntime.InferenceSession(
        str(path), sess_options=options, providers=["CPUExecutionProvider"]
    )


def operations(path: Path) -> dict[str, int]:
    """Nodes of a file by operation."""
    found: dict[str, int] = {}
    for node in onnx.load(path, load_external_data=False).graph.node:
        found[node.op_type] = found.get(node.op_type, 0) + 1
    return found


def loose(found: dict[str, int], native: dict[str, int]) -> int:
    """Operations of arithmetic in excess of those of the native twin."""
    return sum(
        max(0, count - native.get(operation, 0))
        for operation, count in found.items()
        if operation in ARITHMETIC
    )


def loaded(path: Path, *, optimise: bool) -> int:
    """How many nodes onnxruntime runs."""
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "loaded.onnx"
        session(path, optimise=optimise, written=written)
        return sum(operations(written).values())


def _call(running: Any, given: dict[str, Any]) -> Callable[[], object]:
    return lambda: running.run(None, given)


def _cells(result: Result) -> list[str]:
    return [
        result.model,
        str(result.norms),
        result.peer,
        str(result.nodes),
        str(result.loose),
        str(result.loaded),
        f"{result.size / 2**20:.2f} MiB",
        f"{result.milliseconds:.3g} ms",
        f"{result.over_native:.2f}",
    ]


if __name__ == "__main__":
    main()
