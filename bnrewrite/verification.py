"""Does an optimised model compute what the user's code computes?

    error(optimised) <= 3 error(user's code) + floor            both against float64

for every output, every gradient of an input or parameter under a random cotangent, and every
buffer, over several steps. docs/verification.md says what the yardstick means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .oracle import WIDER, Jitter, Widen
from .report.verdict import Check, Verification
from .trial import Batch, Observation, Trial, first_batch, further_batch, plain_name
from .yardstick import Runs, Yardstick

__all__ = ["Check", "Verification", "verify"]

JITTERS = 2  # runs of the user's code with jittered roundings
STRIDE = 7919  # between the seeds of two steps


def verify(
    original: Callable[..., Any],
    optimized: Callable[..., Any],
    *inputs: Any,
    steps: int = 3,
    seed: int = 0,
    kwargs: Mapping[str, Any] | None = None,
) -> Verification:
    """Runs both models, and the original in float64, side by side and compares all that they show.

    Copies of modules run, in the mode (train or eval) that each module is in; neither model, no
    gradient, no buffer and no random generator is changed. A function cannot be copied: it runs
    itself, and only its outputs and input gradients are compared. The first step takes the inputs
    as given, later ones fresh inputs made from them. Buffers are carried from step to step.

    Args:
        original: the user's model, with the weights of the other: ``copy.deepcopy(model)`` from
            before ``optimize(model)``. Its own code runs, also where it is compiled.
        optimized: what should compute the same.
        inputs: positional arguments of the model, tensors or nested; floating ones get gradients.
        steps: how many forwards and backwards.
        seed: of later inputs, cotangents and the model's own random numbers.
        kwargs: keyword arguments of the model.

    Returns:
        A ``Verification``; ``.ok`` says whether the contract holds, ``print`` shows every value.

    Raises:
        TypeError: a model is not callable.
        ValueError: fewer than one step, one object given twice, models whose weights or modes
            differ from the start, or one compiled in a way that copies forget.
        RuntimeError: the user's code runs, but not in float64.
    """
    _check_arguments(original, optimized, steps)
    parameters = _check_same_start(original, optimized)
    batch = first_batch(inputs, kwargs or {})
    yardstick = Yardstick(parameters)
    _compare_keys(original, optimized, yardstick)
    models = _Models(original, optimized, _drawn_dtype(original, batch))
    source = torch.Generator().manual_seed(seed)
    for step in range(steps):
        given = batch if step == 0 else further_batch(batch, source)
        runs = models.step(given, seed + STRIDE * step)
        if runs.user.raised or runs.optimised.raised:
            yardstick.judge_exceptions(step, runs.user.raised, runs.optimised.raised)
            return yardstick.verdict(step + 1)
        yardstick.measure(given, runs)
    return yardstick.verdict(steps)


class _Models:
    """The runs that are compared, in lockstep: user's, optimised, float64, jittered."""

    def __init__(
        self, original: Callable[..., Any], optimized: Callable[..., Any], drawn: torch.dtype
    ) -> None:
        self._user = Trial(original, modes=(_eagerly,))
        self._optimised = Trial(optimized)
        _check_stays_compiled(optimized, self._optimised.module)
        self._exact = Trial(original, wide=True, modes=(_eagerly, partial(Widen, drawn)))
        self._jittered = [
            Trial(original, modes=(_eagerly, partial(Jitter, seed))) for seed in range(JITTERS)
        ]

    def step(self, given: Batch, seed: int) -> Runs:
        """One step of every run; the float64 ones only where the two models came through."""
        user = self._user.step(given, None, seed)
        optimised = self._optimised.step(given, user.cotangents, seed)
        if user.raised or optimised.raised:
            return Runs(user, optimised, Observation(), ())
        exact = self._exact.step(given, user.cotangents, seed)
        if exact.raised:
            raise RuntimeError(
                f"the float64 run of the original raised {type(exact.raised).__name__}: "
                f"{exact.raised}; verify needs a model that also runs in float64"
            ) from exact.raised
        jittered = [trial.step(given, user.cotangents, seed) for trial in self._jittered]
        return Runs(user, optimised, exact, tuple(each for each in jittered if not each.raised))


def _eagerly() -> Any:
    """Inside, the user's code itself runs, also where the original is compiled."""
    return torch.compiler.set_stance("force_eager")


def _drawn_dtype(original: object, batch: Batch) -> torch.dtype:
    """The dtype in which the user's code most likely draws random numbers: that of its inputs."""
    parameters = original.parameters() if isinstance(original, nn.Module) else ()
    for tensor in (*batch.leaves.values(), *parameters):
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            return tensor.dtype
    return torch.get_default_dtype()


def _check_arguments(original: object, optimized: object, steps: int) -> None:
    for name, model in (("original", original), ("optimized", optimized)):
        if not callable(model):
            raise TypeError(
                f"{name} is a {type(model).__name__}; verify takes modules or functions"
            )
    if original is optimized:
        raise ValueError(
            "original and optimized are the same object: optimize() changes the model in place; "
            "keep copy.deepcopy(model) from before and pass that as original"
        )
    if steps < 1:
        raise ValueError(f"steps is {steps}; at least 1 step must run")


def _check_same_start(original: object, optimized: object) -> dict[str, Tensor]:
    """Different weights would look like a wrong rewrite of every norm.

    Returns:
        The parameters of the original, by name.
    """
    if not isinstance(original, nn.Module):
        return {}
    if isinstance(optimized, nn.Module):
        others = dict(_tensors(optimized))
        for name, mine in _tensors(original):
            other = others.get(name)
            if other is not None and not _equal(mine, other):
                raise ValueError(
                    f"{name} differs between original and optimized before the first step; load "
                    "one state_dict into both, or copy the model before it is optimised"
                )
        modes = {_module_name(name): each.training for name, each in optimized.named_modules()}
        for name, module in original.named_modules():
            if modes.get(_module_name(name), module.training) != module.training:
                raise ValueError(
                    f"module {name or '(root)'} has training={module.training} in original and "
                    f"{not module.training} in optimized; put both in the same mode"
                )
    return {plain_name(name): each.detach() for name, each in original.named_parameters()}


def _check_stays_compiled(optimized: object, copied: nn.Module | None) -> None:
    """A copy must run what the model runs; ``nn.Module.compile`` does not survive copying."""
    if not isinstance(optimized, nn.Module) or copied is None:
        return
    copies = dict(copied.named_modules())
    for name, module in optimized.named_modules():
        if _is_compiled(module) and not _is_compiled(copies[name]):
            raise ValueError(
                f"module {name or '(root)'} of optimized was compiled in place, which a copy "
                "forgets; pass torch.compile(module, ...) or bnrewrite.optimize(module)"
            )


def _is_compiled(module: nn.Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None


def _compare_keys(original: object, optimized: object, yardstick: Yardstick) -> None:
    if isinstance(original, nn.Module) and isinstance(optimized, nn.Module):
        mine = [plain_name(key) for key in original.state_dict()]
        other = [plain_name(key) for key in optimized.state_dict()]
        for key in sorted(set(mine) ^ set(other)):
            has, lacks = ("user's", "optimised") if key in mine else ("optimised", "user's")
            yardstick.violation(f"state_dict key {key} is in the {has} model, not in the {lacks}")


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in module.named_parameters():
        yield f"parameter {plain_name(name)}", parameter
    for name, buffer in module.named_buffers():
        yield f"buffer {plain_name(name)}", buffer


def _equal(left: Tensor, right: Tensor) -> bool:
    """Of one kind and with the same values, NaN included."""
    if (left.shape, left.dtype, left.device) != (right.shape, right.dtype, right.device):
        return False
    if left.layout != torch.strided or left.dtype not in (*WIDER, torch.float64):
        return bool(torch.equal(left, right))
    return bool(torch.allclose(left.detach(), right.detach(), rtol=0, atol=0, equal_nan=True))


def _module_name(name: str) -> str:
    return plain_name(f"{name}.").rstrip(".")
