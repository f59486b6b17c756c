"""Each answer has an example, and the examples run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from page_examples import DOCS, blocks, run_example, sections

pytestmark = pytest.mark.filterwarnings("error::bnrewrite.BnrewriteWarning")

SHARED, ANSWERS = sections("faq.md")


@pytest.mark.parametrize("question", ANSWERS)
def test_an_answer_runs(question: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = blocks(ANSWERS[question])
    assert "assert" in example
    run_example(f"{SHARED}\n\n{example}", tmp_path, monkeypatch)


def test_every_question_is_answered_and_listed() -> None:
    text = (DOCS / "faq.md").read_text("utf-8")
    questions = re.findall(r"^## (.*)$", text, re.M)
    assert list(ANSWERS) == questions
    assert re.findall(r"^- \[(.*?)\]", text, re.M) == questions
