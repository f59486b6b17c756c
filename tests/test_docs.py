"""The documents hold: code runs, links lead somewhere, the README shows what was measured."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def test_readme_code_runs(tmp_path: Path) -> None:
    # Inductor is the stage after in some of the README's lines, and is not called there
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    assert len(blocks) == 7
    program = tmp_path / "readme.py"
    program.write_text("\n".join(blocks), encoding="utf-8")
    outcome = subprocess.run(
        [sys.executable, str(program)], cwd=tmp_path, capture_output=True, text=True
    )
    assert outcome.returncode == 0, outcome.stderr


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?://)([^)#]+)(?:#[^)]*)?\)", text):
        assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_readme_shows_what_was_measured() -> None:
    outcome = subprocess.run(
        [
            sys.executable,
            "-c",
            "from benchmarks.readme import README, with_table\n"
            "text = README.read_text(encoding='utf-8')\n"
            "assert with_table(text) == text, 'python -m benchmarks.readme updates the README'",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert outcome.returncode == 0, outcome.stderr


def test_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
    for document in DOCUMENTS:
        named = set(re.findall(r"(?:`|^)make ([a-z]+)", document.read_text("utf-8"), re.M))
        assert named <= targets, f"{document.name}: {named - targets}"
