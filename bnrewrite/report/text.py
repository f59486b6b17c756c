"""Tables as plain text, for logs as well as terminals."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich.console import Console, RenderableType

WIDTH = 110  # formulas of a batch norm fit two lines
NARROWEST = 60


def rendered(parts: Sequence[RenderableType], width: int) -> str:
    """Plain text without escape codes, whatever the terminal; no line longer than ``width``.

    Raises:
        ValueError: narrower than a table can be.
    """
    if width < NARROWEST:
        raise ValueError(f"width is {width}, a table needs at least {NARROWEST} columns")
    console = Console(
        file=io.StringIO(),
        width=width,
        color_system=None,
        force_terminal=False,
        legacy_windows=False,
    )
    with console.capture() as captured:
        for part in parts:
            console.print(part)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())
