"""The benchmark at the sizes of networks, on small ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import bnrewrite
from benchmarks import network_cases, network_norms
from benchmarks.cases import HAND, OPTIMISED
from benchmarks.measure import CLOCKS


@pytest.mark.parametrize(
    ("name", "shape"),
    [("batch_norm + add + relu", (2, 8, 12, 12)), ("adaptive_norm + relu", (2, 8, 12, 12))],
)
def test_a_case_is_measured(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    (norm,) = (each for each in network_cases.CASES if each.name == name)
    case = network_cases.Case(norm, shape, "channels_last", "float32")
    result = network_norms.measure(case, 2, CLOCKS["process"])
    assert set(result.over) == set(result.milliseconds) - {OPTIMISED}
    assert result.lowerings == {"generated": 1}
    table = network_norms.tabulated([result])
    assert all(len(row) == len(table.headings) for row in table.rows)
    table.write(tmp_path)
    record = json.loads((tmp_path / "network_norms.json").read_text(encoding="utf-8"))
    assert record["results"][0]["saved"][OPTIMISED] <= result.saved[HAND]
    (line,) = network_norms.summary([result, replace(result, over={**result.over, "native": 9.0})])
    assert "native" in line
    assert "at most 9.00" in line


def test_a_wrong_model_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    case = network_cases.Case(network_cases.CASES[0], (2, 8, 4, 4), "NCHW", "float32")

    def worsened(model: Any, **_: object) -> Any:
        model[0].eps = 0.5
        return model

    monkeypatch.setattr(bnrewrite, "optimize", worsened)
    with pytest.raises(AssertionError, match=r"batch_norm \+ relu, 2x8x4x4"):
        network_norms.measure(case, 2, CLOCKS["process"])


@pytest.mark.parametrize("passes", [5, 8, 12])
def test_copies_are_of_the_same_elements(passes: int) -> None:
    x = torch.randn(4, 6, 5, 2).contiguous(memory_format=torch.channels_last)
    made = network_norms.copies(x, passes, 2)()
    assert [each.sort().values.equal(x.flatten().sort().values) for each in made] == [True, True]
