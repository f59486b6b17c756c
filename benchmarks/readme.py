"""Put the measured tables into the README, from benchmarks/results.

    python -m benchmarks.readme

The first shows the training rows of each norm's first size, the second the files of each exported
model; a test checks that they show nothing else.
"""

import json
from pathlib import Path
from typing import Any

from benchmarks.cases import PEERS
from benchmarks.measure import origin
from benchmarks.tables import RESULTS, markdown

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- measured: begin -->", "<!-- measured: end -->"
ONNX_START, ONNX_END = "<!-- measured onnx: begin -->", "<!-- measured onnx: end -->"
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
    """Replace what stands between the marks."""
    text = README.read_text(encoding="utf-8")
    README.write_text(with_table(text), encoding="utf-8")


def with_table(text: str) -> str:
    """The README's text with the tables that belong there now.

    Raises:
        ValueError: a mark is missing.
    """
    text = _between(text, START, END, _measured())
    return _between(text, ONNX_START, ONNX_END, _exported())


def _between(text: str, begin: str, finish: str, table: str) -> str:
    before, start, rest = text.partition(begin)
    _, end, after = rest.partition(finish)
    if not start or not end:
        raise ValueError(f"the README has no {begin} ... {finish}: put both where a table belongs")
    return f"{before}{begin}\n{table}\n{finish}{after}"


def _measured() -> str:
    record = json.loads((RESULTS / "norms.json").read_text(encoding="utf-8"))
    sizes: dict[str, str] = {}
    rows = []
    for result in record["results"]:
        first = sizes.setdefault(result["norm"], result["size"])
        if result["mode"] == "train" and result["size"] == first:
            rows.append(_row(result))
    where = origin(record["machine"])
    return f"{markdown(HEADINGS, rows)}\n\n{where}; `make benchmark` measures it again."


def _exported() -> str:
    """Per model and file: the median of a call, and how much of its norms is left in pieces."""
    record = json.loads((RESULTS / "onnx_norms.json").read_text(encoding="utf-8"))
    cells: dict[str, dict[str, str]] = {}
    for result in record["results"]:
        left = f", {result['loose']} loose" if result["loose"] else ""
        told = f"{result['milliseconds']:.3g} ms{left}"
        count = f"{result['norms']} norm{'' if result['norms'] == 1 else 's'}"
        cells.setdefault(f"{result['model']}, {count}", {})[result["peer"]] = told
    peers = ("onnxruntime", "onnxscript", "onnxsim", "bnrewrite", "native")
    rows = [[name, *(found.get(peer, "") for peer in peers)] for name, found in cells.items()]
    headings = (
        "file by",
        "torch.onnx",
        "and onnxscript",
        "and onnxsim",
        "bnrewrite",
        "native twin",
    )
    return markdown(headings, rows)


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
