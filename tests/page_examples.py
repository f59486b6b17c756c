"""The examples of a page, run as a module: Dynamo looks classes and lines up there."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

DOCS = Path(__file__).parents[1] / "docs"


def blocks(text: str) -> list[str]:
    """The Python code in a text."""
    return re.findall(r"```python\n(.*?)```", text, re.S)


def sections(page: str) -> tuple[str, dict[str, str]]:
    """The code that a page begins with, and the text of each of its sections that has code."""
    lead, *parts = re.split(r"^## ", (DOCS / page).read_text("utf-8"), flags=re.M)
    (shared,) = blocks(lead)
    return shared, {part.partition("\n")[0]: part for part in parts if blocks(part)}


def run_example(program: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that a program makes, in `folder/example.py`."""
    torch.manual_seed(0)
    path = folder / "example.py"
    path.write_text(program, encoding="utf-8")
    specification = importlib.util.spec_from_file_location("example", path)
    assert specification is not None
    assert specification.loader is not None
    example = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "example", example)
    specification.loader.exec_module(example)
    return example
