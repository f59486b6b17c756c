"""The model and the inputs that a command is about."""

from __future__ import annotations

import argparse
import copy
import importlib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from bnrewrite import doors
from bnrewrite.capture.optimize import optimize
from bnrewrite.doors.archive import read

_SHAPE = re.compile(r"(?P<sizes>\d+(x\d+)*)(:(?P<dtype>\w+))?")
_NUMBER = re.compile(r"=(?P<text>.+)")
_TOKENS = 2  # whole numbers are 0 or 1: valid as flags, classes and tokens alike


class Failure(Exception):
    """What a command cannot do, in a sentence.

    Attributes:
        is_usage: whether the command line is at fault.
    """

    def __init__(self, message: str, *, is_usage: bool = False) -> None:
        super().__init__(message)
        self.is_usage = is_usage


@dataclass(frozen=True)
class Given:
    """An input as it was written: a shape and a dtype, or a number."""

    sizes: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    number: bool | int | float | None = None

    def value(self, generator: torch.Generator) -> Any:
        """A tensor of random numbers, or the number."""
        if self.dtype is None:
            return self.number
        if self.dtype.is_floating_point or self.dtype.is_complex:
            return torch.randn(self.sizes, generator=generator).to(self.dtype)
        return torch.randint(_TOKENS, self.sizes, generator=generator).to(self.dtype)


def parsed_input(text: str) -> Given:
    """What `--input` means.

    Raises:
        ArgumentTypeError: it is neither a shape nor a number.
    """
    number = _NUMBER.fullmatch(text)
    if number is not None:
        return Given(number=_parsed_number(number["text"]))
    found = _SHAPE.fullmatch(text)
    dtype = getattr(torch, (found["dtype"] or "float32") if found else "", None)
    if found is None or not isinstance(dtype, torch.dtype):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no input; write 1x3x224x224, 8x128:int64 or, for a number, =0.5"
        )
    return Given(tuple(map(int, found["sizes"].split("x"))), dtype)


def _parsed_number(text: str) -> bool | int | float:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise argparse.ArgumentTypeError(f"{text!r} is no number")


@dataclass(frozen=True)
class Subject:
    """A model, in the form it came in, and its inputs.

    Attributes:
        model: a module, an exported program or a scripted module.
        users: what Python runs of it.
        inputs: the arguments of a call.
    """

    model: Any
    users: nn.Module | Callable[..., Any]
    inputs: tuple[Any, ...]

    @property
    def trains(self) -> bool:
        """Whether a backward belongs to a call."""
        return isinstance(self.users, nn.Module) and self.users.training

    def pair(self, backend: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """The user's model, and the optimised one beside it, each with tensors of its own."""
        users = copy.deepcopy(self.users)
        if isinstance(self.model, ExportedProgram):
            return users, optimize(self.model).module()
        if isinstance(self.model, torch.jit.ScriptModule):
            inputs = None if self.model.training else self.inputs
            return users, optimize(self.model, example_inputs=inputs, backend=backend)
        return users, optimize(self.users, backend=backend)


def subject(
    spec: str, inputs: Sequence[Given], *, seed: int, train: bool, evaluate: bool
) -> Subject:
    """The model of a command line.

    Raises:
        Failure: it cannot be found, or needs other inputs.
    """
    model = _model(spec)
    if train or evaluate:
        if isinstance(model, ExportedProgram) or not isinstance(model, nn.Module):
            raise Failure(f"{spec} has no mode that --train or --eval could set", is_usage=True)
        model.train(train)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    values = tuple(each.value(generator) for each in inputs)
    if isinstance(model, ExportedProgram):
        opened = doors.open(model)
        values = values or opened.example_inputs
        users: Any = opened.module
    elif isinstance(model, torch.jit.ScriptModule):
        users = doors.open(model).module
    else:
        users = model
    if not values:
        raise Failure("give the inputs: --input 1x3x224x224", is_usage=True)
    return Subject(model, users, values)


def _model(spec: str) -> Any:
    if Path(spec).suffix in (".pt", ".pt2", ".pth") or Path(spec).exists():
        return read(spec)
    module, colon, path = spec.partition(":")
    if not colon or not module or not path:
        raise Failure(
            f"{spec} is no file; write MODULE:CALLABLE, or a .pt or .pt2 file", is_usage=True
        )
    if "" not in sys.path:
        sys.path.insert(0, "")  # the folder that the command is called in
    try:
        target: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise Failure(f"there is no module {error.name}") from error
    for step in path.split("."):
        if not hasattr(target, step):
            raise Failure(f"{module} has no {path}")
        target = getattr(target, step)
    model = target if isinstance(target, nn.Module) else target()
    if not callable(model) and not isinstance(model, ExportedProgram):
        raise Failure(f"{spec} gives a {type(model).__name__}, which is no model")
    return model


def tensors(values: Sequence[Any]) -> list[Tensor]:
    """The tensors among some inputs."""
    return [each for each in values if isinstance(each, Tensor)]
