"""The yardstick: three times the error of the user's own code, plus a floor.

    error(optimised) <= 3 error(user) + max(ulp, jitter)              both against float64

An error is the largest absolute difference of an element: a wrong element is wrong however many
right ones surround it. The floor is there because the user's code may be exact by luck.

- ``ulp`` = eps(dtype) times the largest value: one rounding of the result.
- ``jitter`` = how far the result of the user's code moves when every intermediate value moves by
  one unit in the last place or not at all. It is what sums, cancellations (the gradient of a bias
  before a norm is zero but for rounding) and small denominators (a constant channel) make of one
  rounding.

Elements above 2^20 times the median are judged apart: one zero row of an L2 norm has a gradient of
1e12, beside which every other row would pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import first_line
from .report.verdict import Check, Verification
from .trial import Batch, Observation

SLACK = 3.0  # contract C1
OUTLYING = 2.0**20  # times the median; beyond it float32 sums lose the ordinary values
SHAKY = 0.05  # of the largest value: a user's error from which on the yardstick says little


@dataclass(frozen=True)
class Runs:
    """One step of every run; ``jittered`` are the user's code with jittered roundings."""

    user: Observation
    optimised: Observation
    exact: Observation
    jittered: tuple[Observation, ...]

    def value(self, place: str, name: str) -> _Value:
        """One value of an ``Observation``'s dictionary ``place`` in every run."""

        def of(run: Observation) -> Any:
            return getattr(run, place).get(name)

        jittered = tuple(of(each) for each in self.jittered if of(each) is not None)
        return _Value(of(self.user), of(self.optimised), of(self.exact), jittered)


@dataclass(frozen=True)
class _Value:
    user: Any  # Tensor, or None where it is missing
    optimised: Any
    exact: Any
    jittered: tuple[Tensor, ...]

    def wide(self) -> _Value:
        """In float64, complex numbers as two."""
        alike = tuple(_real(each) for each in self.jittered if each.shape == self.user.shape)
        return _Value(_real(self.user), _real(self.optimised), _real(self.exact), alike)

    def with_zeros_like(self, present: Tensor) -> _Value:
        """Zeros in the place of what is missing."""
        found = (self.user, self.optimised, self.exact)
        user, optimised, exact = (
            torch.zeros_like(present) if each is None else each for each in found
        )
        return _Value(user, optimised, exact, self.jittered)


@dataclass
class _Tally:
    """The largest numbers seen of one group of elements of one value."""

    kind: str
    user: float = 0.0
    optimised: float = 0.0
    jitter: float = 0.0
    scale: float = 0.0
    ulp: float = 0.0
    as_wide: bool = False  # as the float64 run

    def check(self, name: str) -> Check:
        # in float64 the user's own error cannot be seen: the oracle rounds as the code does
        user = max(self.user, self.jitter) if self.as_wide else self.user
        bound = SLACK * user + max(self.ulp, self.jitter)
        return Check(name, self.kind, user, self.optimised, bound, self.scale)


class Yardstick:
    """Collects what is wrong, step by step.

    Args:
        parameters: values before the first step, by name; parameters that neither model writes to
            are not compared.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.parameters = parameters
        self._tallies: dict[tuple[str, bool], _Tally] = {}
        self._violations: dict[str, None] = {}  # ordered, each once
        self._notes: dict[str, None] = {}

    def violation(self, sentence: str) -> None:
        """Records what is wrong beside a number."""
        self._violations[sentence] = None

    def note(self, sentence: str) -> None:
        """Records what is worth knowing."""
        self._notes[sentence] = None

    def measure(self, given: Batch, runs: Runs) -> None:
        """Compares one step of all runs."""
        self._compare_results(runs.user, runs.optimised)
        self._compare_history(runs.user, runs.optimised)
        for name in runs.user.outputs:
            if name in runs.optimised.outputs:
                self._compare("output", name, runs.value("outputs", name))
        for name in runs.user.gradients:
            self._compare_gradient(name, runs)
        self._compare_state(runs)
        self._compare_written({**given.leaves, **self.parameters}, runs)

    def judge_exceptions(
        self, step: int, user: Exception | None, optimised: Exception | None
    ) -> None:
        """Where the user's code raises, the optimised model must raise the same; else nothing."""
        what = [
            f"raises {type(each).__name__} ({first_line(each)[:100]})" if each else "does not raise"
            for each in (user, optimised)
        ]
        causes = _with_causes(optimised)
        if user is not None and any(isinstance(each, type(user)) for each in causes):
            self.note(f"both models stop in step {step}: the user's code {what[0]}")
        else:
            self.violation(
                f"in step {step} the user's code {what[0]}, the optimised model {what[1]}"
            )

    def verdict(self, steps: int) -> Verification:
        """The worst group of elements of each value, and all sentences."""
        worst: dict[str, Check] = {}
        for (name, _), tally in self._tallies.items():
            check = tally.check(name)
            if name not in worst or _strain(check) > _strain(worst[name]):
                worst[name] = check
        for check in worst.values():
            if check.kind != "gradient" and check.user > SHAKY * check.scale:
                self.note(
                    f"{check.name}: the user's own error is {check.user:.1e} at values up to "
                    f"{check.scale:.1e}, so the comparison says little of it"
                )
        checks = tuple(worst.values())
        return Verification(checks, tuple(self._violations), tuple(self._notes), steps)

    def _compare_results(self, user: Observation, optimised: Observation) -> None:
        if user.structure != optimised.structure:
            self.violation(
                f"the result has the structure {optimised.structure}, "
                f"the user's code gives {user.structure}"
            )
        for name, value in user.plain.items():
            other = optimised.plain.get(name)
            if not isinstance(value, int | float | complex | str | bytes | type(None)):
                self.note(f"{name} is a {type(value).__name__}, which is not compared")
            elif value != other and not (value != value and other != other):  # NaN is not itself
                self.violation(f"{name} is {other!r}, the user's code gives {value!r}")
        for name in user.outputs.keys() & optimised.outputs.keys():
            if name in user.differentiable - optimised.differentiable:
                self.violation(f"{name} requires no gradient, the user's does")
            if name in optimised.differentiable - user.differentiable:
                self.violation(f"{name} requires a gradient, the user's does not")

    def _compare_history(self, user: Observation, optimised: Observation) -> None:
        for name in sorted(optimised.history):
            if name in user.history:
                self.note(f"{name} carries autograd history, as in the user's code")
            else:
                self.violation(f"{name} carries autograd history, which the user's does not")
        for name in sorted(user.history - optimised.history):
            self.note(f"{name} carries autograd history in the user's code, cut for this run")
        for name in sorted(optimised.rebound - user.rebound):
            self.violation(f"{name} is another tensor object after a step, the user's is not")

    def _compare_gradient(self, name: str, runs: Runs) -> None:
        """A gradient that does not arrive counts as zero, with a note where only one does."""
        if name not in runs.optimised.gradients:
            self.note(f"{name} is not compared, the optimised model has none of that name")
            return
        value = runs.value("gradients", name)
        present = value.user if value.user is not None else value.optimised
        if present is None:
            return
        if value.user is None or value.optimised is None:
            who = "user's code" if value.user is None else "optimised model"
            self.note(f"{name} is None in the {who}, compared as zero")
        self._compare("gradient", name, value.with_zeros_like(present))

    def _compare_state(self, runs: Runs) -> None:
        """Buffers, and attributes of the user's; only a function has no state to compare."""
        if not runs.optimised.copied:
            return
        for name in runs.user.state:
            if name in runs.optimised.state:
                self._compare(name.split(" ")[0], name, runs.value("state", name))
            else:
                self.violation(f"{name} is missing in the optimised model")
        for name in runs.optimised.state.keys() - runs.user.state.keys():
            if name.startswith("buffer"):
                self.violation(f"{name} is not there in the user's model")

    def _compare_written(self, before: Mapping[str, Any], runs: Runs) -> None:
        """Inputs and parameters, where either model wrote to them."""
        for name in runs.user.written:
            value, old = runs.value("written", name), before[name.removesuffix(" afterwards")]
            if value.optimised is None:
                continue
            if not (_unchanged(old, value.user) and _unchanged(old, value.optimised)):
                self._compare("written", name, value)

    def _compare(self, kind: str, name: str, value: _Value) -> None:
        user, optimised = value.user, value.optimised
        for what in ("shape", "dtype", "device"):
            found, wanted = getattr(optimised, what), getattr(user, what)
            if found != wanted:
                shown = (tuple(found), tuple(wanted)) if what == "shape" else (found, wanted)
                self.violation(f"{name} has {what} {shown[0]}, the user's {shown[1]}")
                return
        if not (user.is_floating_point() or user.is_complex()):
            tally = self._tallies.setdefault((name, False), _Tally(kind))
            tally.optimised = max(tally.optimised, _largest(optimised.double() - user.double()))
            return
        if value.exact is None or value.exact.shape != user.shape:
            self.note(f"{name} has another shape in float64 and is not compared")
            return
        wide = value.wide()
        self._compare_exceptional(name, wide)
        self._compare_numbers(kind, name, wide, torch.finfo(user.dtype))

    def _compare_numbers(self, kind: str, name: str, value: _Value, precision: torch.finfo) -> None:
        """Adds the finite elements, ordinary and outlying, to the tallies of this value."""
        user, exact = value.user, value.exact
        finite = user.isfinite() & value.optimised.isfinite() & exact.isfinite()
        size = exact.abs()
        present = size[finite & (size > 0)]
        limit = OUTLYING * float(present.median()) if present.numel() else 0.0
        for outlying in (False, True):
            group = finite & ((size > limit) if outlying else (size <= limit))
            if not group.any():
                continue
            tally = self._tallies.setdefault((name, outlying), _Tally(kind))
            jitters = (_largest((each - user)[group]) for each in value.jittered)
            tally.user = max(tally.user, _largest((user - exact)[group]))
            tally.optimised = max(tally.optimised, _largest((value.optimised - exact)[group]))
            tally.jitter = max(tally.jitter, *jitters, 0.0)
            tally.scale = max(tally.scale, _largest(exact[group]))
            # below the smallest normal number the unit in the last place shrinks no further
            tally.ulp = precision.eps * max(tally.scale, precision.smallest_normal)
            tally.as_wide = precision.bits == 64

    def _compare_exceptional(self, name: str, value: _Value) -> None:
        """NaN and inf stand where the user's code has them, unless only rounding put them there.

        Then float64 is finite, the user's error infinite, and any finite value nearer.
        """
        user, optimised = value.user, value.optimised
        odd = ~user.isfinite()
        same = (user == optimised) | (user.isnan() & optimised.isnan())
        repaired = odd & value.exact.isfinite() & optimised.isfinite()
        fresh = ~odd & ~optimised.isfinite()
        for where, sentence in (
            (odd & ~same & ~repaired, "NaN or inf in the user's code, and other in the optimised"),
            (fresh, "NaN or inf, where the user's code gives finite ones"),
        ):
            if where.any():
                count = f"{int(where.sum())} of {where.numel()}"
                self.violation(f"{name}: {count} values are {sentence}")
        if repaired.any():
            self.note(
                f"{name}: {int(repaired.sum())} of {repaired.numel()} values are finite, as in "
                "float64, where the user's code overflows or cancels to NaN or inf"
            )


def _largest(tensor: Tensor) -> float:
    """The largest finite absolute value; 0 of nothing."""
    finite = tensor[tensor.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _real(tensor: Tensor) -> Tensor:
    dense = tensor if tensor.layout == torch.strided else tensor.to_dense()
    return (torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense).double()


def _unchanged(before: Any, after: Tensor) -> bool:
    """Whether the code left it alone; NaN is equal to itself here."""
    if before.shape != after.shape or before.dtype != after.dtype:
        return False
    same = before == after
    return bool((same | ((before != before) & (after != after))).all())


def _strain(check: Check) -> float:
    if check.optimized == 0:
        return 0.0
    return check.optimized / check.bound if check.bound else float("inf")


def _with_causes(error: BaseException | None) -> list[BaseException]:
    """An exception and what it was raised from: a compiler wraps the user's."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain
