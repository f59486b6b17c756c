"""A module captured alone, for all sizes of its input, and what the algebra reads of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental import _config as symbols

from bnrewrite.algebra import Match, Reading, find, read
from bnrewrite.capture.autocast import ENTER
from bnrewrite.capture.canonical import Canonical, canonicalise
from bnrewrite.capture.hook import own_call
from bnrewrite.capture.rebinding import find_rebindings
from bnrewrite.errors import first_line
from bnrewrite.options import Options
from bnrewrite.oracle import deep_copy
from bnrewrite.passes.rewriting import Rewriting

from .calls import Given
from .record import Unequal

_REGISTRIES = frozenset(vars(nn.Module()))
GRAPHS = 1000  # of one class: one for each width, dtype and set of numbers


@dataclass(frozen=True)
class Alone:
    """The graph of one module in one mode.

    Attributes:
        canonical: the graph.
        reading: the meanings of its tensors.
        norms: the norms in it.
        asked: relations of sizes that its code has asked for.
    """

    canonical: Canonical
    reading: Reading
    norms: list[Match]
    asked: tuple[str, ...]


@dataclass
class Camera:
    """Captures the modules of one class.

    Dynamo's guards say which modules have a graph in common: numbers and widths are among them. In
    torch 2.11 the dimension that is fixed is not: each has a call of its own.
    """

    taken: list[Alone] = field(default_factory=list)
    _last: list[Alone] = field(default_factory=list)
    _runs: dict[int | None, Callable[..., Any]] = field(default_factory=dict)

    def take(
        self, module: nn.Module, given: Given, training: bool, fixed: int | None = None
    ) -> Alone:
        """The graph of a module in a mode, for a tensor of this rank, dtype and device.

        Args:
            module: a copy of it runs.
            given: what it is called with.
            training: the mode.
            fixed: a dimension whose size is a number; all others may be any.

        Raises:
            Unequal: it has none as a whole, or its forward changes more than buffers.
        """
        reason = ""
        shape = tuple(2 if size == 1 and i != 1 else size for i, size in enumerate(given.shape))
        for sizes in dict.fromkeys((shape, given.shape)):
            subject = _trained(module, training)
            x = torch.randn(sizes, device=given.device).to(given.dtype)
            x.requires_grad_(given.dtype.is_floating_point)
            if fixed is not None:
                torch._dynamo.mark_static(x, fixed)
            before = _attributes(subject)
            try:
                found = self._taken(subject, x, fixed)
            except Exception as error:  # whatever the user's code or Dynamo raises
                cause = getattr(error, "inner_exception", error)
                if isinstance(cause, Unequal):
                    raise cause from None
                reason = (
                    f"it cannot be captured as a whole: {first_line(cause) or type(cause).__name__}"
                )
                continue
            after = _attributes(subject)
            changed = [name for name in after if _differs(before.get(name), after[name])]
            if changed:
                raise Unequal(f"its forward sets {', '.join(changed)} beside its buffers")
            return found
        raise Unequal(reason)

    def _taken(self, subject: nn.Module, x: Tensor, fixed: int | None) -> Alone:
        if fixed not in self._runs:
            self._runs[fixed] = torch.compile(
                own_call(), backend=self._backend, dynamic=True, fullgraph=True
            )
        self._last.clear()
        settings = torch._dynamo.config.patch(
            recompile_limit=GRAPHS, accumulated_recompile_limit=GRAPHS, specialize_float=True
        )
        with settings, symbols.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            self._runs[fixed](subject, x)
        if len(self._last) != 1:
            raise Unequal(f"its forward has {len(self._last)} graphs")
        return self._last[0]

    def _backend(self, graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        if any(node.target is ENTER for node in graph.graph.nodes):
            raise Unequal("its forward sets autocast")
        canonical = canonicalise(graph, example_inputs, find_rebindings(graph))
        Rewriting(canonical, Options())  # says on each placeholder what it is
        reading = read(canonical.module.graph, grad_enabled=canonical.grad_enabled)
        norms = find(reading, canonical.module.graph)
        alone = Alone(canonical, reading, norms, _asked(graph))
        self.taken.append(alone)

        def run(*args: Any) -> Any:
            self._last.append(alone)
            return graph.forward(*args)

        return run


def _trained(module: nn.Module, training: bool) -> nn.Module:
    """A copy of which every parameter takes a gradient: a detached one shows."""
    subject = deep_copy(module)
    for parameter in subject.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    for buffer in subject.buffers():
        buffer.detach_()
    return subject.train(training)


def _asked(graph: fx.GraphModule) -> tuple[str, ...]:
    """What the code asks of sizes that may differ from call to call."""
    for node in graph.graph.nodes:
        value = node.meta.get("example_value")
        if node.op == "placeholder" and isinstance(value, torch.Tensor):
            environment: Any = getattr(getattr(value, "fake_mode", None), "shape_env", None)
            if environment is not None:
                fixed = set(environment.replacements)
                return tuple(
                    str(guard.expr)
                    for guard in environment.guards
                    if guard.expr.free_symbols - fixed
                )
    return ()


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What a module has beside parameters, buffers and hooks; containers as they are now."""
    return {
        name: copy.copy(value) if isinstance(value, list | dict | set) else value
        for name, value in vars(module).items()
        if name not in _REGISTRIES
    }


def _differs(before: Any, after: Any) -> bool:
    if before is after:
        return False
    try:
        return isinstance(after, Tensor) or bool(before != after)
    except Exception:  # whatever the comparison of a user's objects raises
        return True
