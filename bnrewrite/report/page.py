"""A report as one HTML page: light, self-contained, formulas in MathML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from .formula import formula_mathml, formula_text
from .site import LEFT, Site
from .table import remarks, shown_axes, shown_eps, summary

if TYPE_CHECKING:
    from .report import Report

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1c2430; background: #fff;
       max-width: 78rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .5rem .7rem;
         border-bottom: 1px solid #dfe3e8; }
th { background: #f4f6f8; font-weight: 600; }
td.formula { font-size: 1.1rem; } td.formula ul { font-size: .9rem; margin: .4rem 0 0;
             padding-left: 1.1rem; color: #4a5565; }
code, pre { font: 13px/1.4 ui-monospace, monospace; }
small { color: #5b6675; }
.rewritten { color: #116329; font-weight: 600; } .left { color: #8a4b00; font-weight: 600; }
.graphs { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
pre { background: #f4f6f8; padding: .7rem; overflow: auto; max-height: 40rem; }
"""


def report_page(report: Report) -> str:
    """The whole page; every text of the user's is escaped."""
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width">',
        f"<title>bnrewrite report</title><style>{STYLE}</style></head><body>",
        f"<h1>Normalisations</h1>\n<p>{escape(summary(report))}</p>",
        _sites(report.sites),
        _findings(report),
        _kept(report),
        _graphs(report.graph_texts),
        "</body></html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _sites(sites: list[Site]) -> str:
    rows = [_row(number, site) for number, site in enumerate(sites)]
    return _table(("#", "kind", "where", "formula", "axes", "eps", "status"), rows)


def _table(names: Sequence[str], rows: Sequence[str]) -> str:
    """Rows under their names; nothing where there are none."""
    if not rows:
        return ""
    head, body = "".join(f"<th>{name}</th>" for name in names), "\n".join(rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def _row(number: int, site: Site) -> str:
    said = "".join(f"<li>{escape(remark)}</li>" for remark in remarks(site))
    where = f"{escape(site.module or '(root)')}<br><code>{escape(site.source)}</code>"
    becomes = "" if site.status == LEFT else f"<br><small>{escape(site.lowering or '')}</small>"
    title = escape(formula_text(site.formula), quote=True)  # to copy, and where MathML is not shown
    formula = f'<span title="{title}">{formula_mathml(site.formula)}</span>'
    return (
        f'<tr id="site-{number}"><td>{number}</td><td>{escape(site.kind)}</td><td>{where}</td>'
        f'<td class="formula">{formula}{f"<ul>{said}</ul>" if said else ""}</td>'
        f"<td>{shown_axes(site.axes)}</td><td>{shown_eps(site.eps)}</td>"
        f'<td><span class="{site.status}">{site.status}</span>{becomes}</td></tr>'
    )


def _findings(report: Report) -> str:
    said = [(f"{each.code} {each.name}", each.message, each.source) for each in report.findings]
    return _sentences("Findings", ("finding", "cause; fix", "where"), said)


def _kept(report: Report) -> str:
    said = [(each.what, each.reason, each.source) for each in report.kept]
    return _sentences("Kept as it is", ("kept", "why", "where"), said)


def _sentences(title: str, names: Sequence[str], said: Sequence[tuple[str, str, str]]) -> str:
    """A table of sentences, each behind a name and before a place in the user's code."""
    rows = [
        f"<tr><td><code>{escape(name)}</code></td><td>{escape(sentence)}</td>"
        f"<td><code>{escape(source)}</code></td></tr>"
        for name, sentence, source in said
    ]
    table = _table(names, rows)
    return f"<h2>{title}</h2>\n{table}" if table else ""


def _graphs(texts: list[tuple[str, str]]) -> str:
    panels = "\n".join(
        f'<details><summary>graph {number}</summary><div class="graphs">'
        f"<div>before<pre>{escape(before)}</pre></div>"
        f"<div>after<pre>{escape(after)}</pre></div></div></details>"
        for number, (before, after) in enumerate(texts)
    )
    return f"<h2>Graphs</h2>\n{panels}" if panels else ""
