"""Statistics that are parts of one buffer, quotients in which nothing cancels, tiny groups."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from contract import contract_violations
from torch import Tensor, nn

from bnrewrite import explain, optimize, verify

EPS = 1e-3


class Pieces(nn.Module):
    """Channels in pieces, with the statistics of all in one buffer; a scale alone for the last."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(7) + 0.5)
        self.register_buffer("running_mean", torch.randn(7))
        self.register_buffer("running_var", torch.rand(7) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        pieces = []
        for start, stop in ((0, 4), (4, 7)):
            scale = self.weight[start:stop] * (self.running_var[start:stop] + EPS) ** -0.5
            piece = x[:, start:stop]
            if not start:
                piece = piece - self.running_mean[start:stop]
            pieces.append(piece * scale)
        return torch.cat(pieces, 1)


class Domains(nn.Module):
    """One row of statistics for each domain."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.domain = 1
        self.weight = nn.Parameter(torch.rand(3, 6) + 0.5)
        self.register_buffer("running_mean", torch.randn(3, 6))
        self.register_buffer("running_var", torch.rand(3, 6) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.running_mean[self.domain], self.running_var[self.domain]
        return (x - mean) / (variance + EPS).sqrt() * self.weight[self.domain]


@pytest.mark.parametrize("kernels", ["auto", "composite", "generated"])
@pytest.mark.parametrize(("build", "width", "count"), [(Pieces, 7, 2), (Domains, 6, 1)])
def test_parts_of_stored_statistics(
    build: type[nn.Module], width: int, count: int, kernels: str
) -> None:
    torch.manual_seed(0)
    model, batches = build(), [torch.randn(5, width) for _ in range(4)]

    def optimised(m: nn.Module) -> nn.Module:
        return optimize(m, backend="eager", kernels=kernels)

    assert contract_violations(model, optimised, batches) == []
    sites = explain(model, batches[0].requires_grad_()).sites
    assert [(site.kind, site.status) for site in sites] == [("affine", "rewritten")] * count


@pytest.mark.parametrize("kernels", ["auto", "composite", "generated"])
def test_a_part_that_changes_before_the_backward(kernels: str) -> None:
    torch.manual_seed(0)
    model, x = Domains(), torch.randn(5, 6)
    expected = model.running_var[1].add(EPS).rsqrt() * model.weight[1].detach()
    optimize(model, backend="eager", kernels=kernels)
    y = model(x.requires_grad_())
    model.running_var.add_(1)
    model.running_mean.mul_(2)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected.expand(5, 6))
    model.domain, fresh = 2, torch.randn(5, 6)
    third = (fresh - model.running_mean[2]) / (model.running_var[2] + EPS).sqrt()
    torch.testing.assert_close(model(fresh), third * model.weight[2])


def test_a_part_of_an_input_is_no_stored_statistic() -> None:
    def formula(x: Tensor, given: Tensor) -> Tensor:
        return (x - given[0] * 2) / (given[1] * 3 + EPS).sqrt()

    given = torch.rand(2, 6) + 0.5
    assert explain(formula, torch.randn(5, 6), given).sites == []


class Squash(nn.Module):
    def __init__(self, formula: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.formula = formula

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(x)


def squash(x: Tensor) -> Tensor:
    square = x.pow(2).sum(2, keepdim=True)
    return x * (square / (1 + square) / torch.sqrt(square))


def gate(x: Tensor) -> Tensor:
    square = x.pow(2).sum(2, keepdim=True)
    return x * torch.tanh(square)  # a gate divides by nothing


def test_a_quotient_in_which_nothing_may_cancel() -> None:
    torch.manual_seed(0)
    model, batches = Squash(squash), [torch.randn(3, 4, 5) for _ in range(4)]
    assert contract_violations(model, lambda m: optimize(m, backend="eager"), batches) == []
    (site,) = explain(model, batches[0]).sites
    assert (site.kind, site.status) == ("general", "rewritten")
    x = torch.randn(3, 4, 5)
    x[1, 2] = 0
    assert torch.equal(optimize(squash, backend="eager")(x).isnan(), squash(x).isnan())
    assert explain(Squash(gate), batches[0]).sites == []


def by_pairs(x: Tensor) -> Tensor:
    x = x.view(len(x), 32, -1)
    y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-5).sqrt()
    return y.flatten(1)


@pytest.mark.parametrize("seed", [6, 21, 28])
def test_two_elements_next_to_each_other(seed: int) -> None:
    """PyTorch's gradient is ``dy a + x b + c``, which has no digit left there."""
    torch.manual_seed(seed)
    x = torch.randn(4, 64) * 1.7 + 0.6
    model = Squash(by_pairs)
    verification = verify(model, optimize(copy.deepcopy(model), backend="eager"), x, steps=1)
    assert verification.ok, verification


def test_only_of_groups_of_few_elements_the_operator_is_not_trusted() -> None:
    x = torch.randn(4, 64).requires_grad_()
    (site,) = explain(optimize(by_pairs, backend="eager", kernels="native"), x).sites
    text = 'kernels="native" leaves a group_norm of which PyTorch\'s operator may lose digits'
    assert site.reason == text
    (site,) = explain(optimize(by_pairs, backend="eager"), x).sites
    assert (site.status, site.lowering) == ("rewritten", "composite")
    of_four = explain(optimize(by_pairs, backend="eager", kernels="native"), x.repeat(1, 2))
    assert [site.lowering for site in of_four] == ["native"]
