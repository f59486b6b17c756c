"""What a long run says of itself where something is wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import soak, twins

FLAT = soak.Memory(steps=soak.ROUND, tensors=9, objects=50, resident=10**8, graphs=6)
GOOD = soak.Record(
    steps=4 * soak.ROUND,
    seed=0,
    processes=2,
    differences={"alone": {"buffers": 1e-13}},
    sites={"alone": soak.SITES},
    memory=[replace(FLAT, steps=(i + 1) * soak.ROUND) for i in range(4)],
)


def last(**changes: int) -> dict[str, Any]:
    return {"memory": [*GOOD.memory[:-1], replace(GOOD.memory[-1], **changes)]}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"differences": {"alone": {"buffers": 1e-6}}}, ["buffers differ by 1e-06"]),
        ({"differences": {"alone": {"buffers": float("nan")}}}, ["buffers differ by nan"]),
        ({"sites": {"alone": 2}}, ["2 norms were rewritten"]),
        (last(tensors=10), ["tensors grew by 1 in 20 steps"]),
        (last(objects=61), ["objects grew by 11 in 20 steps"]),
        (last(resident=2 * 10**8), ["resident grew by 100000000"]),
        (last(graphs=10), ["10 graphs were compiled"]),
    ],
)
def test_faults_of_a_run(changes: dict[str, Any], said: list[str]) -> None:
    found = soak.faults(replace(GOOD, **changes))
    assert len(found) == len(said)
    assert all(text in fault for text, fault in zip(said, found, strict=True))


def test_differences_are_relative_and_counters_exact() -> None:
    right = {"a": torch.tensor([4.0, 1.0]), "n": torch.tensor(7), "none": torch.zeros(0)}
    assert twins.difference(right, right) == 0
    assert twins.difference(right | {"a": torch.tensor([4.0, 1.5])}, right) == 0.125
    for wrong in ({"n": torch.tensor(8)}, {"a": torch.tensor([4.0, torch.nan])}):
        assert twins.difference(right | wrong, right) == float("inf")
