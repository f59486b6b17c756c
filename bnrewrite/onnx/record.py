"""What an export did: the file, its norms, its operations before and after, and the check."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from bnrewrite.report.report import Report
from bnrewrite.report.text import WIDTH, rendered
from bnrewrite.report.verdict import Verification

from .saving import data_path
from .session import Port


@dataclass(frozen=True)
class OnnxExport:
    """An exported file and what is known of it; ``print`` gives a table.

    Attributes:
        path: the file; weights of a large model are beside it in ``<path>.data``.
        target: the provider that it was written for.
        opset: of its operations.
        inputs: name, dtype and shape of each input, in order.
        outputs: the same of the outputs.
        report: the norms of the model, rewritten or left.
        operators: nodes by operation, by what was written: ``"exporter"`` is PyTorch's exporter
            alone, ``"bnrewrite"`` the file, each also after ``"onnxruntime"``'s own optimiser; None
            where that model could not be made or loaded. Only the file's where nothing was checked.
        verifications: errors against float64, by the sizes of the inputs; empty with verify=False.
        placement: nodes by operation, by execution provider; empty with verify=False.
        notes: one sentence each of what is worth knowing.
        external: whether the weights are in a file beside it.
    """

    path: Path
    target: str
    opset: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    report: Report
    operators: dict[str, dict[str, int] | None]
    verifications: dict[str, Verification] = field(default_factory=dict)
    placement: dict[str, dict[str, int]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    external: bool = False

    @property
    def files(self) -> tuple[Path, ...]:
        """The file, and that of its weights where there is one."""
        beside = data_path(self.path)
        return (self.path, beside) if self.external else (self.path,)

    @property
    def verified(self) -> bool:
        """Whether the file was run against the model; a difference would have raised."""
        return bool(self.verifications)

    def to_text(self, width: int = WIDTH) -> str:
        """What was written and checked, at most ``width`` columns wide."""
        parts: list[RenderableType] = [Text(self._headline())]
        parts += [Text(f"  in   {port}") for port in self.inputs]
        parts += [Text(f"  out  {port}") for port in self.outputs]
        parts.append(self._operators())
        for provider, table in self.placement.items():
            parts.append(Text(f"{provider}: {sum(table.values())} nodes"))
        for name, verification in self.verifications.items():
            parts.append(Text(f"checked {name}: {_nearest(verification)}"))
        parts += [Text(f"note: {note}") for note in self.notes]
        return rendered(parts, width)

    def __str__(self) -> str:
        return self.to_text()

    def _headline(self) -> str:
        norms = len(self.report.rewritten)
        left = len(self.report.refusals)
        return f"{self.path}: opset {self.opset} for {self.target}, {norms} norms rewritten" + (
            f", {left} left" if left else ""
        )

    def _operators(self) -> Table:
        tables = {name: table for name, table in self.operators.items() if table is not None}
        shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        shown.add_column("operation", overflow="fold")
        for name in tables:
            shown.add_column(name, justify="right")
        rows = dict.fromkeys(each for table in tables.values() for each in table)
        for operation in rows:
            counts = [table.get(operation, 0) for table in tables.values()]
            if len(set(counts)) > 1 or len(tables) == 1:
                shown.add_row(operation, *(str(n) if n else "" for n in counts))
        shown.add_row("all", *(str(sum(table.values())) for table in tables.values()))
        return shown


def _nearest(verification: Verification) -> str:
    """The value that comes nearest to its bound."""
    checks = [each for each in verification if each.bound]
    if not checks:
        return "nothing to compare"
    worst = max(checks, key=lambda each: each.optimized / each.bound)
    return f"{worst.name}: error {worst.optimized:.1e}, the bound is {worst.bound:.1e}"
