"""A norm of a norm: each site reads what replaced the one before, and nothing is left over."""

from __future__ import annotations

import pytest
import torch
from contract import contract_violations
from torch import Tensor, nn

from bnrewrite import explain, optimize


class LayerNorm(nn.Module):
    """Every intermediate value has two uses, the normalised tensor three."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(features))
        self.bias = nn.Parameter(torch.rand(features))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).pow(2).mean(-1, keepdim=True)
        return (x - mean) / torch.sqrt(variance + 1e-6) * self.weight + self.bias


@pytest.mark.parametrize("count", [2, 5])
def test_nothing_of_the_formulas_is_left(count: int) -> None:
    model = nn.Sequential(*[LayerNorm(8) for _ in range(count)])
    report = explain(model, torch.randn(2, 3, 8))
    assert [site.kind for site in report.sites] == ["layer_norm"] * count
    ((_, after),) = report.graph_texts
    assert after.count("call_function") == after.count("kernels.rows.layer_norm") == count


def test_the_numbers_are_those_of_the_chain() -> None:
    model = nn.Sequential(*[LayerNorm(8) for _ in range(3)])
    batches = [torch.randn(2, 3, 8) for _ in range(4)]
    assert contract_violations(model, lambda m: optimize(m, backend="eager"), batches) == []
