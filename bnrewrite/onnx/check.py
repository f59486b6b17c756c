"""Does an exported file compute what the user's model computes?

    error(file) <= 3 error(user's model) + floor            both against float64

as `bnrewrite.verify` measures it, in the traced sizes and in others where sizes may vary.

One mean over a whole tensor is a single number, which the user's code may have to the last digit by
luck, and onnxruntime sums in another order. So what seems wrong is looked at for several inputs,
over which the errors of both are the largest: luck goes, what is wrong stays wrong.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch.export import ExportedProgram

from bnrewrite.report.verdict import Verification
from bnrewrite.trial import own_randomness
from bnrewrite.verification import verify

from .providers import Place, available, missing_library
from .refusal import ExportError, MismatchError, SessionError, in_a_line
from .running import Exported, has_brain_floats, save_in_float32
from .session import Session
from .sizes import TRACED, Case, cases

UNCHECKED = "verify=False exports it unchecked"
SECOND_LOOK = 8  # inputs


@dataclass(frozen=True)
class Checked:
    """What a check of a file found.

    Attributes:
        verifications: by the sizes of the inputs.
        device: where the file ran.
        notes: one sentence each of what was not checked, and why.
    """

    verifications: dict[str, Verification]
    device: str
    notes: tuple[str, ...]


def check(
    model: Callable[..., Any],
    program: ExportedProgram,
    translated: ir.Model,
    path: Path,
    target: str,
) -> Checked:
    """Run a file against the model that it was made from.

    Args:
        model: the user's.
        program: what the file was made from.
        translated: the file's content.
        path: the file.
        target: the provider that it was written for; the CPU stands in where it is not there.

    Raises:
        MismatchError: the file computes something else.
        ExportError: the file does not run, or the model does not run in float64.
    """
    device, notes = _device(target)
    with tempfile.TemporaryDirectory() as folder:
        if device == "cpu" and has_brain_floats(translated):
            path = Path(folder) / path.name
            save_in_float32(translated, path)
            notes.append("bfloat16 was checked in float32: the CPU provider has no kernels for it")
        exported = Exported(program, _session(path, device))
        found: dict[str, Verification] = {}
        for case in cases(program):
            refusal = _why_not_taken(model, case)
            if refusal is not None and case.name == TRACED:
                raise ExportError(f"the model does not run on the arguments: {refusal}")
            if refusal is not None:
                notes.append(f"the model itself does not take the sizes {case.name}")
                continue
            verification = _verified(model, exported, case)
            if case.promised or verification.ok:
                found[case.name] = verification
            else:
                notes.append(f"the file is not right in the sizes {case.name}, of which one is 1")
        del exported  # before its file: some systems do not delete what is open
    for name, verification in found.items():
        if not verification.ok:
            raise MismatchError(
                f"the exported file differs from the model ({name}), and was removed:\n"
                f"{verification}"
            )
    return Checked(found, device, tuple(notes))


def _session(path: Path, device: str) -> Session:
    try:
        return Session(path, device)
    except SessionError as error:
        raise ExportError(f"the file cannot be checked: {error}; {UNCHECKED}") from error


def _device(target: str) -> tuple[str, list[str]]:
    place = Place(target)
    if target == "cpu":
        return "cpu", []
    if place.provider not in available():
        missing: str | None = f"onnxruntime has no {place.provider}"
    elif not torch.cuda.is_available():
        missing = "torch sees no GPU"
    else:
        missing = missing_library(place) if target == "tensorrt" else None
    if missing is None:
        return target, []
    return "cpu", [f"checked on the CPU provider, not on {place.provider}: {missing}"]


def _verified(model: Callable[..., Any], exported: Exported, case: Case) -> Verification:
    def call(*args: Any, **kwargs: Any) -> Any:
        return exported(*args, **kwargs)

    try:
        with torch.no_grad():
            found = verify(model, call, *case.args, kwargs=case.kwargs, steps=1)
            if not found.ok and not found.violations:
                found = verify(model, call, *case.args, kwargs=case.kwargs, steps=SECOND_LOOK)
    except RuntimeError as error:  # the user's code runs, but not in float64
        raise ExportError(f"the file cannot be checked: {in_a_line(error)}; {UNCHECKED}") from error

    notes = tuple(note for note in found.notes if not note.startswith("gradient of"))
    return replace(found, notes=notes)


def _why_not_taken(model: Callable[..., Any], case: Case) -> str | None:
    """What the user's code raises in these sizes; its state is not changed by that."""
    try:
        with torch.no_grad(), own_randomness(0):
            model(*case.args, **case.kwargs)
    except Exception as error:  # whatever a user's code raises
        return in_a_line(error)
    return None
