"""`convert`: hand-written norm modules become native ones, where that is proven."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from bnrewrite.capture.explain import explain
from bnrewrite.oracle import deep_copy
from bnrewrite.verification import verify

from .alone import Alone, Camera
from .calls import Calls, Given, calls_of, tensors_of
from .candidates import candidates, check_nothing_is_dropped
from .natives import Native, native_of
from .proof import formula_of
from .record import Conversion, Outcome, Unequal, UnequalSizes
from .tensors import built


def convert(model: nn.Module, *example_inputs: Any, **kwargs: Any) -> Conversion:
    """Replace the hand-written norm modules of a model, in place, by native modules.

    A module becomes an `nn.BatchNorm2d` (1d, 3d), `nn.LayerNorm`, `nn.RMSNorm`, `nn.GroupNorm` or
    `nn.InstanceNorm2d` (1d, 3d) only where the algebra proves it equal in training and in
    evaluation, for all sizes of its input: captured alone it is one norm, with the native module's
    updates of its statistics, and nothing else. Parameters and buffers are the same objects, under
    the same names; checkpoints go both ways. Everything else stays, with a reason.

    Args:
        model: a module; the model itself, if it is a norm, comes back as `.model`.
        example_inputs: positional arguments of a call; a copy of the model is called with them.
        kwargs: keyword arguments of the call.

    Returns:
        The model, and what became of each hand-written norm; `print` shows it.

    Raises:
        TypeError: the model is no module, or cannot be copied.
        Exception: whatever the model raises when it is called in evaluation.
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"convert takes a torch.nn.Module, not a {type(model).__name__}")
    with torch.random.fork_rng():
        return _conversion(model, example_inputs, kwargs)


def _conversion(model: nn.Module, example_inputs: Any, kwargs: Any) -> Conversion:
    found = dict(candidates(model))
    calls = calls_of(model, list(found), example_inputs, kwargs) if found else {}
    proofs: dict[type, _Proofs] = {}
    norms = _Norms(model, example_inputs, kwargs)
    outcomes: list[Outcome] = []
    natives: dict[nn.Module, nn.Module] = {}
    for name, module in found.items():
        proof = proofs.setdefault(type(module), _Proofs())
        outcome = _converted(name, module, calls, proof, norms, natives)
        if outcome is not None:
            outcomes.append(outcome)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in natives:
                parent._modules[name] = natives[child]
    return Conversion(natives.get(model, model), tuple(outcomes))


def _converted(
    name: str,
    module: nn.Module,
    calls: Calls,
    proofs: _Proofs,
    norms: _Norms,
    natives: dict[nn.Module, nn.Module],
) -> Outcome | None:
    """What becomes of a module; None where there is no norm in it."""
    written = type(module).__name__
    try:
        given = tensors_of(calls[name])
        check_nothing_is_dropped(module)
        kinds = [proofs.native(module, each) for each in given]
        if any(each != kinds[0] for each in kinds):
            raise Unequal("it is another norm for tensors of another rank")
        native = built(kinds[0], module)
        proofs.check(module, native, given[0])
    except Unequal as reason:
        taken = proofs.camera.taken
        if not (any(each.norms for each in taken) if taken else name in norms.modules):
            return None
        return Outcome(name, written, None, str(reason))
    natives[module] = native
    return Outcome(name, written, f"{type(native).__name__}({native.extra_repr()})", None)


@dataclass
class _Norms:
    """Where there are norms at all: so that something is said of modules that are not captured."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @cached_property
    def modules(self) -> set[str]:
        """The modules in which norms are written."""
        return {site.module for site in explain(self.model, *self.args, **self.kwargs).sites}


@dataclass
class _Proofs:
    """Of the modules of one class."""

    camera: Camera = field(default_factory=Camera)
    _known: dict[tuple[int, ...], Native | Unequal] = field(default_factory=dict)
    _checked: set[str] = field(default_factory=set)

    def native(self, module: nn.Module, given: Given) -> Native:
        """The native module that a module is equal to.

        Raises:
            Unequal: there is none, or it is not proven.
        """
        reasons: list[Unequal] = []
        for fixed in (None, 1, len(given.shape) - 1):
            known = self._at(module, given, fixed)
            if isinstance(known, Native):
                return known
            reasons.append(known)
            if not isinstance(known, UnequalSizes):
                break  # no size is what it lacks
        *_, reason = [reasons[0], *(each for each in reasons if type(each) is Unequal)]
        raise reason

    def _at(self, module: nn.Module, given: Given, fixed: int | None) -> Native | Unequal:
        pair = [self.camera.take(module, given, training, fixed) for training in (True, False)]
        key = tuple(map(id, pair))
        if key not in self._known:
            self._known[key] = _proven(*pair)
        return self._known[key]

    def check(self, module: nn.Module, native: nn.Module, given: Given) -> None:
        """Run a module and its native one, once for each kind: a proof may be wrong too.

        Raises:
            Unequal: they differ.
        """
        kind = f"{native} {given}"
        if kind in self._checked or not given.dtype.is_floating_point:
            return
        x = torch.randn(given.shape, device=given.device).to(given.dtype)
        for training in (True, False):
            pair = [deep_copy(each).train(training) for each in (module, native)]
            found = verify(*pair, x, steps=2)
            if not found and not any("raised" in each for each in found.violations):
                raise Unequal(f"it does not give the native values: {found.failures[0]}")
            if not _ignores_gradients(pair[0], x):
                raise Unequal("it computes something else where no gradients are recorded")
        self._checked.add(kind)


def _proven(training: Alone, evaluation: Alone) -> Native | Unequal:
    try:
        formulas = formula_of(training), formula_of(evaluation)
        return native_of(training.reading.ring, *formulas)
    except Unequal as reason:
        return reason


def _ignores_gradients(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether a module, of which a copy runs, gives the same with and without gradients."""
    with torch.no_grad():
        without = deep_copy(module)(x)
    try:
        torch.testing.assert_close(without, deep_copy(module)(x), rtol=0, atol=0, equal_nan=True)
    except AssertionError:
        return False
    return True
