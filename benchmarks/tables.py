"""A benchmark's results as a table on the screen, in Markdown, and as JSON."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.measure import machine, origin

WIDTH = 200  # columns, where there is no terminal to ask
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Results:
    """Rows of one benchmark, as text for people and as records for programs."""

    name: str
    headings: tuple[str, ...]
    rows: Sequence[Sequence[str]]
    records: Sequence[dict[str, Any]]
    remark: str  # one sentence under the table's origin
    device: str = "cpu"

    def show(self) -> None:
        """Print the table, in full where it is not a terminal that is printed to."""
        table = Table(*self.headings, title=self.name)
        for row in self.rows:
            table.add_row(*row)
        Console(width=None if sys.stdout.isatty() else WIDTH).print(table)

    def write(self, folder: Path) -> None:
        """Write `<name>.json` and `<name>.md` into `folder`, which is made where it is missing."""
        folder.mkdir(parents=True, exist_ok=True)
        where = machine(self.device)
        record = {"machine": where, "results": list(self.records)}
        text = json.dumps(record, indent=1) + "\n"
        (folder / f"{self.name}.json").write_text(text, encoding="utf-8")
        lines = [
            f"Measured with `{where['command']}` on {origin(where)}. {self.remark}",
            "",
            markdown(self.headings, self.rows),
        ]
        (folder / f"{self.name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
