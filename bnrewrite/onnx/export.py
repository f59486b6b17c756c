"""`export_onnx`: a model as an ONNX file in which every recognised norm is one operation."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from torch import fx
from torch.export import ExportedProgram

from bnrewrite.doors.entry import Given
from bnrewrite.options import BnrewriteWarning, Options
from bnrewrite.passes import rewrite
from bnrewrite.report.report import Report
from bnrewrite.report.site import Site

from .absorb import absorb
from .affine import join_affines
from .check import Checked, check
from .constants import fold_constants
from .kernels import OPSETS, TARGETS
from .plain import make_plain
from .program import canonical, functional, opened, stored_values
from .providers import Place
from .record import OnnxExport
from .refusal import ExportError, SessionError, in_a_line
from .saving import data_path, save, staged
from .session import ports_of
from .tables import norms_elsewhere, operations, optimised_operations, placement
from .translate import raw_model, translate

# what is done to the graph behind the pipeline of `bnrewrite.passes`, in this order
AFTERWARDS: tuple[Callable[[fx.Graph], None], ...] = (
    make_plain,  # calls that providers are slow at become arithmetic with constants
    absorb,  # before constants are folded: it looks for scales that are stored
    join_affines,  # the affine of a norm that has taken it is not there any more
)


def export_onnx(
    model: Callable[..., Any] | Given,
    args: Any,
    path: str | PathLike[str],
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    opset: int = 23,
    target: str = "cuda",
    verify: bool = True,
) -> OnnxExport:
    """Write a model in evaluation mode as an ONNX file of standard operations.

    The model stays as it is. The file is written under another name and moved to `path` when it
    is whole and checked: an error leaves what stood there before.

    Args:
        model: a module in evaluation mode, or a function; an exported program, a scripted module,
            or the `.pt2` or `.pt` file of one.
        args: the positional arguments of an example call, or its only argument; () for those that
            an exported program has itself.
        path: of the file; weights of more than 1 GiB go to `<path>.data` beside it.
        kwargs: the keyword arguments of the example call.
        dynamic_shapes: which sizes vary, as `torch.export.export` takes it, such as
            ``({0: "batch", 2: "height"},)`` or ``{"x": {0: torch.export.Dim("batch")}}``. An
            exported program has its own.
        opset: 17 to 24; from 23 on an RMS norm is one operation.
        target: the provider that the operations are chosen for: "cuda", "cpu" or "tensorrt".
        verify: run the file against the model in float64, in several sizes, and tell which
            operations it has and where they run.

    Raises:
        TypeError: the model is nothing of these; a program is given dynamic shapes.
        ValueError: an opset or target that there is not; a file that is not loaded.
        ExportError: the model is in training mode, changes its state, or cannot be written; or
            the path cannot.
        MismatchError: the file computes something else than the model.
    """
    _check_choices(opset, target)
    place = Path(path)
    given = tuple(args) if isinstance(args, tuple | list) else (args,)
    with staged(place) as written:
        subject, original = opened(model, given, kwargs or {}, dynamic_shapes)
        program, sites, notes = _rewritten_or_not(original)
        translated = translate(program, target, opset, dynamic_shapes)
        save(translated, written)
        result = OnnxExport(
            path=place,
            target=target,
            opset=opset,
            inputs=ports_of(translated.graph.inputs),
            outputs=ports_of(translated.graph.outputs),
            report=Report(sites=list(sites), graphs=1),
            operators={"bnrewrite": operations(translated)},
            notes=notes,
            external=data_path(written).exists(),
        )
        if verify:
            checked = check(subject, program, translated, written, target)
            result = _with_check(result, checked, original, written)
    return result


def _rewritten_or_not(
    original: ExportedProgram,
) -> tuple[ExportedProgram, tuple[Site, ...], tuple[str, ...]]:
    """The program as `rewritten` gives it, and notes; as the user wrote it should that fail."""
    program = functional(original)
    try:
        return (*rewritten(program), ())
    except Exception as error:  # of our own: the export goes on without it
        note = f"norms are exported as they were written: {in_a_line(error)}"
        warnings.warn(note, BnrewriteWarning, stacklevel=3)
        return functional(original), (), (note,)


def rewritten(program: ExportedProgram) -> tuple[ExportedProgram, tuple[Site, ...]]:
    """The program with its norms replaced and its constants folded, and the norms.

    The graph of the program that is given is changed.
    """
    graph = canonical(program)
    sites = rewrite(graph, Options(stage="export"), stored_values(program))
    for step in AFTERWARDS:
        step(program.graph)
    return fold_constants(program), sites


def _check_choices(opset: int, target: str) -> None:
    if opset not in OPSETS:
        raise ValueError(f"opset is {opset!r}; it is one of {OPSETS[0]} to {OPSETS[-1]}")
    if target not in TARGETS:
        raise ValueError(f"target is {target!r}; it is one of {', '.join(TARGETS)}")


def _with_check(
    result: OnnxExport, checked: Checked, original: ExportedProgram, written: Path
) -> OnnxExport:
    """The record of an export with what checking it told."""
    place = Place(checked.device)
    placed = _placement(written, place)
    elsewhere = norms_elsewhere(placed, place)
    if elsewhere:
        raise ExportError(
            f"norms would not run on {place.provider}: {', '.join(elsewhere)}; "
            "please report this model"
        )
    tables = {**_exporters_tables(original, result.opset, place), **result.operators}
    tables["bnrewrite + onnxruntime"] = optimised_operations(written, place)
    return replace(
        result,
        operators=tables,
        verifications=checked.verifications,
        placement=placed,
        notes=(*result.notes, *checked.notes),
    )


def _placement(written: Path, place: Place) -> dict[str, dict[str, int]]:
    """Nothing where the file does not load here: bfloat16 on a machine without a GPU."""
    try:
        return placement(written, place)
    except SessionError:
        return {}


def _exporters_tables(
    original: ExportedProgram, opset: int, place: Place
) -> dict[str, dict[str, int] | None]:
    """What PyTorch's exporter writes by itself, before and after onnxruntime's optimiser."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "exporter.onnx"
        try:
            raw = raw_model(original, opset)
            save(raw, path)
        except Exception:  # it fails in its own ways; there is nothing to compare with then
            return {"exporter": None, "exporter + onnxruntime": None}
        return {
            "exporter": operations(raw),
            "exporter + onnxruntime": optimised_operations(path, place),
        }
