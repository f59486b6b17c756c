"""What became of each norm module of a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text
from torch import nn

from bnrewrite.report.text import WIDTH, rendered


class Unequal(Exception):
    """A module is not proven equal to a native one; the text says why, one sentence."""


class UnequalSizes(Unequal):
    """... for sizes that are not known; it may be equal where one of them is fixed."""


@dataclass(frozen=True)
class Outcome:
    """One hand-written norm module.

    Attributes:
        name: its qualified name, the first where it has several; "" for the model itself.
        written: the name of the user's class.
        native: the module that has taken its place, as `repr` gives it; None where it stays.
        reason: why it stays, one sentence; None where it was converted.
    """

    name: str
    written: str
    native: str | None
    reason: str | None


@dataclass(frozen=True)
class Conversion:
    """The converted model and what became of its norm modules.

    Attributes:
        model: what was given; the native module, where the model itself was a norm.
        outcomes: one for each hand-written module in which a norm was found.
    """

    model: nn.Module
    outcomes: tuple[Outcome, ...]

    @property
    def converted(self) -> tuple[Outcome, ...]:
        """The modules that are native now."""
        return tuple(each for each in self.outcomes if each.native is not None)

    @property
    def left(self) -> tuple[Outcome, ...]:
        """The modules that stay as they are, each with its reason."""
        return tuple(each for each in self.outcomes if each.native is None)

    def __iter__(self) -> Iterator[Outcome]:
        return iter(self.outcomes)

    def __len__(self) -> int:
        return len(self.outcomes)

    def __bool__(self) -> bool:
        return True  # an empty record is still a record

    def __str__(self) -> str:
        return self.to_text()

    def to_text(self, width: int = WIDTH) -> str:
        """A row per module; at most ``width`` columns wide.

        Raises:
            ValueError: narrower than a table can be.
        """
        title = f"{len(self.converted)} of {len(self.outcomes)} hand-written norm modules converted"
        if not self.outcomes:
            return rendered([Text(title)], width)
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, expand=True)
        for name, ratio in (("module", 3), ("class", 2), ("becomes, or why it stays", 6)):
            table.add_column(name, overflow="fold", ratio=ratio)
        for each in self.outcomes:
            told = each.native or f"stays: {each.reason}"
            table.add_row(Text(each.name or "(root)"), Text(each.written), Text(told))
        return rendered([Text(title), table], width)
