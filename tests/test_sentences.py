"""Every sentence with which code stays the user's is shown by a test."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = (
    # what has no kernel is not left, it takes another lowering: see test_generated_lowering.py
    *(p for p in sorted((ROOT / "passes").glob("*.py")) if p.name != "generated.py"),
    *sorted((ROOT / "bnrewrite" / "capture").glob("*.py")),
    ROOT / "bnrewrite" / "algebra" / "selection.py",
    ROOT / "bnrewrite" / "kernels" / "folding.py",
    *sorted((ROOT / "bnrewrite" / "doors").glob("*.py")),
)
REFUSING = (
    *("Refusal", "Unwritable", "CaptureError", "Inexact", "lookalike", "left", "Unfoldable"),
    *("Untranslatable", "ArchiveError"),
)
WRITING = "doors"  # what is returned there is mostly code in the making, no sentence
VARIES = "{}"  # stands for what an f-string puts in
# No model is known that gets one of these: they stand before code that would be wrong else.
GUARDS = {
    "a {} of numbers",
    "a buffer that becomes a constant",
    "a norm that is a constant",
    "the replacement is {} {}, the original {} {}",
    "the size {} cannot be read from the norm's input",
    "it updates a value in place and reads a view of that value",
    "with it replaced the program would take fewer sizes than it does",
    "it uses an object of a compiled class",
    "its attribute {} is an object of a compiled class",
    "it leaves a block in another mode than it enters it",
    "it holds a constant of the type {}",
    "it enters a {}",
    "it calls aten::{}.{}, which Python does not know",
    "parts of it can only be called as they are",
}


def sentences() -> dict[str, str]:
    """Where each stands: given to what refuses, or stored or returned to be given to it."""
    return {
        sentence: f"{path.relative_to(ROOT)}:{value.lineno}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        for value in reasons_in(node, returned=path.parent.name != WRITING)
        if (sentence := text_of(value)) is not None
    }


def reasons_in(node: ast.AST, *, returned: bool) -> Iterator[ast.expr]:
    """The expressions of a node that may be a reason; also what is stored or returned."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in REFUSING:
        yield from node.args
    elif returned and isinstance(node, ast.Assign | ast.Return) and node.value is not None:
        text = text_of(node.value)
        if text is not None and len(text.split()) >= 4:  # else a name, and no sentence
            yield node.value


def text_of(node: ast.AST) -> str | None:
    """A string, with `VARIES` for each value in it; None for what is no string."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(each) or VARIES for each in node.values)
    return None


def is_shown(sentence: str, texts: list[str]) -> bool:
    """Whether a text has the sentence, or is four words of it or more; all of a shorter one."""
    pattern = re.compile(".+".join(map(re.escape, sentence.strip("{} ").split(VARIES))), re.DOTALL)
    if len(sentence.replace(VARIES, "").split()) < 4:
        whole = re.compile(".+".join(map(re.escape, sentence.split(VARIES))), re.DOTALL)
        return any(pattern.fullmatch(text) or whole.fullmatch(text) for text in texts)
    return any(
        pattern.search(text) or (len(text.split()) >= 4 and text in sentence) for text in texts
    )


def test_every_sentence_is_shown_by_a_test() -> None:
    texts = [
        re.sub(r"\\(.)", r"\1", text)  # a pattern as the text that it finds
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if (text := text_of(node)) is not None and text not in GUARDS
    ]
    found = sentences()
    assert len(found) > 30
    assert set(found) >= GUARDS
    missing = {each: where for each, where in found.items() if not is_shown(each, texts)}
    assert set(missing) == GUARDS, missing
