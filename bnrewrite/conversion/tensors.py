"""A native module with the parameters and buffers of the module whose place it takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from .candidates import class_attributes
from .natives import Native
from .record import Unequal

_COUNT = "num_batches_tracked"


def built(native: Native, module: nn.Module) -> nn.Module:
    """The native module, with the very tensors, the mode and the plain attributes of another.

    A parameter or buffer that the native class does not know is registered on it: it stays in the
    `state_dict`, and is loaded.

    Raises:
        Unequal: a tensor has the name of one that the formula does not use.
    """
    made = native.kind(**native.arguments, device="meta")
    known = set(made._parameters) | set(made._buffers)
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if name in known - native.tensors and tensor is not None:
            raise Unequal(f"its {name} is not what the native module uses it for")
        other: Any = made._parameters.get(name, made._buffers.get(name))
        if name in native.tensors and tensor is not None and other.shape != tensor.shape:
            raise Unequal(f"its {name} has another shape than the native module's")
        if name in native.tensors and (name in made._parameters) != (name in module._parameters):
            raise Unequal(f"its {name} is not a parameter or buffer as in the native module")
    made._parameters = _in_order(module._parameters, made._parameters)
    made._buffers = _in_order(module._buffers, made._buffers)
    made._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    own = vars(made)
    others = {**class_attributes(type(module)), **vars(module)}
    own.update({name: value for name, value in others.items() if not hasattr(made, name)})
    if native.arguments.get("track_running_stats") and _COUNT not in module._buffers:
        hooked: Any = made  # torch has no types for it
        hooked.register_load_state_dict_pre_hook(without_count)
    return made.train(module.training)


def without_count(module: nn.Module, state: dict[str, Any], prefix: str, *others: Any) -> None:
    """Drop the counter that a batch norm adds to a checkpoint that has none, as it has none."""
    if module._buffers.get(_COUNT) is None:
        state.pop(prefix + _COUNT, None)


def _in_order(mine: Mapping[str, Any], native: Iterable[str]) -> dict[str, Any]:
    """The tensors of the user's module, in their order; what it lacks is None."""
    return {**mine, **{name: None for name in native if name not in mine}}
