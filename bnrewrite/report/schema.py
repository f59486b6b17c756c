"""A report as JSON, in a form that stays.

    {"schema": "bnrewrite.report", "version": 2,
     "totals": {"sites": 1, "rewritten": 1, ...},
     "sites": [{"number": 0, "kind": "batch_norm", "status": "rewritten", ...}],
     "findings": [{"code": "BNR001", "message": "...", "source": "net.py:12",
                   "name": "buffer-rebound"}],
     "kept": [{"what": "autograd.Function", "reason": "...", "source": "net.py:40"}],
     "graph_texts": [{"before": "...", "after": "..."}]}

A field is never removed or given another meaning without a new version; new fields may come.
Version 1 had the name of a finding as its code.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .formula import formula_text
from .site import Site

if TYPE_CHECKING:
    from .report import Report

SCHEMA = "bnrewrite.report"
VERSION = 2


def report_json(report: Report) -> str:
    """The report as a JSON text; formulas are text, a site's number is its place."""
    record = {
        "schema": SCHEMA,
        "version": VERSION,
        "totals": report.totals,
        "sites": [_site(number, site) for number, site in enumerate(report.sites)],
        "findings": [asdict(finding) for finding in report.findings],
        "kept": [asdict(each) for each in report.kept],
        "graph_texts": [{"before": before, "after": after} for before, after in report.graph_texts],
    }
    return json.dumps(record, indent=2, allow_nan=False)


def _site(number: int, site: Site) -> dict[str, Any]:
    eps = None if site.eps is None else float(site.eps)
    return {
        "number": number,
        "kind": site.kind,
        "status": site.status,
        "reason": site.reason,
        "formula": formula_text(site.formula),
        "axes": [int(axis) for axis in site.axes],
        "eps": eps if eps is None or math.isfinite(eps) else str(eps),
        "module": site.module,
        "source": site.source,
        "lowering": site.lowering,
        "notes": list(site.notes),
        "state": list(site.state),
    }
