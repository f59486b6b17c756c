"""What is recorded of a place where a model normalises, and of a habit that will hurt it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..options import KINDS

REWRITTEN = "rewritten"
LEFT = "left"


@dataclass(frozen=True)
class Site:
    """One normalisation of one captured graph, and what became of it.

    Attributes:
        kind: the name of the formula, one of ``KINDS``.
        status: ``"rewritten"``, or ``"left"`` where the user's code stays.
        reason: one sentence why it was left; of a rewritten site None or a remark.
        formula: what is computed, a sympy expression in index notation.
        axes: the axes of the normalised tensor that are reduced.
        eps: the constant that keeps the denominator from zero, None where there is none.
        module: qualified name of the module, ``""`` for the root.
        source: where the user wrote it, ``"file.py:123"``.
        lowering: ``"native"``, ``"composite"``, ``"synchronised"``, ``"fold"``, or None where
            nothing was replaced.
        notes: further remarks, one sentence each.
        state: qualified names of the buffers that the site updates.
    """

    kind: str
    status: str
    reason: str | None
    formula: Any  # sympy.Expr, which has no types
    axes: tuple[int, ...]
    eps: float | None
    module: str
    source: str
    lowering: str | None
    notes: tuple[str, ...] = ()
    state: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert self.kind in KINDS, f"kind {self.kind!r} is none of {', '.join(KINDS)}"
        assert self.status in (REWRITTEN, LEFT), f"status {self.status!r} is not rewritten or left"
        assert self.status == REWRITTEN or self.reason, "a site that is left says why"


@dataclass(frozen=True)
class Finding:
    """A pathology of the user's code: its code, what it does and how to mend it, and where it is.

    Attributes:
        code: ``"BNR001"``, the section of docs/findings.md.
        message: cause and fix, for this place.
        source: ``"file.py:123"``, or the qualified name of a buffer where no line is known.
        name: the pathology in words, a key of ``findings.PATHOLOGIES``.
    """

    code: str
    message: str
    source: str
    name: str


@dataclass(frozen=True)
class Kept:
    """Code that is called as the user has it, with no look at the formulas in it.

    Attributes:
        what: the name of what is called, such as ``"autograd.Function"``.
        reason: one sentence why.
        source: ``"file.py:123"``, ``""`` where no line is known.
    """

    what: str
    reason: str
    source: str
