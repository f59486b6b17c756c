"""Differences of parameters that are alike: the algebra multiplies them out, the code must not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from contract import contract_violations
from torch import Tensor, nn

from bnrewrite import explain, optimize

Norm = Callable[[Tensor], Tensor]


class Differences(nn.Module):
    """A function of a tensor and of parameters that lie within a hundredth of 1000, or of -1."""

    def __init__(self, function: Callable[[Differences, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.a, self.b, self.c, self.d = (
            nn.Parameter(1000 + torch.rand(8) * 0.01 * i) for i in range(1, 5)
        )
        self.of_groups = nn.Parameter(1000 + torch.rand(4) * 0.01)
        self.minus_one = nn.Parameter(torch.rand(8) * 1e-3 - 1)
        self.weight, self.bias = nn.Parameter(torch.rand(8)), nn.Parameter(torch.rand(8) * 1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def batch(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / torch.sqrt(x.var(0, unbiased=False) + 1e-5)


def general(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / (x.std(0) + 1e-3)


def by_root(x: Tensor) -> Tensor:
    return x / ((x * x).mean(0).sqrt() + 1e-3)


def without_gradients(m: Differences, y: Tensor) -> Tensor:
    with torch.no_grad():
        return y * (m.a - m.b) * (m.c - m.d)


SCALED: dict[str, Callable[[Differences, Tensor], Tensor]] = {
    "by a difference": lambda m, y: y * (m.a - m.b) + m.bias,
    "by one and a parameter": lambda m, y: y * (1 + m.minus_one),
    "by a difference and a weight": lambda m, y: y * (m.a - m.b) * m.weight + m.bias,
    "by two differences": lambda m, y: (y * (m.a - m.b) + m.bias) * (m.c - m.d),
    "by differences added": lambda m, y: y * ((m.a - m.b) + (m.c - m.d)),
    "by a square": lambda m, y: y * (m.a - m.b).square(),
    "by a cube": lambda m, y: y * (m.a - m.b) ** 3,
    "by a root": lambda m, y: y * ((m.a - m.b).square() + 0.01).sqrt(),
    "after the affine": lambda m, y: (y * m.weight + m.weight) * (1 + m.minus_one) + m.bias,
    "by a detached difference": lambda m, y: y * (m.a - m.b).detach() * (m.c - m.d),
    "by a difference of sums": lambda m, y: y * (m.a - m.b) * (m.bias.sum() - m.bias.mean() * 8),
    "without gradients": without_gradients,
}


@pytest.mark.parametrize("scaled", SCALED)
@pytest.mark.parametrize(
    ("norm", "lowering"), [(batch, "native"), (general, "composite"), (by_root, "composite")]
)
def test_a_difference_of_parameters_keeps_its_digits(
    norm: Norm, lowering: str, scaled: str
) -> None:
    model = Differences(lambda m, x: SCALED[scaled](m, norm(x)))
    batches = [torch.randn(16, 8) + 3 for _ in range(2)]
    assert contract_violations(model, lambda m: optimize(m, backend="eager"), batches) == []
    (site,) = explain(model, batches[0]).sites
    assert (site.status, site.lowering) == ("rewritten", lowering)


def by_group(m: Differences, y: Tensor) -> Tensor:
    scale = (m.of_groups - 1000)[:, None]
    return (y.view(-1, 4, 2) * scale).reshape(y.shape) * (m.a - m.b)


def test_differences_per_group_and_per_channel() -> None:
    model = Differences(lambda m, x: by_group(m, by_root(x)))
    batches = [torch.randn(16, 8) + 3 for _ in range(2)]
    assert contract_violations(model, lambda m: optimize(m, backend="eager"), batches) == []
    assert [site.status for site in explain(model, batches[0]).sites] == ["rewritten"]


def test_a_frozen_norm_times_differences() -> None:
    def frozen(m: Differences, x: Tensor) -> Tensor:
        centred = (x.sin() - m.bias.detach()) / (m.weight.detach() + 1e-3).sqrt()
        return centred * (m.a - m.b) * (m.c - m.d)

    batches = [torch.randn(16, 8) for _ in range(2)]
    model = Differences(frozen)
    assert contract_violations(model, lambda m: optimize(m, backend="eager"), batches) == []
    assert [site.status for site in explain(model, batches[0]).sites] == ["rewritten"]
