"""What follows a norm is computed by its kernel, where nobody can tell; else it stays."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract import contract_violations
from torch import Tensor, nn
from torch.nn import functional

from bnrewrite import explain, optimize

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
    "residual, relu6": lambda y, other: functional.relu6(y + other),
    "residual in place": in_place,
    "leaky": lambda y, _: functional.leaky_relu(y),
    "leaky by a slope": lambda y, _: functional.leaky_relu(y, negative_slope=-0.3),
    "residual, leaky": lambda y, other: functional.leaky_relu(y + other, 0.2),
    "silu": lambda y, _: functional.silu(y),
    "gelu": lambda y, _: functional.gelu(y),
    "gelu by tanh": lambda y, _: functional.gelu(y, approximate="tanh"),
    "sigmoid": lambda y, _: torch.sigmoid(y),
    "tanh": lambda y, _: torch.tanh(y),
    "twice itself": lambda y, _: torch.relu(y + y),
}
LEFT: dict[str, Ending] = {
    "used elsewhere": lambda y, _: torch.relu(y) + y,
    "a sum that is used elsewhere": lambda y, other: torch.relu(y + other) * (y + other),
    "broadcast": lambda y, other: torch.relu(y + other[:1]),
    "scaled residual": lambda y, other: torch.relu(torch.add(y, other, alpha=2)),
    "other bounds": lambda y, _: functional.hardtanh(y, 0.0, 5.0),
    "residual, silu": lambda y, other: functional.silu(y + other),
    "residual, turned": lambda y, other: functional.leaky_relu(y + other, -0.2),
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


@pytest.mark.parametrize("other", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dense", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("ending", TAKEN)
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
