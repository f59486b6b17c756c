"""Put the measured table into the README, from benchmarks/results/norms.json.

    python -m benchmarks.readme

It shows the training rows of each norm's first size; a test checks that it shows nothing else.
"""

import json
from pathlib import Path
from typing import Any

from benchmarks.cases import PEERS
from benchmarks.tables import RESULTS, markdown

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- measured: begin -->", "<!-- measured: end -->"
HEADINGS = (
    "training step",
    "hand-written",
    "native",
    "optimised",
    "optimised / native",
    "saved for backward: hand-written",
    "native",
    "optimised",
)


def main() -> None:
    """Replace what stands between the two marks."""
    text = README.read_text(encoding="utf-8")
    README.write_text(with_table(text), encoding="utf-8")


def with_table(text: str) -> str:
    """The README's text with the table that belongs there now.

    Raises:
        ValueError: the marks are missing.
    """
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"the README has no {START} ... {END}: put both where the table belongs")
    return f"{before}{START}\n{_measured()}\n{END}{after}"


def _measured() -> str:
    record = json.loads((RESULTS / "norms.json").read_text(encoding="utf-8"))
    where = record["machine"]
    sizes: dict[str, str] = {}
    rows = []
    for result in record["results"]:
        first = sizes.setdefault(result["norm"], result["size"])
        if result["mode"] == "train" and result["size"] == first:
            rows.append(_row(result))
    origin = f"{where['device']}, {where['threads']} threads, torch {where['torch']}"
    return f"{markdown(HEADINGS, rows)}\n\n{origin}; `make benchmark` measures it again."


def _row(result: dict[str, Any]) -> list[str]:
    layout = "" if result["layout"] == "contiguous" else f", {result['layout']}"
    name = f"{result['norm']}, {result['size']}{layout}"
    return [
        name,
        *(f"{result['milliseconds'][peer]:.3g} ms" for peer in PEERS),
        f"{result['over_native']:.2f}",
        *(f"{result['saved'][peer] / 2**20:.3g} MiB" for peer in PEERS),
    ]


if __name__ == "__main__":
    main()
