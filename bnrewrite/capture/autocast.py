"""Make the casts of autocast nodes of the graph.

Before autograd, autocast is a mode: the graph holds `linear(x, weight)` in float32, and the mode
computes it in bfloat16. A rewritten node would be cast in its own way, or not at all. Here each
operation gets its inputs in the dtype that autocast gave it, and the mode is gone:

    Before:  enter_autocast; y = linear(x, w); z = y - mean(y); exit_autocast
    After:   y = linear(to_bfloat16(x), to_bfloat16(w)); z = y - mean(y)

Which dtype that was shows in the result that tracing recorded: the first of (inputs as they are,
in the mode's dtype, in float32) that gives the recorded dtypes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from bnrewrite.capture.refusal import CaptureError

DEVICES = ("cpu", "cuda", "xpu", "mps")
ENTER = torch.amp.autocast_mode._enter_autocast
EXIT = torch.amp.autocast_mode._exit_autocast

Dtypes = dict[str, torch.dtype]  # of each device type for which autocast is on


def make_casts_explicit(graph: fx.Graph) -> None:
    """Replace autocast, around the graph and inside it, by casts.

    Raises:
        CaptureError: an operation whose dtypes under autocast cannot be told from its result.
    """
    current = {
        device: torch.get_autocast_dtype(device)
        for device in DEVICES
        if torch.is_autocast_enabled(device)
    }
    outer: dict[fx.Node, Dtypes] = {}
    cache: dict[tuple[fx.Node, Any], fx.Node] = {}
    for node in list(graph.nodes):
        if node.target is ENTER:
            device, dtype, enabled = _settings(*node.args)
            outer[node] = current
            current = {each: current[each] for each in current if each != device}
            if enabled:
                current[device] = dtype or torch.get_autocast_dtype(device)
        elif node.target is EXIT:
            current = outer[node.args[0]]
        elif current and isinstance(node.target, torch._ops.OpOverload):
            with autocast_off():
                _cast_inputs(node, current, cache)
    for node in reversed(list(graph.nodes)):
        if node.target in (ENTER, EXIT):
            graph.erase_node(node)


@contextmanager
def autocast_off() -> Iterator[None]:
    """No autocast on any device."""
    with autocast_kept():
        for device in DEVICES:
            if torch.is_autocast_enabled(device):
                torch.set_autocast_enabled(device, False)
        yield


@contextmanager
def autocast_kept() -> Iterator[None]:
    """Put autocast back as it is now, whatever happens inside."""
    states = [_state(device) for device in DEVICES]
    try:
        yield
    finally:
        for state in states:
            if state != _state(state[0]):
                exit_autocast(state)


State = tuple[str, bool, torch.dtype]  # device type, on, dtype


def enter_autocast(
    device: str, dtype: torch.dtype | None = None, enabled: bool = True, *cache: Any
) -> State:
    """Switch autocast as a graph says; returns what it was."""
    before = _state(device)
    exit_autocast((device, enabled, dtype or before[2]))
    return before


def exit_autocast(state: State) -> None:
    """Put autocast back as it was."""
    device, enabled, dtype = state
    torch.set_autocast_enabled(device, enabled)
    torch.set_autocast_dtype(device, dtype)
    torch.clear_autocast_cache()


def _state(device: str) -> State:
    return device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def _settings(device: str, dtype: torch.dtype | None = None, enabled: bool = True, *_: Any) -> Any:
    return device, dtype, enabled


def _cast_inputs(node: fx.Node, dtypes: Dtypes, cache: dict[tuple[fx.Node, Any], fx.Node]) -> None:
    """Insert before a node the casts that give the recorded dtypes."""
    recorded = _dtypes(node.meta.get("val"))
    if not recorded:
        return
    for device, dtype in dtypes.items():
        as_they_are = (None,) if _may_stay(node, device) else ()
        for wanted in (*as_they_are, dtype, torch.float32):
            if _result_dtypes(node, device, wanted) == recorded:
                if wanted is not None:
                    _insert_casts(node, device, wanted, cache)
                return
    raise CaptureError(f"the casts of autocast around {node.target} cannot be told")


def _may_stay(node: fx.Node, device: str) -> bool:
    """Whether an operation takes its inputs as they are.

    Fake tensors of two dtypes pass through a matrix product that real ones do not; only pointwise
    operations promote their inputs by themselves.
    """
    values: list[Any] = [argument.meta.get("val") for argument in node.all_input_nodes]
    found = {value.dtype for value in values if _is_cast(value, device, None)}
    return len(found) < 2 or torch.Tag.pointwise in node.target.tags  # type: ignore[union-attr]


def _result_dtypes(node: fx.Node, device: str, wanted: torch.dtype | None) -> list[torch.dtype]:
    def value(argument: fx.Node) -> Any:
        fake = argument.meta["val"]
        return fake.to(wanted) if wanted is not None and _is_cast(fake, device, wanted) else fake

    args, kwargs = fx.map_arg((node.args, node.kwargs), value)
    try:
        with torch.no_grad():
            return _dtypes(node.target(*args, **kwargs))  # type: ignore[operator]
    except RuntimeError:  # the operation takes no such dtypes
        return []


def _insert_casts(
    node: fx.Node, device: str, wanted: torch.dtype, cache: dict[tuple[fx.Node, Any], fx.Node]
) -> None:
    """One cast per use, so that gradients are added up in the wider dtype as under autocast.

    Inputs of the graph are cast once, as autocast does with parameters.
    """

    def cast(argument: fx.Node) -> fx.Node:
        fake = argument.meta["val"]
        if not _is_cast(fake, device, wanted):
            return argument
        known = cache.get((argument, wanted))
        if known is not None:
            return known
        with node.graph.inserting_before(node):
            made = node.graph.call_function(
                torch.ops.aten._to_copy.default, (argument,), {"dtype": wanted}
            )
        made.meta = {**node.meta, "val": fake.detach().to(wanted)}
        if argument.op == "placeholder":
            cache[argument, wanted] = made
        return made

    node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), cast)


def _is_cast(fake: Any, device: str, wanted: torch.dtype | None) -> bool:
    """Autocast leaves float64 and other devices alone."""
    return (
        isinstance(fake, torch.Tensor)
        and fake.is_floating_point()
        and fake.dtype not in (torch.float64, wanted)
        and fake.device.type == device
    )


def _dtypes(value: Any) -> list[torch.dtype]:
    return [each.dtype for each in tree_leaves(value) if isinstance(each, torch.Tensor)]
