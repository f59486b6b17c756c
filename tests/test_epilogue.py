"""What follows a norm is computed by its kernel, where nobody can tell; else it stays."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract import contract_violations
from torch import Tensor, nn
from torch.nn import functional

from bnrewrite import explain, optimize
from bnrewrite.kernels.generated import call, runtime

pytestmark = pytest.mark.usefixtures("repeatable")
Ending = Callable[[Tensor, Tensor], Tensor]


class Block(nn.Module):
    """A batch norm with running statistics and what follows it."""

    running: Tensor

    def __init__(self, ending: Ending) -> None:
        super().__init__()
        self.ending = ending
        self.weight = nn.Parameter(torch.rand(6) + 0.5)
        self.bias = nn.Parameter(torch.randn(6))
        self.register_buffer("running", torch.zeros(6))

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        with torch.no_grad():
            self.running.mul_(0.9).add_(0.1 * mean)
        along = (-1, 1, 1)
        y = (x - mean.view(along)) / torch.sqrt(variance.view(along) + 1e-5)
        return self.ending(y * self.weight.view(along) + self.bias.view(along), other)


def in_place(y: Tensor, other: Tensor) -> Tensor:
    y += other
    return functional.relu(y, inplace=True)


TAKEN: dict[str, Ending] = {
    "relu": lambda y, _: torch.relu(y),
    "relu6": lambda y, _: functional.relu6(y),
    "residual": lambda y, other: torch.relu(y + other),
    "residual first": lambda y, other: torch.relu(other + y),
    "residual in place": in_place,
    "leaky": lambda y, _: functional.leaky_relu(y),
    "leaky by a slope": lambda y, _: functional.leaky_relu(y, negative_slope=-0.3),
    "silu": lambda y, _: functional.silu(y),
    "gelu": lambda y, _: functional.gelu(y),
    "gelu by tanh": lambda y, _: functional.gelu(y, approximate="tanh"),
    "sigmoid": lambda y, _: torch.sigmoid(y),
    "tanh": lambda y, _: torch.tanh(y),
    "twice itself": lambda y, _: torch.relu(y + y),
    "scaled for each sample": lambda y, o: torch.relu(
        y * (1 + o[:, :, :1, :1]) + o[:, :, 1:2, 1:2]
    ),
    "scaled inside a channel": lambda y, other: functional.silu(y * other[:1, :1]),
    "broadcast": lambda y, other: torch.relu(y + other[:1]),
    "masked": lambda y, other: torch.relu(y * (other[:, :, :1] > 0)),
    "within limits": lambda y, other: torch.relu(y * other[:1, :, :1, :1].clamp(-0.5, 0.5)),
    "permuted between": lambda y, other: torch.relu((y.mT * other[0, 0, 0, 0]).mT + 1.5),
}
LEFT: dict[str, Ending] = {
    "used elsewhere": lambda y, _: torch.relu(y) + y,
    "a sum that is used elsewhere": lambda y, other: torch.relu(y + other) * (y + other),
    "scaled by another": lambda y, other: torch.relu(y * other),
    "scaled by its own": lambda y, _: torch.relu(y * y.mean((2, 3), keepdim=True)),
    "scaled by infinity": lambda y, _: torch.relu(y * math.inf),
    "scaled by what has no kernel": lambda y, other: torch.relu(y * other[:1].exp() * other),
    "residual, relu6": lambda y, other: functional.relu6(y + other),
    "scaled residual": lambda y, other: torch.relu(torch.add(y, other, alpha=2)),
    "other bounds": lambda y, _: functional.hardtanh(y, 0.0, 5.0),
    "residual, silu": lambda y, other: functional.silu(y + other),
    "residual, leaky": lambda y, other: functional.leaky_relu(y + other, 0.2),
    "no activation": lambda y, other: y + other,
    "another dtype": lambda y, other: torch.relu(y + other.double()),
}


def forced(model: nn.Module) -> Any:
    return optimize(model, backend="eager", kernels="generated")


def draw(dense: torch.memory_format, other: torch.memory_format) -> list[tuple[Tensor, Tensor]]:
    shape = (4, 6, 5, 7)
    return [
        (
            torch.randn(shape).contiguous(memory_format=dense),
            torch.randn(shape).contiguous(memory_format=other),
        )
        for _ in range(3)
    ]


def activations(model: Any, inputs: tuple[Tensor, Tensor]) -> int:
    """How many are left beside the one kernel."""
    ((_, after),) = explain(model, *inputs).graph_texts
    assert after.count("generated.call.norm") == 1
    names = ("relu", "hardtanh", "silu", "gelu", "sigmoid", "tanh")
    return sum(after.count(f"aten.{name}") for name in (*names, "leaky_relu"))


LAYOUTS = (torch.contiguous_format, torch.channels_last)


@pytest.mark.parametrize(
    ("ending", "dense", "other"),
    [
        (ending, dense, other)
        for ending in TAKEN
        for dense in LAYOUTS
        for other in (LAYOUTS if "residual" in ending else (dense,))
    ],
)
def test_a_kernel_takes_it(
    ending: str, dense: torch.memory_format, other: torch.memory_format
) -> None:
    """In whatever layout the residual is: the result has the user's."""
    users, batches = Block(TAKEN[ending]), draw(dense, other)
    assert contract_violations(users, forced, batches) == []
    model = forced(copy.deepcopy(users))
    assert activations(model, batches[0]) == 0
    assert model(*batches[0]).stride() == users(*batches[0]).stride()


@pytest.mark.parametrize("ending", LEFT)
def test_anything_else_stays(ending: str) -> None:
    users, batches = Block(LEFT[ending]), draw(torch.contiguous_format, torch.contiguous_format)
    assert contract_violations(users, forced, batches) == []
    remaining = activations(forced(copy.deepcopy(users)), batches[0])
    assert remaining == (ending != "no activation")


def test_zero_times_a_tensor_has_a_gradient() -> None:
    """All else is made where no gradient is recorded: without it ``backward`` would raise."""

    class Held(nn.Module):
        def forward(self, x: Tensor, _: Tensor) -> Tensor:
            with torch.no_grad():
                y = (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)
            return torch.tanh(y + x * 0.0)

    x, other = draw(torch.contiguous_format, torch.contiguous_format)[0]
    forced(Held())(x.requires_grad_(), other).sum().backward()
    assert x.grad is not None
    assert not x.grad.any()


def test_a_region_without_gradients_between() -> None:
    def ending(y: Tensor, other: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.relu(y) + other

    users, batches = Block(ending), draw(torch.contiguous_format, torch.contiguous_format)
    assert not forced(copy.deepcopy(users))(*batches[0]).requires_grad
    assert activations(forced(copy.deepcopy(users)), batches[0]) == 1


def test_it_can_be_switched_off() -> None:
    users, batches = Block(TAKEN["relu"]), draw(torch.contiguous_format, torch.contiguous_format)
    model = optimize(
        copy.deepcopy(users), backend="eager", kernels="generated", disable=["epilogue"]
    )
    assert activations(model, batches[0]) == 1


@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("ending", ["relu", "relu6", "silu", "residual"])
@pytest.mark.parametrize("twice", [False, True])
def test_what_may_change_before_the_backward(
    ending: str, twice: bool, built: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sum saves neither of its parts: a residual may be written over, and a bias too."""
    monkeypatch.setattr(call, "_kernels", {})
    monkeypatch.setattr(runtime, "_programs", {})
    if built:
        runtime.build()
    else:
        monkeypatch.setattr(runtime, "add", lambda *_: None)
    users, ((x, other), *_) = Block(TAKEN[ending]).double(), draw(*[torch.contiguous_format] * 2)
    found = []
    for model in (users, forced(copy.deepcopy(users))):
        leaves = [x.double().requires_grad_(), other.double().requires_grad_()]
        residual = leaves[1] * 1
        y = model(leaves[0], residual)
        with torch.no_grad():
            residual.neg_()
            model.bias.neg_()
        leaves += [model.weight, model.bias]
        loss = (y * y.detach().cos()).sum()
        first = torch.autograd.grad(loss, leaves, create_graph=twice, allow_unused=True)
        penalty = first[0].square().sum()
        found.append([y, *first])
        if twice:
            of = [leaves[0], *leaves[2 : 4 if ending == "silu" else 3]]  # a bias moves its slope
            found[-1] += torch.autograd.grad(penalty, of)
    torch.testing.assert_close(*found)


def test_a_result_that_is_written_over_before_the_backward() -> None:
    """Behind ReLU6 it may be: its backward reads what it was applied to, not what it made."""
    users, ((x, other), *_) = Block(LEFT["residual, relu6"]), draw(*[torch.contiguous_format] * 2)
    found = []
    for model in (users, forced(copy.deepcopy(users))):
        leaf = x.clone().requires_grad_()
        result = model(leaf, other).mul_(2)
        (result * torch.arange(7)).sum().backward()
        found.append([result, leaf.grad])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


class Renormalised(nn.Module):
    """A norm whose further scale and shift are made of its statistics, within limits."""

    stored: Tensor

    def __init__(self, limit: Callable[[Tensor], Tensor], *, shortcut: bool = False) -> None:
        super().__init__()
        self.limit, self.shortcut = limit, shortcut
        self.register_buffer("stored", torch.linspace(0.5, 2, 6).view(6, 1, 1))

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        mean = x.mean((0, 2, 3), keepdim=True)
        deviation = (x.var((0, 2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
        y = (x - mean) / deviation * self.limit(deviation.detach() / self.stored)
        y = y + self.limit((mean.detach() - 0.1) / self.stored)
        with torch.no_grad():
            self.stored.mul_(0.9).add_(0.1 * deviation[0])
        return torch.tanh(x + y if self.shortcut else y)


LIMITS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda r: r,
    "both": lambda r: r.clamp(0.8, 1.2),
    "below": lambda r: r.clamp_min(-0.05),
    "above": lambda r: r.clamp(max=0.9),
}


@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize("limit", LIMITS)
def test_a_further_scale_of_statistics(limit: str, shortcut: bool) -> None:
    users = Renormalised(LIMITS[limit], shortcut=shortcut)
    batches = draw(torch.contiguous_format, torch.contiguous_format)
    assert contract_violations(users, forced, batches) == []
    model, (x, other) = forced(copy.deepcopy(users)), batches[0]
    x.requires_grad_()  # else the statistic and the same one detached cancel
    assert activations(model, (x, other)) == 0
    (site,) = explain(model, x, other).sites
    assert (site.kind, site.lowering) == ("batch_norm", "generated")


@pytest.mark.parametrize("limit", [torch.exp, lambda r: r.clamp(0.8, math.inf)])
def test_a_further_scale_without_a_kernel_leaves_the_norm_its_own(
    limit: Callable[[Tensor], Tensor],
) -> None:
    """An exponential of a statistic, an infinite number: the kernel is that of the norm alone."""
    users = Renormalised(limit)
    batches = draw(torch.contiguous_format, torch.contiguous_format)
    assert contract_violations(users, forced, batches) == []
    model = forced(copy.deepcopy(users))
    assert activations(model, batches[0]) == 1
    assert [site.lowering for site in explain(model, *batches[0]).sites] == ["generated"]


class Joined(nn.Module):
    """A block of a residual network whose shortcut has a norm too."""

    def __init__(self, *, same: bool) -> None:
        super().__init__()
        self.same = same
        self.first, self.second = Block(lambda y, _: y), Block(lambda y, _: y)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return torch.relu(self.first(x, other) + self.second(x if self.same else other, other))


def test_two_norms_of_one_tensor() -> None:
    batches = draw(torch.contiguous_format, torch.contiguous_format)
    assert contract_violations(Joined(same=True), forced, batches) == []


def test_a_sum_of_two_norms_goes_to_one_of_them() -> None:
    users = Joined(same=False)
    batches = draw(torch.contiguous_format, torch.contiguous_format)
    assert contract_violations(users, forced, batches) == []
    report = explain(forced(copy.deepcopy(users)), *batches[0])
    assert [site.lowering for site in report.sites] == ["generated"] * 2
    ((_, after),) = report.graph_texts
    assert "relu.default" not in after
    assert "aten.var" not in after
