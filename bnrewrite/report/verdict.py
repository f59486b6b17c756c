"""The verdict on an optimised model: one check per value that a user can see."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from .text import WIDTH, rendered


@dataclass(frozen=True)
class Check:
    """One value, over all steps, against the float64 run of the user's code.

    Errors are the largest absolute difference of an element from float64.

    Attributes:
        name: ``"output[0]"``, ``"gradient of bn.weight"``, ``"buffer bn.running_mean"``, ...
        kind: ``"output"``, ``"gradient"``, ``"buffer"``, ``"attribute"`` or ``"written"`` (an
            input or parameter that the code itself wrote to).
        user: error of the user's code.
        optimized: error of the optimised model.
        bound: how large ``optimized`` may be.
        scale: largest absolute value of the float64 result.
    """

    name: str
    kind: str
    user: float
    optimized: float
    bound: float
    scale: float

    @property
    def ok(self) -> bool:
        """Whether the value is as near to float64 as it must be."""
        return self.optimized <= self.bound


@dataclass(frozen=True)
class Verification:
    """What ``verify`` found; true in an ``if`` or ``assert`` where the contract holds.

    Attributes:
        checks: one per value, numbers.
        violations: one sentence each of what is wrong beside numbers: shapes, dtypes, NaN, keys,
            autograd history, exceptions.
        notes: one sentence each of what is worth knowing and not wrong.
        steps: how many steps ran.
    """

    checks: tuple[Check, ...]
    violations: tuple[str, ...]
    notes: tuple[str, ...]
    steps: int

    @property
    def ok(self) -> bool:
        """Whether every check passed and nothing else is wrong."""
        return not self.violations and all(check.ok for check in self.checks)

    @property
    def failures(self) -> tuple[str, ...]:
        """Everything that is wrong, one sentence each."""
        numbers = tuple(
            f"{check.name}: error {check.optimized:.2e}, the bound is {check.bound:.2e} "
            f"(error of the user's code: {check.user:.2e})"
            for check in self.checks
            if not check.ok
        )
        return self.violations + numbers

    def __bool__(self) -> bool:
        return self.ok

    def __iter__(self) -> Iterator[Check]:
        return iter(self.checks)

    def __getitem__(self, name: str) -> Check:
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(f"{name!r} was not compared; there are {[each.name for each in self]}")

    def __str__(self) -> str:
        return self.to_text()

    def to_text(self, width: int = WIDTH) -> str:
        """The verdict, a row per value, what is wrong, and the notes; at most ``width`` columns.

        Raises:
            ValueError: narrower than a table can be.
        """
        parts: list[RenderableType] = [Text(self._headline())]
        if self.checks:
            parts.append(self._table())
        parts += [Text(f"wrong: {sentence}") for sentence in self.violations]
        parts += [Text(f"note: {sentence}") for sentence in self.notes]
        return rendered(parts, width)

    def _headline(self) -> str:
        word = "ok" if self.ok else "NOT equal"
        failed = len(self.failures)
        steps = f"{self.steps} step{'' if self.steps == 1 else 's'}"
        told = f", {failed} wrong" if failed else ""
        return f"verification {word}: {len(self.checks)} values over {steps}{told}"

    def _table(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        table.add_column("value", overflow="fold")
        for name in ("user's error", "optimised", "bound"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("")
        for check in self.checks:
            numbers = (f"{x:.1e}" for x in (check.user, check.optimized, check.bound))
            table.add_row(Text(check.name), *numbers, "ok" if check.ok else "WRONG")
        return table
