"""Models that come as something else than a module or a function, and what is given back for them.

| given | given back |
| --- | --- |
| an exported program, or its file | an exported program |
| a scripted module in evaluation, or its file | a scripted module |
| a scripted module in training, or its file | a module that Python runs, with both modes |
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from bnrewrite.capture.diagnosis import noticed_in
from bnrewrite.capture.look import Look, left
from bnrewrite.doors.archive import read
from bnrewrite.doors.module import Scripted, plain_module
from bnrewrite.doors.plain import Untranslatable
from bnrewrite.doors.program import examine_program, rebuilt
from bnrewrite.doors.scripted import Captured, capture, converted
from bnrewrite.options import BnrewriteWarning, Options
from bnrewrite.report.report import Report
from bnrewrite.report.site import Kept

Given = str | os.PathLike[str] | ExportedProgram | torch.jit.ScriptModule


@dataclass(frozen=True)
class Opened:
    """A model from elsewhere as a module.

    Attributes:
        module: what Python can call, trace and export; it shares its tensors with what was given.
        program: what was given, if it was an exported program or the file of one.
        example_inputs: the arguments with which a program was exported; () where there are none.
    """

    module: nn.Module
    program: ExportedProgram | None = None
    example_inputs: tuple[Any, ...] = ()


def is_given(model: object) -> TypeGuard[Given]:
    """Whether a model is one of those that come through here."""
    return isinstance(
        model, str | os.PathLike | ExportedProgram | torch.jit.ScriptModule
    ) and not isinstance(model, torch.jit.ScriptFunction)


def open(given: Given) -> Opened:
    """A program, a scripted module or the file of one as a module that Python runs.

    Raises:
        FileNotFoundError, ArchiveError: the file is not there, or is not loaded.
        TypeError: a scripted module calls something that has no form in Python.
    """
    loaded = _loaded(given)
    if isinstance(loaded, ExportedProgram):
        args, _ = loaded.example_inputs or ((), {})
        return Opened(loaded.module(), program=loaded, example_inputs=tuple(args))
    try:
        return Opened(plain_module(loaded))
    except Untranslatable as refusal:
        raise TypeError(f"the scripted module has no form in Python: {refusal}") from None


def optimize_given(
    given: Given, options: Options, example_inputs: Any
) -> ExportedProgram | torch.jit.ScriptModule | Scripted:
    """What is given back for a model from elsewhere; a `Scripted` is still to be optimised.

    Raises:
        TypeError: example inputs are missing, or are given where none are wanted.
        ValueError: example inputs do not fit.
    """
    loaded = _loaded(given)
    if isinstance(loaded, ExportedProgram):
        if example_inputs is not None:
            raise TypeError("an exported program has its own sizes: leave example_inputs out")
        return _optimized_program(loaded, options)
    if loaded.training:
        return _plain(loaded)
    if example_inputs is None:
        raise TypeError(
            "a scripted module in evaluation needs example_inputs=(x, ...), the arguments of a "
            "call; in training it needs none"
        )
    return _optimized_script(loaded, options, example_inputs)


def explain_given(given: Given, args: tuple[Any, ...], options: Options) -> Report | Scripted:
    """What is found; a `Scripted` in training is still to be explained.

    Raises:
        TypeError, ValueError: as `optimize_given`.
    """
    loaded = _loaded(given)
    if isinstance(loaded, ExportedProgram):
        return report_of([examine_program(loaded, options)])
    if loaded.training:
        return _plain(loaded)
    try:
        plain = plain_module(loaded, for_export=True)
    except Untranslatable as refusal:
        return Report(kept=[Kept("scripted module", str(refusal), "")])
    captured, reason = capture(plain, checked_inputs(loaded, args), options)
    return _script_report(loaded, plain, captured, reason)


def checked_inputs(scripted: torch.jit.ScriptModule, given: Any) -> list[Any]:
    """The arguments of a call, with those that have a default.

    Raises:
        ValueError: the module does not take them.
    """
    inputs = [given] if isinstance(given, Tensor) else list(given)
    _, *arguments = scripted._c._get_method("forward").schema.arguments
    if len(inputs) > len(arguments):
        raise ValueError(f"the example has {len(inputs)} inputs, the module takes {len(arguments)}")
    for argument in arguments[len(inputs) :]:
        if not argument.has_default_value():
            raise ValueError(f"the example has no value for the module's input {argument.name!r}")
        inputs.append(argument.default_value)
    try:
        with torch.no_grad():
            _trial(scripted)(*inputs)
    except Exception as error:  # whatever the user's code raises for these inputs
        raise ValueError(
            f"the module does not run on the example inputs ({', '.join(map(_shown, inputs))}): "
            f"{_cause(error)}"
        ) from error
    return inputs


def report_of(looks: Sequence[Look], kept: Sequence[Kept] = ()) -> Report:
    """What was found in the graphs of one model."""
    return Report(
        sites=[site for look in looks for site in look.sites],
        findings=[finding for each in noticed_in(looks) for finding in each.findings],
        graphs=len(looks),
        graph_texts=[
            (look.before, "" if look.canonical is None else str(look.canonical.module.graph))
            for look in looks
        ],
        kept=[*kept, *dict.fromkeys(each for look in looks for each in look.kept)],
    )


def _loaded(given: Given) -> ExportedProgram | torch.jit.ScriptModule:
    return read(given) if isinstance(given, str | os.PathLike) else given


def _plain(scripted: torch.jit.ScriptModule) -> Scripted:
    try:
        return plain_module(scripted)
    except Untranslatable as refusal:
        raise TypeError(f"the scripted module has no form in Python: {refusal}") from None


def _optimized_program(program: ExportedProgram, options: Options) -> ExportedProgram:
    look = examine_program(program, options)
    if look.failure is not None:
        _warn(f"a part of the program stays as it was exported: {look.failure}")
    return rebuilt(program, look) if look.is_changed else program


def _optimized_script(
    scripted: torch.jit.ScriptModule, options: Options, example_inputs: Any
) -> torch.jit.ScriptModule:
    """The scripted module; it runs on the example once all its operators are known to be ATen's."""
    try:
        plain = plain_module(scripted, for_export=True)
        inputs = checked_inputs(scripted, example_inputs)
        captured, reason = capture(plain, inputs, options)
        if reason is None:
            return converted(scripted, plain, captured)
    except Untranslatable as refusal:
        reason = str(refusal)
    _warn(f"the scripted module stays as it is: {reason}")
    return scripted


def _script_report(
    scripted: torch.jit.ScriptModule,
    plain: Scripted,
    captured: Sequence[Captured],
    reason: str | None,
) -> Report:
    """The report on the first capture: the others are the same module at other sizes."""
    looks = [each.look for each in captured[:1]]
    if reason is None:
        try:
            converted(scripted, plain, captured)
        except Untranslatable as refusal:
            reason = str(refusal)
    if reason is None:
        return report_of(looks)
    return report_of([left(each, reason) for each in looks], [Kept("scripted module", reason, "")])


def _trial(scripted: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    """A copy that may change its buffers."""
    copied: torch.jit.ScriptModule = copy.deepcopy(scripted)
    return copied


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {'x'.join(map(str, value.shape))}"
    return repr(value)


def _cause(error: Exception) -> str:
    """The last line of an error of TorchScript: before it stands its own call stack."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def _warn(message: str) -> None:
    warnings.warn(message, BnrewriteWarning, stacklevel=4)
