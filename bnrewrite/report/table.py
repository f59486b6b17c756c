"""A report as a table of plain text, for logs as well as terminals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from .formula import formula_text, short_number
from .site import Site
from .text import rendered

if TYPE_CHECKING:
    from .report import Report


def report_text(report: Report, width: int) -> str:
    """Totals, one row per site, the findings, and what is kept as it is.

    Args:
        report: what to print.
        width: columns; lines are never longer.

    Raises:
        ValueError: narrower than the table can be.
    """
    parts: list[RenderableType] = [Text(summary(report))]
    if report.sites:
        parts.append(_sites(report.sites))
    if report.findings:
        rows = [
            (f"{each.code} {each.name}\n{each.source}", each.message) for each in report.findings
        ]
        parts.append(_rows("finding", "cause; fix", rows))
    if report.kept:
        rows = [(f"{each.what}\n{each.source}", each.reason) for each in report.kept]
        parts.append(_rows("kept as it is", "why", rows))
    return rendered(parts, width)


def summary(report: Report) -> str:
    """The totals as one sentence."""
    totals = report.totals
    kinds = ", ".join(f"{len(sites)} {kind}" for kind, sites in report.by_kind().items())
    sentence = (
        f"{counted(totals['sites'], 'norm')}{f' ({kinds})' if kinds else ''}: "
        f"{totals['rewritten']} rewritten, {totals['left']} left"
    )
    if report.findings:
        sentence += f"; {counted(totals['findings'], 'finding')}"
    if report.kept:
        sentence += f"; {len(report.kept)} kept as it is"
    if report.graphs:
        breaks = f", {counted(report.graph_breaks, 'break')}" if report.graph_breaks else ""
        sentence += f"; {counted(report.graphs, 'graph')}{breaks}"
    return sentence


def counted(number: int, noun: str) -> str:
    """``1 norm``, ``2 norms``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def shown_axes(axes: tuple[int, ...]) -> str:
    """``0, 2, 3``."""
    return ", ".join(str(axis) for axis in axes)


def shown_eps(eps: float | None) -> str:
    """The eps as Python writes it; a dash where there is none."""
    return "-" if eps is None else short_number(eps)


def remarks(site: Site) -> tuple[str, ...]:
    """The reason, the notes, and the buffers that the site updates."""
    lines = [site.reason] if site.reason else []
    lines += site.notes
    if site.state:
        lines.append(f"updates {', '.join(site.state)}")
    return tuple(lines)


def _sites(sites: list[Site]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, expand=True)
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("site", overflow="fold", ratio=3)
    table.add_column("formula", overflow="fold", ratio=5)
    table.add_column("axes", overflow="fold", max_width=10)
    table.add_column("eps", overflow="fold", max_width=8)
    table.add_column("status", overflow="fold", max_width=10)
    for number, site in enumerate(sites):
        place = [site.kind, site.module or "(root)", site.source]
        told = [formula_text(site.formula), *(f"- {remark}" for remark in remarks(site))]
        table.add_row(
            str(number),
            Text("\n".join(place)),  # Text: square brackets of a name are no markup
            Text("\n".join(told)),
            shown_axes(site.axes),
            shown_eps(site.eps),
            "\n".join(line for line in (site.status, site.lowering) if line),
        )
    return table


def _rows(left: str, right: str, rows: Sequence[tuple[str, str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, expand=True)
    table.add_column(left, overflow="fold", ratio=2)
    table.add_column(right, overflow="fold", ratio=6)
    for place, told in rows:
        table.add_row(Text(place), Text(told))
    return table
