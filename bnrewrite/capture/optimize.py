"""`optimize`: the user's model, the same object, with its norms at native speed."""

from __future__ import annotations

import functools
import os
import types
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, overload

import torch
import torch.distributed as dist
from torch import nn
from torch.export import ExportedProgram

from bnrewrite.capture.hook import KEY, Hook, install, is_traced
from bnrewrite.capture.switches import checked_options
from bnrewrite.doors.entry import is_given, optimize_given
from bnrewrite.doors.module import Scripted

Model = TypeVar("Model", bound=Callable[..., Any])


@overload
def optimize(
    model: str | os.PathLike[str] | ExportedProgram | torch.jit.ScriptModule,
    *,
    example_inputs: Any = None,
    backend: str = "auto",
    strict: bool = False,
    disable: Iterable[str] = (),
    only: Iterable[str | int] | str | int | None = None,
    kernels: str = "auto",
    dynamic: bool | None = None,
    sync_stats: bool | dist.ProcessGroup | None = False,
) -> Any: ...


@overload
def optimize(
    model: Model,
    *,
    backend: str = "auto",
    strict: bool = False,
    disable: Iterable[str] = (),
    only: Iterable[str | int] | str | int | None = None,
    kernels: str = "auto",
    dynamic: bool | None = None,
    sync_stats: bool | dist.ProcessGroup | None = False,
) -> Model: ...


def optimize(
    model: Any,
    *,
    example_inputs: Any = None,
    backend: str = "auto",
    strict: bool = False,
    disable: Iterable[str] = (),
    only: Iterable[str | int] | str | int | None = None,
    kernels: str = "auto",
    dynamic: bool | None = None,
    sync_stats: bool | dist.ProcessGroup | None = False,
) -> Any:
    """Let a model compute its hand-written norms with the fastest code that gives the same values.

    The model is returned, not a wrapper: class, parameters, `state_dict` keys, hooks, copies and
    checkpoints stay as they are. What is found and replaced happens at the first call, once per
    mode and kind of input; `explain(model, *inputs)` shows it. Calling `optimize` again replaces
    the options.

    An exported program, or the `.pt2` file of one, gives an exported program. A scripted module, or
    its `.pt` file, gives a scripted module in evaluation, in training a module that Python runs.
    What is given stays as it is; the result has its tensors and its names. A program or a scripted
    module that comes back runs without this package.

    Args:
        model: a module, or a function (then a function is returned); an exported program, a
            scripted module, or the file of one.
        example_inputs: of a scripted module in evaluation, the arguments of a call.
        backend: what runs a module or function afterwards: "eager", "inductor" or any backend that
            `torch.compiler.list_backends()` names; "auto" is Inductor on a GPU, eager on a CPU.
        strict: leave a norm alone where rewriting it would be more accurate than its source.
        disable: names of passes, or kinds of norm ("layer_norm"), that are switched off.
        only: kinds of norm, or numbers of sites, that are rewritten; None for all. Numbers are
            those in the report on the call at which a graph is first used; as an option of
            `torch.compile(backend="bnrewrite")` they count from 0 in each graph.
        kernels: "auto"; "native" for PyTorch's operators alone, "composite" for none of them;
            "generated" for kernels printed from the formula wherever it has one, at any size.
        dynamic: as in `torch.compile`: None learns from sizes that change.
        sync_stats: True, or a process group: hand-written norms over the batch take the moments of
            the samples of all its processes, in forward and backward. Each of these has to call
            the model equally often.

    Raises:
        TypeError: the model is nothing of these; example inputs are missing, or are not wanted.
        ValueError: a backend, pass, kind, kernel or process group that does not exist; example
            inputs that do not fit; a file that is damaged or that could run code when it is loaded.
    """
    _check_backend(backend)
    if is_given(model):
        if sync_stats:
            raise TypeError("sync_stats is for modules and functions, not for what is exported")
        options = checked_options(strict=strict, disable=disable, only=only, kernels=kernels)
        result = optimize_given(model, options, example_inputs)
        if not isinstance(result, Scripted):
            return result
        model = result
    elif example_inputs is not None:
        raise TypeError("example_inputs are for a scripted module; a module learns from its calls")
    check_model(model, "optimize")
    if sync_stats and dynamic is False:
        raise ValueError("dynamic=False fixes the batch's size, which sync_stats has to see")
    options = checked_options(
        strict=strict, disable=disable, only=only, kernels=kernels, sync_stats=sync_stats
    )
    hook = Hook(backend, options, dynamic)
    if isinstance(model, nn.Module):
        _detach_statistics(model)
        install(model, hook)
        return model
    function = unwrapped(model)

    @functools.wraps(function)
    def optimized(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) if is_traced() else hook.run(function, *args, **kwargs)

    vars(optimized)[KEY] = hook
    return optimized


def unwrapped(model: Any) -> Any:
    """The user's function of one that `optimize` returned; anything else as it is."""
    is_wrapper = not isinstance(model, nn.Module) and hasattr(model, KEY)
    return model.__wrapped__ if is_wrapper else model


def check_model(model: Any, name: str) -> None:
    """Refuse what is neither a module nor a function.

    Raises:
        TypeError: with what to give instead.
    """
    if isinstance(model, torch.jit.ScriptModule | torch.jit.ScriptFunction):
        raise TypeError(
            f"the model is a {type(model).__name__}, which is compiled already; "
            f"call {name} on the Python module that it was scripted or traced from"
        )
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise TypeError(
            f"the model is what torch.compile returned; call {name} on the module that was given "
            'to torch.compile, or write torch.compile(model, backend="bnrewrite")'
        )
    function = isinstance(model, functools.partial) or (
        callable(model) and (isinstance(model, types.FunctionType | types.MethodType))
    )
    if not isinstance(model, nn.Module) and not function:
        raise TypeError(
            f"{name} takes a torch.nn.Module or a function, not a {type(model).__name__}"
        )


def _check_backend(backend: Any) -> None:
    if not isinstance(backend, str):
        raise TypeError(
            f"backend is a {type(backend).__name__}; give its name, which "
            "torch._dynamo.register_backend(function) makes known"
        )
    known = {"auto", "eager", "inductor", *torch._dynamo.list_backends(exclude_tags=())}
    if backend == "bnrewrite" or backend not in known:
        raise ValueError(
            f"backend is {backend!r}; it is one of {', '.join(sorted(known - {'bnrewrite'}))}"
        )


def _detach_statistics(model: nn.Module) -> None:
    """Cut buffers off the autograd history that earlier steps of the user's code left on them."""
    for buffer in model.buffers():
        if buffer.grad_fn is not None and not buffer._is_view():
            buffer.detach_()
