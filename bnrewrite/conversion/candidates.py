"""Which modules may be hand-written norms, and what a native module in their place would drop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from bnrewrite.capture.hook import KEY

from .record import Unequal

LARGEST = 3  # submodules of a module that is looked at at all; a whole network is no norm

# Methods of nn.Module that a model is used through, beside `forward`.
USED = frozenset(name for name in dir(nn.Module) if not name.startswith("__")) | {
    "__call__", "__getattr__", "__setattr__", "__delattr__", "__getstate__", "__setstate__",
    "__deepcopy__", "__copy__", "__reduce__", "__reduce_ex__", "__getattribute__",
}  # fmt: skip
# ... and those that are not called after a module was made, or only name it.
HARMLESS = frozenset((
    "forward", "extra_repr", "reset_parameters", "reset_running_stats", "dump_patches", "training",
    "_version", "call_super_init", "_compiled_call_impl",
    "__init__", "__repr__", "__annotations__", "__doc__",
))  # fmt: skip
HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)  # fmt: skip


def candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a user's own class that could be a norm, each once, by its first name."""
    for name, module in model.named_modules():
        own = any(True for _ in added(type(module)))
        own = own and not isinstance(module, torch.jit.ScriptModule)
        parts = sum(1 for _ in module.modules()) - 1
        if own and type(module).forward is not nn.Module.forward and parts <= LARGEST:
            yield name, module


def check_nothing_is_dropped(module: nn.Module) -> None:
    """Refuse a module with more than parameters, buffers and a formula.

    Raises:
        Unequal: with what it has.
    """
    kind = type(module)
    if nn.utils.parametrize.is_parametrized(module):
        raise Unequal("it has parametrizations, which a native module in its place would drop")
    if any(vars(module).get(each) for each in HOOKS):
        raise Unequal("it has hooks, which a native module in its place would drop")
    if next(module.children(), None) is not None:
        names = ", ".join(name for name, _ in module.named_children())
        raise Unequal(f"it has submodules ({names}), which the native module has not")
    if KEY in vars(module) or vars(module).get("_compiled_call_impl") is not None:
        raise Unequal("it is compiled or optimised by itself")
    if "forward" in vars(module):
        raise Unequal("its forward is set on the instance")
    for name, value in added(kind):
        if name in USED and name not in HARMLESS:
            raise Unequal(f"its class has a {name} of its own, which the native module would drop")
        public = callable(value) or isinstance(value, property | staticmethod | classmethod)
        if public and not name.startswith("_") and name not in HARMLESS and not _calls(kind, name):
            raise Unequal(f"its class has {name}, which others may use and the native has not")


def added(kind: type) -> Iterator[tuple[str, Any]]:
    """What a class and its bases add to those of PyTorch."""
    for base in kind.__mro__:
        if not base.__module__.startswith("torch.") and base is not object:
            yield from vars(base).items()


def class_attributes(kind: type) -> dict[str, Any]:
    """The plain values that a class has in common for its instances, such as ``eps = 1e-5``."""
    return {
        name: value
        for name, value in reversed(list(added(kind)))
        if not name.startswith("_")
        and not callable(value)
        and not isinstance(value, property | staticmethod | classmethod)
    }


def _calls(kind: type, name: str) -> bool:
    """Whether a forward, or what it calls, names a method: then its formula has been read."""
    seen: set[str] = set()
    todo = ["forward"]
    while todo:
        called = todo.pop()
        for base in kind.__mro__:
            code = getattr(vars(base).get(called), "__code__", None)
            new = set(getattr(code, "co_names", ())) - seen
            seen |= new
            todo += new
    return name in seen
