"""Make a module optimise itself when it is called, and stay the user's object.

`nn.Module.__call__` asks for `self._compiled_call_impl` first. A descriptor of that name on the
model's class answers with a call that is bound to whichever instance asks: a deep copy, an EMA copy
or a replica of DataParallel runs with its own tensors. Which instances are optimised is a record in
their `__dict__`, which copies and replicas inherit and which is pickled as a plain dictionary, so
that a saved model loads where bnrewrite is not installed.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import asdict
from itertools import count
from typing import Any

import torch
from torch import nn
from torch._C._functorch import peek_interpreter_stack

from bnrewrite.capture.backend import Compiler
from bnrewrite.capture.dynamo import compiled
from bnrewrite.capture.numbering import Numbering, is_numbered
from bnrewrite.options import Options

KEY = "_bnrewrite"
_SLOT = "_compiled_call_impl"
_CALLS = count()


class Hook:
    """The compiled call of one optimised model and of its copies.

    The call is compiled as a function of the module, from a code object of its own: Dynamo counts
    recompilations per code object, and one model's must not use up another's.
    """

    def __init__(self, backend: str, options: Options, dynamic: bool | None) -> None:
        self.backend, self.options, self.dynamic = backend, options, dynamic
        self.compiler = compiler = Compiler(backend, options)
        self.run = compiled(own_call(), compiler, dynamic)
        if is_numbered(options):
            self.run = _numbered(self.run, compiler.numbering)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return self

    def __copy__(self) -> Hook:
        return self

    def __reduce__(self) -> tuple[type[dict[str, Any]], tuple[tuple[tuple[str, Any], ...]]]:
        options = {
            name: tuple(value) if isinstance(value, frozenset) else value
            for name, value in asdict(self.options).items()
        }
        settings = (("backend", self.backend), ("dynamic", self.dynamic), ("options", options))
        return dict, (settings,)


def install(model: nn.Module, hook: Hook) -> None:
    """Let `model` and its copies run through `hook` when they are called."""
    model.__dict__.pop(_SLOT, None)  # of an earlier `model.compile()`
    model.__dict__[KEY] = hook
    for kind in (type(model), getattr(model, "cls_to_become", None)):  # a lazy module's next class
        if kind is not None and not isinstance(vars(kind).get(_SLOT), _BoundCall):
            setattr(kind, _SLOT, _BoundCall())


class _BoundCall:
    """`module._compiled_call_impl` of an optimised class: None for instances that are not."""

    def __get__(self, module: nn.Module | None, owner: type) -> Callable[..., Any] | None:
        hook = None if module is None else module.__dict__.get(KEY)
        if hook is None:
            return None
        if type(hook) is not Hook:
            hook = _restored(module, hook)
        if is_traced():
            return None
        if module.__dict__.get("_is_replica"):
            hook.compiler.warn_of_replicas(module)
        return types.MethodType(hook.run, module)


def _numbered(run: Callable[..., Any], numbering: Numbering) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        numbering.begin()
        return run(*args, **kwargs)

    return call


def is_traced() -> bool:
    """Whether something else looks at the user's code, or transforms it, from outside."""
    return bool(peek_interpreter_stack() is not None or torch._C._is_tracing())


def _restored(module: Any, plain: dict[str, Any]) -> Hook:
    """The hook of a model that was pickled."""
    options = dict(plain["options"])
    options["disable"] = frozenset(options["disable"])
    options["only"] = None if options["only"] is None else frozenset(options["only"])
    hook = Hook(plain["backend"], Options(**options), plain["dynamic"])
    module.__dict__[KEY] = hook
    return hook


def own_call() -> Callable[..., Any]:
    """A call of a module (or function) as a function of it, with a code object of its own.

    And a name of its own: by file, line and name Dynamo remembers which sizes and numbers vary, and
    would take what differs between two models for what varies in the second.
    """
    code = _call.__code__.replace(co_name=f"{_call.__name__}_{next(_CALLS)}")
    return types.FunctionType(code, globals(), code.co_name)


def _call(module: Any, *args: Any, **kwargs: Any) -> Any:
    call = module._call_impl if isinstance(module, nn.Module) else module
    return call(*args, **kwargs)
