"""With what each module of a model is called."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from bnrewrite.oracle import deep_copy

from .record import Unequal


@dataclass(frozen=True)
class Given:
    """The one tensor of a call: what decides which code runs for it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


Calls = dict[str, list[Given | str]]  # by module: tensors, or why a call is none of a norm


def calls_of(model: nn.Module, names: Sequence[str], args: Any, kwargs: Any) -> Calls:
    """The calls of modules in a training and an evaluation step of a copy of their model.

    Raises:
        TypeError: the model cannot be copied.
        Exception: whatever the model raises in evaluation.
    """
    try:
        subject = deep_copy(model)
    except Exception as error:
        raise TypeError(f"the model cannot be copied, and runs on a copy: {error}") from error
    calls: Calls = {name: [] for name in names}
    modules = dict(subject.named_modules())
    for name in names:
        modules[name].register_forward_pre_hook(_noting(calls[name]), with_kwargs=True)
    stance = torch.compiler.set_stance("force_eager")
    with stance, torch.no_grad():
        for training in (True, False):
            subject.train(training)
            given = tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
            with _tolerated(training):
                subject(*given[0], **given[1])
    return calls


@contextmanager
def _tolerated(training: bool) -> Iterator[None]:
    """A training step may ask for more than the inputs are, such as a larger batch."""
    try:
        yield
    except Exception:  # whatever the user's code raises; evaluation must run
        if not training:
            raise


def _noting(seen: list[Given | str]) -> Any:
    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = _given(args, kwargs)
        if found not in seen:
            seen.append(found)

    return note


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given | str:
    if kwargs:
        return f"it is called with {', '.join(kwargs)} by name, which the native module has not"
    if len(args) != 1 or not isinstance(args[0], Tensor):
        return f"it is called with {len(args)} arguments, a native norm takes one tensor"
    if torch.is_autocast_enabled(args[0].device.type):
        return "it is called under autocast, where the native module has dtypes of its own"
    return Given(tuple(args[0].shape), args[0].dtype, args[0].device)


def tensors_of(calls: Sequence[Given | str]) -> list[Given]:
    """The tensors of a module's calls, one for each rank and dtype.

    Raises:
        Unequal: there is no call, or one that a native norm does not take.
    """
    if not calls:
        raise Unequal("the model does not call it with these inputs")
    tensors: dict[Any, Given] = {}
    for each in calls:
        if isinstance(each, str):
            raise Unequal(each)
        tensors.setdefault((len(each.shape), each.dtype, each.device), each)
    return list(tensors.values())
