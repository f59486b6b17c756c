"""Exports for tests: the file, its operations, and what checking it found, without the tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from torch import Tensor, nn

from bnrewrite.onnx.check import Checked, check
from bnrewrite.onnx.export import rewritten
from bnrewrite.onnx.program import functional, traced
from bnrewrite.onnx.saving import save
from bnrewrite.onnx.tables import operations
from bnrewrite.onnx.translate import translate
from bnrewrite.report.site import Site


@dataclass(frozen=True)
class Outcome:
    """An exported and checked model."""

    operations: dict[str, int]
    sites: tuple[Site, ...]
    checked: Checked
    path: Path


class Formula(nn.Module):
    """A formula of one tensor."""

    def __init__(self, formula: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.formula = formula

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(x)


def exported(
    model: Callable[..., Any],
    folder: Path,
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    dynamic: Any = None,
    opset: int = 23,
    target: str = "cpu",
) -> Outcome:
    """Export a model in evaluation mode and run the file against it; raises where they differ."""
    if isinstance(model, nn.Module):
        model.eval()
    program, sites = rewritten(functional(traced(model, args, kwargs or {}, dynamic)))
    translated = translate(program, target, opset, dynamic)
    path = folder / "model.onnx"
    save(translated, path)
    file = onnx.load(path)
    onnx.checker.check_model(file)
    assert {node.domain for node in file.graph.node} <= {""}  # standard operations alone
    assert [(each.domain, each.version) for each in file.opset_import] == [("", opset)]
    checked = check(model, program, translated, path, target)
    return Outcome(operations(translated), sites, checked, path)
