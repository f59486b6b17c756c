"""Formulas whose parts are like numbers: the digits that the user's order of operations keeps.

Float64 cannot tell an order of operations from another; float32 beside a large mean can.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract import contract_violations
from torch import Tensor, nn
from torch.nn.functional import group_norm as native_group_norm

from bnrewrite import explain, optimize
from bnrewrite.kernels.grouped import group_norm

KEEP: dict[str, Any] = {"dim": -1, "keepdim": True}


class Formula(nn.Module):
    """A function of one tensor, of two buffers and of two parameters."""

    mean: Tensor
    variance: Tensor

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("variance", torch.ones(8))
        self.weight = nn.Parameter(torch.rand(8) + 0.5)
        self.bias = nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def optimised(model: nn.Module) -> Any:
    return optimize(model, backend="eager")


def draw(*shape: int, mean: float = 100.0, spread: float = 1.0) -> list[Tensor]:
    return [spread * torch.randn(shape) + mean for _ in range(3)]


def standardised(x: Tensor) -> Tensor:
    return (x - x.mean(**KEEP)) / (x.std(**KEEP) + 1e-3)


def central(x: Tensor, order: int) -> Tensor:
    return (x - x.mean(**KEEP)).pow(order).mean(**KEEP)


def by_clamped_square(_: Formula, x: Tensor) -> Tensor:
    centred = x - x.mean(**KEEP).detach()
    return centred / centred.pow(2).mean(**KEEP).clamp(min=1e-3).sqrt()


CANCELLING: dict[str, Callable[[Formula, Tensor], Tensor]] = {
    "times the fourth moment": lambda _, x: standardised(x) * central(x, 4),
    "plus the third moment": lambda _, x: standardised(x) + central(x, 3),
    "times a distance of means": lambda m, x: (
        standardised(x) * (x.mean(**KEEP) - 99.0 - m.mean[0]).pow(2)
    ),
    "over the clamped square about a detached mean": by_clamped_square,
    "over the clamped fourth moment": lambda _, x: (
        (x - x.mean(**KEEP)) / central(x, 4).clamp(min=0.1)
    ),
    "over the third moment's magnitude": lambda _, x: (
        (x - x.mean(**KEEP)) / (central(x, 3).abs() + 1)
    ),
}


@pytest.mark.parametrize("name", CANCELLING)
def test_powers_of_differences_are_not_expanded(name: str) -> None:
    model = Formula(CANCELLING[name])
    assert explain(model, draw(6, 64)[0]).sites
    assert contract_violations(model, optimised, draw(6, 64)) == []


def in_groups(m: Formula, x: Tensor) -> Tensor:
    n, c, *sides = x.shape
    groups = x.reshape(n, 4, c // 4, *sides)
    inside = list(range(2, groups.dim()))
    centre = groups.mean(inside, keepdim=True)
    spread = groups.var(inside, keepdim=True, unbiased=False)
    y = ((groups - centre) / torch.sqrt(spread + 1e-5)).reshape(n, c, *sides)
    along = (1, -1, *[1] * len(sides))
    return y * m.weight.view(along) + m.bias.view(along)


def rows_of_channels(m: Formula, x: Tensor) -> Tensor:
    """An instance norm of (N, H, W, C)."""
    centre = x.mean((1, 2), keepdim=True)
    spread = (x - centre).pow(2).mean((1, 2), keepdim=True)
    return (x - centre) * torch.rsqrt(spread + 1e-5) * m.weight + m.bias


def by_native(model: nn.Module) -> Any:
    return optimize(model, backend="eager", kernels="native")


def violations_but_of_parameters(model: Formula, batches: list[Tensor]) -> list[str]:
    """The native backward adds up the gradients of weight and bias in float32 (decision 0011)."""
    found = contract_violations(model, by_native, batches)
    return [each for each in found if "gradient of weight" not in each and "of bias" not in each]


@pytest.mark.parametrize("mean", [0.0, 30.0, 1000.0])
@pytest.mark.parametrize("shape", [(2, 8, 12, 10), (4, 8, 40, 30), (2, 8, 12, 18, 15)])
def test_groups_of_dense_channels(mean: float, shape: tuple[int, ...]) -> None:
    dense = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    batches = [x.contiguous(memory_format=dense) for x in draw(*shape, mean=mean)]
    model = Formula(in_groups)
    assert violations_but_of_parameters(model, batches) == []
    assert contract_violations(model, optimised, batches) == []  # by a kernel: of parameters too
    sites = [explain(each(Formula(in_groups)), batches[0]).sites for each in (by_native, optimised)]
    found = [(site.kind, site.lowering) for (site,) in sites]
    assert found == [("group_norm", "native"), ("group_norm", "generated")]


def in_groups_of_floats(m: Formula, x: Tensor) -> Tensor:
    return in_groups(m, x.float()).to(x.dtype)


@pytest.mark.parametrize("function", [in_groups, in_groups_of_floats])
@pytest.mark.parametrize("mean", [30.0, 300.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_groups_of_dense_half_channels(
    dtype: torch.dtype, mean: float, function: Callable[..., Any]
) -> None:
    batches = [
        x.to(dtype).contiguous(memory_format=torch.channels_last)
        for x in draw(4, 8, 40, 30, mean=mean)
    ]
    assert violations_but_of_parameters(Formula(function).to(dtype), batches) == []


@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_instances_of_dense_channels(mean: float) -> None:
    batches = draw(4, 40, 30, 8, mean=mean)
    assert violations_but_of_parameters(Formula(rows_of_channels), batches) == []


def test_a_sample_that_is_unlike_the_rest_is_in_the_variance() -> None:
    x = torch.randn(4, 16, 32, 32) + 500
    x[..., 4::8, 4::8] = torch.randn(4, 16, 4, 4)
    dense = x.contiguous(memory_format=torch.channels_last)
    error = (group_norm(dense, 4, None, None, 1e-5) - native_group_norm(x.double(), 4)).abs()
    assert error.max() < 1e-3  # of outputs as large as 8, where a mean of 500 alone gives 0.5


def running(m: Formula, x: Tensor) -> Tensor:
    """A batch norm of images that keeps its statistics."""
    along = (1, -1, 1, 1)
    if m.training:
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        count = x.numel() / x.shape[1]
        with torch.no_grad():
            m.mean.mul_(0.9).add_(0.1 * mean)
            m.variance.mul_(0.9).add_(0.1 * variance * count / (count - 1))
    else:
        mean, variance = m.mean, m.variance
    y = (x - mean.view(along)) / torch.sqrt(variance.view(along) + 1e-5)
    return y * m.weight.view(along) + m.bias.view(along)


@pytest.mark.parametrize("mean", [0.0, 1.0, 3.0])
def test_batches_of_dense_channels(mean: float) -> None:
    dense = torch.channels_last
    batches = [x.contiguous(memory_format=dense) for x in draw(8, 8, 44, 44, mean=mean)]
    model = Formula(running)
    assert violations_but_of_parameters(model, batches) == []
    assert contract_violations(model, optimised, batches) == []  # by a kernel: of parameters too
    sites = [explain(each(Formula(running)), batches[0]).sites for each in (by_native, optimised)]
    found = [(site.kind, site.lowering, len(site.state)) for (site,) in sites]
    assert found == [("batch_norm", "native", 2), ("batch_norm", "generated", 2)]


def test_second_derivatives_of_long_sums() -> None:
    x = torch.randn(4, 8, 40, 40).contiguous(memory_format=torch.channels_last)
    model = Formula(running)

    def derivatives(call: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaf = x.to(dtype, memory_format=torch.preserve_format).requires_grad_()
        (first,) = torch.autograd.grad(call(leaf).pow(3).sum(), leaf, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), (leaf, model.weight))

    found = derivatives(optimised(model), torch.float32)
    model.double()
    for mine, exact in zip(found, derivatives(model, torch.float64), strict=True):
        assert (mine - exact).abs().max() <= 1e-4 * exact.abs().max()


def float_statistics_of_half(m: Formula, x: Tensor) -> Tensor:
    wide = x.float()
    mean, variance = wide.mean(0), wide.var(0, unbiased=False)
    with torch.no_grad():
        m.mean.mul_(0.9).add_(0.1 * mean)
        m.variance.mul_(0.9).add_(0.1 * variance)
    return (x - mean.to(x.dtype)) / (variance.sqrt() + 1e-3).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_are_taken_in_the_users_dtype(dtype: torch.dtype) -> None:
    batches = [x.to(dtype) for x in draw(32, 8, mean=0, spread=400)]
    assert contract_violations(Formula(float_statistics_of_half), optimised, batches) == []


def test_half_rows_over_the_root_of_their_squares() -> None:
    model = Formula(lambda _, x: x / (x * x).sum(**KEEP).sqrt())
    batches = [x.half() for x in draw(8, 64, mean=0, spread=25)]
    assert contract_violations(model, optimised, batches) == []


def square_beside(_: Formula, x: Tensor) -> tuple[Tensor, Tensor]:
    square = x.pow(2).mean(**KEEP)
    return x / (square.sqrt() + 0.1), square.detach()


def square_under_no_grad(_: Formula, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        square = x.pow(2).mean(-1)
    return (x - x.mean(**KEEP)) / (x.std(**KEEP) + 0.1), square


@pytest.mark.parametrize("function", [square_beside, square_under_no_grad])
def test_a_returned_statistic_stays_detached(function: Callable[..., Any]) -> None:
    x = torch.randn(4, 8, requires_grad=True)
    _, statistic = optimised(Formula(function))(x)
    assert not statistic.requires_grad
    torch.testing.assert_close(statistic, Formula(function)(x)[1])


BIASED: dict[str, Callable[[Formula, Tensor], Tensor]] = {
    "rows": lambda m, x: (
        (x - x.mean(**KEEP)) / torch.sqrt(x.var(**KEEP, unbiased=False) + 1e-5) + m.bias
    ),
    "batch": lambda m, x: (x - x.mean(0)) / torch.sqrt(x.var(0, unbiased=False) + 1e-5) + m.bias,
}


@pytest.mark.parametrize("name", BIASED)
def test_second_derivatives_where_there_is_a_bias_alone(name: str) -> None:
    x = torch.randn(6, 8, dtype=torch.float64)
    model = Formula(BIASED[name]).double()

    def second(call: Any) -> Tensor:
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(call(leaf).pow(3).sum(), leaf, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), leaf)[0]

    expected = second(model)
    torch.testing.assert_close(second(optimised(model)), expected)


def test_a_constant_channel_without_eps_is_not_a_number() -> None:
    model = Formula(lambda _, x: (x - x.mean(0)) / x.std(0, unbiased=False))
    x = torch.randn(6, 8)
    x[:, 3] = 2.0
    assert optimised(model)(x)[:, 3].isnan().all()


def test_a_size_that_becomes_zero() -> None:
    def formula(_: Formula, x: Tensor) -> Tensor:
        centred = x - x.mean(**KEEP)
        return centred / (centred.square().sum(**KEEP) / (x.shape[-1] - 2) + 0.1).sqrt()

    model = optimize(Formula(formula), backend="eager", dynamic=True)
    for size in (5, 7, 2):
        x = torch.randn(4, size)
        torch.testing.assert_close(model(x), Formula(formula)(x))


def in_two_parts(_: Formula, x: Tensor) -> Tensor:
    """The deviation is rough, but the same in both parts: their difference is good."""
    mean = x.mean(1, keepdim=True)
    deviation = ((x * x).mean(1, keepdim=True) - mean * mean + 0.1).sqrt()
    y = x / deviation - mean / deviation
    total = y.abs().sum((0, 1, 2), keepdim=True)
    return (y - y.mean((0, 1, 2), keepdim=True)) / (total.square() + 0.1).sqrt()


@pytest.mark.parametrize("kernels", ["auto", "composite", "generated"])
def test_errors_that_two_parts_share(kernels: str) -> None:
    batches = draw(2, 4, 4, mean=30.0)

    def chosen(model: nn.Module) -> Any:
        return optimize(model, backend="eager", kernels=kernels)

    assert contract_violations(Formula(in_two_parts), chosen, batches) == []
