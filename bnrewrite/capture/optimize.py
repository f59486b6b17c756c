"""`optimize`: the user's model, the same object, with its norms at native speed."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import nn

from bnrewrite.capture.backend import Compiler
from bnrewrite.capture.dynamo import compiled
from bnrewrite.capture.hook import Hook, install
from bnrewrite.capture.switches import checked_options

Model = TypeVar("Model", bound=Callable[..., Any])


def optimize(
    model: Model,
    *,
    backend: str = "auto",
    strict: bool = False,
    disable: Iterable[str] = (),
    only: Iterable[str | int] | str | int | None = None,
    kernels: str = "auto",
    dynamic: bool | None = None,
) -> Model:
    """Let a model compute its hand-written norms with the fastest code that gives the same values.

    The model is returned, not a wrapper: class, parameters, `state_dict` keys, hooks, copies and
    checkpoints stay as they are. What is found and replaced happens at the first call, once per
    mode and kind of input; `explain(model, *inputs)` shows it. Calling `optimize` again replaces
    the options.

    Args:
        model: a module, or a function (then a function is returned).
        backend: what runs the model afterwards: "eager", "inductor" or any backend that
            `torch.compiler.list_backends()` names; "auto" is Inductor on a GPU, eager on a CPU.
        strict: leave a norm alone where rewriting it would be more accurate than its source.
        disable: names of passes, or kinds of norm ("layer_norm"), that are switched off.
        only: kinds of norm, or numbers of sites in the report, that are rewritten; None for all.
        kernels: "auto", or "none" for native operations and compositions of them alone.
        dynamic: as in `torch.compile`: None learns from sizes that change.

    Raises:
        TypeError: the model is neither a module nor a function, or is a scripted one.
        ValueError: a backend, pass, kind or kernel that does not exist.
    """
    _check_model(model)
    _check_backend(backend)
    options = checked_options(strict=strict, disable=disable, only=only, kernels=kernels)
    if isinstance(model, nn.Module):
        install(model, Hook(backend, options, dynamic))
        return model
    run = compiled(_own_code(model), Compiler(backend, options), dynamic)

    @functools.wraps(model)
    def optimized(*args: Any, **kwargs: Any) -> Any:
        return run(*args, **kwargs)

    return optimized  # type: ignore[return-value]


def _check_model(model: Any) -> None:
    if isinstance(model, torch.jit.ScriptModule | torch.jit.ScriptFunction):
        raise TypeError(
            f"the model is a {type(model).__name__}, which is compiled already; "
            "call optimize on the Python module that it was scripted or traced from"
        )
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise TypeError(
            "the model is what torch.compile returned; call optimize on the module that was given "
            'to torch.compile, or write torch.compile(model, backend="bnrewrite")'
        )
    function = isinstance(model, functools.partial) or (
        callable(model) and (isinstance(model, types.FunctionType | types.MethodType))
    )
    if not isinstance(model, nn.Module) and not function:
        raise TypeError(
            f"optimize takes a torch.nn.Module or a function, not a {type(model).__name__}"
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


def _own_code(function: Any) -> Any:
    """A function with a code object of its own, so that Dynamo counts its recompilations alone."""
    if not isinstance(function, types.FunctionType):
        return function
    copy = types.FunctionType(
        function.__code__.replace(co_name=function.__code__.co_name),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return functools.wraps(function)(copy)
