"""The record of one look at a model: every site, every pathology, and the totals.

``print`` gives a table, ``to_json`` a stable schema, ``to_html`` one self-contained page.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .page import report_page
from .schema import report_json
from .site import LEFT, REWRITTEN, Finding, Kept, Site
from .table import report_text
from .text import WIDTH


@dataclass
class Report:
    """What was found in a model and what became of it.

    Attributes:
        sites: every norm, in the order of the graphs; a site's number is its place here.
        findings: pathologies of the code that was read.
        graphs: how many graphs were captured.
        graph_breaks: at how many places the capture had to stop and start again.
        graph_texts: optionally the (before, after) text of each graph, shown in the HTML page.
        kept: what is called as the user's code has it, because its formulas cannot be read.
    """

    sites: list[Site] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    graphs: int = 0
    graph_breaks: int = 0
    graph_texts: list[tuple[str, str]] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)

    @property
    def rewritten(self) -> list[Site]:
        """The sites that were replaced."""
        return [site for site in self.sites if site.status == REWRITTEN]

    @property
    def refusals(self) -> list[Site]:
        """The sites that stay the user's code, each with its reason."""
        return [site for site in self.sites if site.status == LEFT]

    @property
    def totals(self) -> dict[str, int]:
        """Counts: sites, rewritten, left, findings, kept, graphs, graph_breaks."""
        return {
            "sites": len(self.sites),
            "rewritten": len(self.rewritten),
            "left": len(self.refusals),
            "findings": len(self.findings),
            "kept": len(self.kept),
            "graphs": self.graphs,
            "graph_breaks": self.graph_breaks,
        }

    def by_kind(self) -> dict[str, list[Site]]:
        """The sites of each kind that occurs, the most frequent kind first."""
        counts = Counter(site.kind for site in self.sites)
        return {
            kind: [site for site in self.sites if site.kind == kind]
            for kind, _ in counts.most_common()
        }

    def to_text(self, width: int = WIDTH) -> str:
        """The table as plain text, at most ``width`` columns wide."""
        return report_text(self, width)

    def to_json(self) -> str:
        """The report as JSON; ``schema`` and ``version`` name the form, see ``report.schema``."""
        return report_json(self)

    def to_html(self, path: str | Path | None = None) -> str:
        """One page without external resources; written to ``path`` where one is given."""
        page = report_page(self)
        if path is not None:
            Path(path).write_text(page, encoding="utf-8")
        return page

    def __len__(self) -> int:
        return len(self.sites)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __getitem__(self, number: int) -> Site:
        return self.sites[number]

    def __bool__(self) -> bool:
        return True  # an empty report is still a report: `if report:` must not ask for its length

    def __str__(self) -> str:
        return self.to_text()

    def _repr_html_(self) -> str:
        return self.to_html()
