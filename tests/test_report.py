"""The report as people and programs read it."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import sympy

from bnrewrite.report import PATHOLOGIES, Finding, Kept, Report, Site, pathology
from bnrewrite.report.formula import formula_mathml, formula_text

N, C, H, W = sympy.symbols("n c h w")
X = sympy.Function("x")(N, C, H, W)
M = sympy.Function("M")(C)
V = sympy.Function("V", nonnegative=True)(C)
BATCH_NORM = sympy.Function("bn1.weight")(C) * (X - M) / sympy.sqrt(V + sympy.Float(1e-5))


def batch_norm(**changes: Any) -> Site:
    fields: dict[str, Any] = {
        "kind": "batch_norm",
        "status": "rewritten",
        "reason": None,
        "formula": BATCH_NORM,
        "axes": (0, 2, 3),
        "eps": 1e-5,
        "module": "bn1",
        "source": "net.py:12",
        "lowering": "native",
        "state": ("bn1.running_mean", "bn1.running_var"),
    }
    return Site(**(fields | changes))


LEFT_ALONE = batch_norm(
    kind="general",
    status="left",
    reason="reduces over [0, 2] <batch> norm over [0, 2, 3]",
    formula=X / (V + M**2),
    eps=None,
    module="",
    lowering=None,
    state=(),
)


@pytest.fixture
def report() -> Report:
    return Report(
        sites=[batch_norm(), LEFT_ALONE, batch_norm(module="bn2")],
        findings=[pathology("buffer-rebound", "net.py:12", "running_mean")],
        graphs=2,
        graph_breaks=1,
        graph_texts=[("a < b", "c & d")],
        kept=[Kept("autograd.Function", "its backward is <yours>", "net.py:40")],
    )


def test_lookups(report: Report) -> None:
    assert len(report) == 3
    assert report[1] is LEFT_ALONE
    assert report.refusals == [LEFT_ALONE]
    assert [site.module for site in report.rewritten] == ["bn1", "bn2"]
    assert {kind: len(sites) for kind, sites in report.by_kind().items()} == {
        "batch_norm": 2,
        "general": 1,
    }
    assert report.totals == {
        "sites": 3,
        "rewritten": 2,
        "left": 1,
        "findings": 1,
        "kept": 1,
        "graphs": 2,
        "graph_breaks": 1,
    }


def test_an_empty_report_is_still_a_report() -> None:
    empty = Report()
    assert empty
    assert len(empty) == 0
    assert str(empty) == "0 norms: 0 rewritten, 0 left"
    assert json.loads(empty.to_json())["sites"] == []
    assert "<table>" not in empty.to_html()


def test_table_shows_every_field(report: Report) -> None:
    text = report.to_text(width=180)
    assert text.splitlines()[0] == (
        "3 norms (2 batch_norm, 1 general): 2 rewritten, 1 left; 1 finding; 1 kept as it is; "
        "2 graphs, 1 break"
    )
    for shown in (
        "batch_norm", "bn1", "net.py:12", "0, 2, 3", "1e-05", "native", "rewritten", "left",
        "(x(n, c, h, w) - M(c))*bn1.weight(c)/sqrt(V(c)", "(root)", "<batch>", "[0, 2, 3]",
        "updates bn1.running_mean", "BNR001 buffer-rebound", "self.buffer.copy_(value.detach())",
        "autograd.Function", "its backward is <yours>", "net.py:40",
    ):  # fmt: skip
        assert shown in text, shown


@pytest.mark.parametrize("width", [60, 80, 110, 200])
def test_table_keeps_its_width_and_needs_no_terminal(
    report: Report, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal elsewhere must not colour a log
    monkeypatch.setenv("COLUMNS", "20")
    text = report.to_text(width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "\x1b" not in text


def test_too_narrow_a_table_is_refused(report: Report) -> None:
    with pytest.raises(ValueError, match="width is 20, a table needs at least 60"):
        report.to_text(20)


def test_json_has_a_stable_form(report: Report) -> None:
    record = json.loads(report.to_json())
    assert (record["schema"], record["version"]) == ("bnrewrite.report", 2)
    assert list(record)[:3] == ["schema", "version", "totals"]
    assert list(record)[3:] == ["sites", "findings", "kept", "graph_texts"]
    assert record["sites"][0] == {
        "number": 0,
        "kind": "batch_norm",
        "status": "rewritten",
        "reason": None,
        "formula": "(x(n, c, h, w) - M(c))*bn1.weight(c)/sqrt(V(c) + 1e-05)",
        "axes": [0, 2, 3],
        "eps": 1e-5,
        "module": "bn1",
        "source": "net.py:12",
        "lowering": "native",
        "notes": [],
        "state": ["bn1.running_mean", "bn1.running_var"],
    }
    assert record["findings"] == [
        {
            "code": "BNR001",
            "message": report.findings[0].message,
            "source": "net.py:12",
            "name": "buffer-rebound",
        }
    ]
    assert record["graph_texts"] == [{"before": "a < b", "after": "c & d"}]
    assert record["kept"] == [
        {"what": "autograd.Function", "reason": "its backward is <yours>", "source": "net.py:40"}
    ]


def test_json_stays_json_for_an_infinite_eps() -> None:
    record = json.loads(Report([batch_norm(eps=math.inf)]).to_json())
    assert record["sites"][0]["eps"] == "inf"


def test_page_is_self_contained_and_escaped(report: Report, tmp_path: Path) -> None:
    page = report.to_html(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page
    elements = Elements()
    elements.feed(page)
    assert not elements.open, "every element is closed"
    assert not {"script", "link", "img", "iframe"} & elements.seen
    assert not elements.fetched
    assert "math" in elements.seen
    assert "&lt;batch&gt;" in page
    assert "<batch>" not in page
    assert "a &lt; b" in page
    assert "its backward is &lt;yours&gt;" in page
    assert "c &amp; d" in page


class Elements(HTMLParser):
    """Collects the elements of a page, those still open, and what would be fetched."""

    VOID = frozenset({"meta", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.fetched += [name for name, _ in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_formulas_read_as_mathematics() -> None:
    assert formula_text(BATCH_NORM) == "(x(n, c, h, w) - M(c))*bn1.weight(c)/sqrt(V(c) + 1e-05)"
    mathml = formula_mathml(BATCH_NORM)
    assert "<msub><mi>M</mi><mrow><mi>c</mi></mrow></msub>" in mathml  # an index; its case is kept
    assert "<mn>1e-05</mn>" in mathml
    assert mathml.index("<mi>x</mi>") < mathml.index("<mi>M</mi>")


def test_names_in_formulas_are_escaped() -> None:
    mathml = formula_mathml(sympy.Symbol("<b>") + sympy.Function("f<i>")(C))
    assert "<b>" not in mathml
    assert "<i>" not in mathml
    assert "&lt;b&gt;" in mathml


def test_a_site_that_is_left_says_why() -> None:
    with pytest.raises(AssertionError, match="says why"):
        batch_norm(status="left", reason=None)
    with pytest.raises(AssertionError, match="'batchnorm' is none of"):
        batch_norm(kind="batchnorm")


def test_every_pathology_names_cause_and_fix() -> None:
    for name, known in PATHOLOGIES.items():
        found = pathology(name, "net.py:3")
        assert found == Finding(known.code, f"{known.cause}; {known.fix}", "net.py:3", name)
    codes = [known.code for known in PATHOLOGIES.values()]
    assert codes == [f"BNR{i:03d}" for i in range(1, len(codes) + 1)]
    with pytest.raises(KeyError):
        pathology("unheard-of", "net.py:3")
