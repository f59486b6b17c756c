"""What each command does; each returns whether the answer is yes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

import bnrewrite
from bnrewrite.capture.explain import explain
from bnrewrite.measuring import Timing, interleaved, saved_bytes
from bnrewrite.report.verdict import Verification
from bnrewrite.subject import Failure, Subject, subject, tensors
from bnrewrite.verification import verify

if TYPE_CHECKING:
    from bnrewrite.onnx import OnnxExport

__all__ = ["COMMANDS", "Failure"]

_USERS, _OPTIMISED = "user's", "optimised"
_VERSION = 1  # of the forms that are printed as JSON


def _explain(given: argparse.Namespace, errors: Console) -> bool:
    with _waiting(errors, "reading the model"):
        chosen = _subject(given)
        report = explain(chosen.model, *chosen.inputs)
    if given.html:
        report.to_html(given.html)
    print(report.to_json() if given.json else report.to_text(_width()))
    return True


def _verify(given: argparse.Namespace, errors: Console) -> bool:
    with _waiting(errors, "running both models, and the user's in float64"):
        chosen = _subject(given)
        result = verify(*chosen.pair(given.backend), *chosen.inputs, steps=given.steps)
    print(_verification_json(result) if given.json else result.to_text(_width()))
    return result.ok


def _bench(given: argparse.Namespace, errors: Console) -> bool:
    if given.rounds < 2:
        raise Failure(f"--rounds is {given.rounds}; a median needs at least 2", is_usage=True)
    with _waiting(errors, "optimising the model"):
        chosen = _subject(given)
        models = dict(zip((_USERS, _OPTIMISED), chosen.pair(given.backend), strict=True))
        calls = {name: _call(model, chosen) for name, model in models.items()}
        for call in calls.values():
            call()
        saved = {
            name: _saved(model, chosen) if chosen.trains else None for name, model in models.items()
        }
    device = next((each.device for each in tensors(chosen.inputs)), torch.device("cpu"))
    columns = (TextColumn("timing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True) as progress:
        task = progress.add_task("timing", total=given.rounds)
        timings = interleaved(
            calls,
            rounds=given.rounds,
            device=device,
            after_round=lambda: progress.advance(task),
        )
    if given.json:
        print(_bench_json(chosen, timings, saved))
    else:
        Console(width=_width()).print(_bench_table(chosen, timings, saved))
    return True


def _export(given: argparse.Namespace, errors: Console) -> bool:
    dims = _dims(given.dynamic)
    with _waiting(errors, "exporting"):
        chosen = _subject(given)
        if dims and isinstance(chosen.model, ExportedProgram):
            raise Failure(
                "an exported program has its own sizes: leave --dynamic out", is_usage=True
            )
        free = dict.fromkeys(dims, torch.export.Dim.AUTO)
        result = bnrewrite.export_onnx(
            chosen.model,
            chosen.inputs,
            given.output,
            dynamic_shapes=tuple(free if isinstance(x, Tensor) else None for x in chosen.inputs)
            if dims
            else None,
            opset=given.opset,
            target=given.target,
            verify=not given.no_verify,
        )
    print(_export_json(result) if given.json else result.to_text(_width()))
    return True


COMMANDS: dict[str, Callable[[argparse.Namespace, Console], bool]] = {
    "explain": _explain,
    "export": _export,
    "verify": _verify,
    "bench": _bench,
}


def _subject(given: argparse.Namespace) -> Subject:
    return subject(
        given.model, given.input, seed=given.seed, train=given.train, evaluate=given.eval
    )


def _waiting(errors: Console, text: str) -> AbstractContextManager[object]:
    """A turning sign on a terminal, nothing elsewhere."""
    return errors.status(text)


def _width() -> int:
    return max(80, Console().width)


def _dims(text: str) -> list[int]:
    try:
        return [int(each) for each in text.split(",") if each]
    except ValueError:
        raise Failure(
            f"--dynamic is {text!r}; write dimensions, such as 0,2,3", is_usage=True
        ) from None


def _call(model: Callable[..., Any], chosen: Subject) -> Callable[[], object]:
    """One forward; with a backward where the model is in training."""
    if not chosen.trains:

        def forward() -> object:
            with torch.no_grad():
                return model(*chosen.inputs)

        return forward
    module = model if isinstance(model, nn.Module) else nn.Module()

    def step() -> object:
        for parameter in module.parameters():
            parameter.grad = None
        for buffer in module.buffers():
            if buffer.grad_fn is not None:  # else every step is longer than the one before
                buffer.detach_()
        results = _differentiable(model(*chosen.inputs))
        torch.autograd.backward(results, [torch.ones_like(each) for each in results])
        return results

    return step


def _saved(model: Callable[..., Any], chosen: Subject) -> int:
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    return saved_bytes(lambda: model(*chosen.inputs), parameters)


def _differentiable(results: Any) -> list[Tensor]:
    found = [
        each for each in tree_leaves(results) if isinstance(each, Tensor) and each.requires_grad
    ]
    if not found:
        raise Failure("the model is in training, and nothing of its result has a gradient")
    return found


def _bench_table(
    chosen: Subject, timings: dict[str, Timing], saved: dict[str, int | None]
) -> Table:
    title = "forward and backward" if chosen.trains else "forward, without gradients"
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, title=title)
    table.add_column("model")
    for column in ("median", "of the user's", "spread", "saved for the backward"):
        table.add_column(column, justify="right")
    for name, timing in timings.items():
        kept = saved[name]
        table.add_row(
            name,
            f"{timing.median * 1e3:.3g} ms",
            f"{timing.ratio(timings[_USERS]):.2f}",
            f"{timing.spread:.0%}",
            "-" if kept is None else f"{kept / 2**20:.3g} MiB",
        )
    return table


def _bench_json(chosen: Subject, timings: dict[str, Timing], saved: dict[str, int | None]) -> str:
    models = {
        name: {
            "seconds": timing.median,
            "spread": timing.spread,
            "saved_bytes": saved[name],
        }
        for name, timing in timings.items()
    }
    return json.dumps(
        {
            "schema": "bnrewrite.bench",
            "version": _VERSION,
            "training": chosen.trains,
            "users": models[_USERS],
            "optimised": models[_OPTIMISED],
            "ratio": timings[_OPTIMISED].ratio(timings[_USERS]),
        }
    )


def _export_json(result: OnnxExport) -> str:
    return json.dumps(
        {
            "schema": "bnrewrite.export",
            "version": _VERSION,
            "files": [str(each) for each in result.files],
            "target": result.target,
            "opset": result.opset,
            "inputs": [str(each) for each in result.inputs],
            "outputs": [str(each) for each in result.outputs],
            "rewritten": len(result.report.rewritten),
            "left": [each.reason for each in result.report.refusals],
            "operators": result.operators,
            "placement": result.placement,
            "checks": {name: _checks(each) for name, each in result.verifications.items()},
            "notes": list(result.notes),
        }
    )


def _verification_json(result: Verification) -> str:
    return json.dumps(
        {
            "schema": "bnrewrite.verify",
            "version": _VERSION,
            "ok": result.ok,
            "steps": result.steps,
            "checks": _checks(result),
            "violations": list(result.violations),
            "notes": list(result.notes),
        }
    )


def _checks(result: Verification) -> list[dict[str, Any]]:
    return [{**asdict(each), "ok": each.ok} for each in result.checks]
