"""Derivatives of every order, copies that share no memory, statistics written behind the back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnrewrite import explain, optimize

Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def rows(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / torch.sqrt(variance + 1e-3) * weight + bias


def batch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, 0, correction=0)
    return (x - mean) * torch.rsqrt(variance + 1e-3) * weight + bias


def lengths(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-3).sqrt() * weight + bias


def mean_squares(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3) * weight + bias


def groups(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    split = x.view(6, 2, 2, 1)
    mean = split.mean((2, 3), keepdim=True)
    variance = split.var((2, 3), keepdim=True, unbiased=False)
    return ((split - mean) / torch.sqrt(variance + 1e-3)).view(6, 4) * weight + bias


@pytest.mark.parametrize("function", [rows, batch, groups])
def test_second_derivatives_where_norms_share_a_weight(function: Function) -> None:
    """The second norm's input is made of the weight that it takes itself."""
    x, cotangent = torch.randn(2, 6, 4, dtype=torch.float64)
    weight, bias = torch.rand(2, 4, dtype=torch.float64) + 0.5

    def twice(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return function(function(x, weight, bias), weight, bias)

    def derivatives(call: Function) -> tuple[Tensor, ...]:
        leaves = [each.clone().requires_grad_() for each in (x, weight, bias)]
        total = (call(*leaves) ** 3 * cotangent).sum()
        first = torch.autograd.grad(total, leaves, create_graph=True)
        return torch.autograd.grad(torch.stack([g.sin().sum() for g in first]).sum(), leaves)

    torch.testing.assert_close(derivatives(optimize(twice, backend="eager")), derivatives(twice))


@pytest.mark.parametrize("function", [rows, batch, lengths, mean_squares, groups])
def test_four_derivatives(function: Function) -> None:
    x = torch.randn(6, 4, dtype=torch.float64)
    weight, bias = torch.rand(2, 4, dtype=torch.float64) + 0.5
    cotangents = torch.randn(5, 6, 4, dtype=torch.float64)

    def derivatives(call: Function) -> list[Tensor]:
        leaves = [each.clone().requires_grad_() for each in (x, weight, bias)]
        value, found = call(*leaves), []
        for cotangent in cotangents:
            (value,) = torch.autograd.grad((value * cotangent).sum(), leaves[0], create_graph=True)
            found.append(value)
            along_weight = torch.autograd.grad(value.sin().sum(), leaves[1], retain_graph=True)
            found += along_weight
        return found[:8]

    assert [site.status for site in explain(function, x, weight, bias).sites] == ["rewritten"]
    found, expected = derivatives(optimize(function, backend="eager")), derivatives(function)
    largest = max(float(each.abs().max()) for each in expected)
    for mine, users in zip(found, expected, strict=True):
        assert (mine - users).abs().max() <= 1e-9 * largest


class Kept(nn.Module):
    """Keeps a copy of what it has seen, and of its weight."""

    bank: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8) + 0.5)
        self.bank = torch.zeros(4, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = rows(x, self.weight, self.weight)
        self.bank = torch.zeros_like(x)
        self.bank.copy_(x)
        with torch.no_grad():
            teacher = torch.zeros_like(self.weight)
            teacher[:] = self.weight
        return y, teacher


def test_a_copy_is_not_its_source() -> None:
    model = optimize(Kept(), backend="eager")
    x = torch.randn(4, 8)
    _, teacher = model(x)
    assert not teacher.requires_grad
    before = x.clone()
    x.zero_()
    teacher.zero_()
    assert torch.equal(model.bank, before)
    assert (model.weight > 0).all()


class Frozen(nn.Module):
    mean: Tensor
    variance: Tensor

    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        self.offset = offset
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("variance", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return (x - (self.mean + self.offset)) / torch.sqrt(self.variance + 1e-5)


def _add(model: Frozen) -> None:
    model.mean += 4000.0


def _data(model: Frozen) -> None:
    model.mean.data.add_(4000.0)


def _replace(model: Frozen) -> None:
    model.mean.data = model.mean.data + 4000.0


def _numpy(model: Frozen) -> None:
    model.mean.numpy()[:] = 4000.0


@pytest.mark.parametrize("write", [_add, _data, _replace, _numpy])
def test_statistics_that_are_written_in_any_way_are_looked_at_again(write: Any) -> None:
    model = optimize(Frozen().eval(), backend="eager")
    x = torch.randn(16, 8)
    model(x)
    write(model)
    exact = x.add(4000.0).double().sub(4000.0) / (1 + 1e-5) ** 0.5
    assert (model(x + 4000.0) - exact).abs().max() < 2e-6


def test_a_centre_of_two_parts() -> None:
    x = torch.randn(16, 8) + 1000.0
    exact = (x.double() - 1000.0) / (1 + 1e-5) ** 0.5
    assert (optimize(Frozen(1000.0), backend="eager")(x) - exact).abs().max() < 2e-6


def test_strides_of_a_transposed_norm() -> None:
    def transposed(x: Tensor) -> Tensor:
        return rows(x, torch.ones(8), torch.zeros(8)).t()

    x = torch.randn(16, 8)
    assert optimize(transposed, backend="eager")(x).stride() == transposed(x).stride()
