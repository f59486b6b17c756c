"""What may happen between a forward and its backward in the user's code may happen in ours."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnrewrite import optimize

pytestmark = pytest.mark.usefixtures("repeatable")


class Stored(nn.Module):
    """A norm by stored statistics, of ``factor`` times x, plus ``more`` times x."""

    mean: Tensor
    variance: Tensor

    def __init__(self, factor: float = 1.0, more: float = 0.0) -> None:
        super().__init__()
        self.factor, self.more = factor, more
        self.weight = nn.Parameter(torch.rand(6) + 0.5)
        self.bias = nn.Parameter(torch.randn(6))
        self.register_buffer("mean", torch.randn(6))
        self.register_buffer("variance", torch.rand(6) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        along = (-1, 1, 1)
        x = x * self.factor
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(x.mean((0, 2, 3)), 0.1)
        y = (x - self.mean.view(along)) / torch.sqrt(self.variance.view(along) + 1e-5)
        y = y * self.weight.view(along) + self.bias.view(along)
        return y + self.more * x if self.more else y


def load(model: nn.Module) -> None:
    model.load_state_dict({k: 2 * v for k, v in model.named_buffers()}, strict=False)


def write_past_autograd(model: nn.Module) -> None:
    for buffer in model.buffers():
        buffer.data.mul_(2)


def train(model: nn.Module) -> None:
    model.train()
    model(torch.ones(2, 6, 3, 5))


@pytest.mark.parametrize("between", [load, write_past_autograd, train])
@pytest.mark.parametrize(("factor", "more"), [(1.0, 0.0), (1.3, 1.0)])
@pytest.mark.parametrize("kernels", ["auto", "composite"])
def test_stored_statistics_change(
    kernels: str, factor: float, more: float, between: Callable[[Any], None]
) -> None:
    """No sum of the user's code saves them: a backward has to find them as they were."""
    users, x = Stored(factor, more).eval(), torch.randn(4, 6, 3, 5)
    found = []
    for model in (users, optimize(copy.deepcopy(users), backend="eager", kernels=kernels)):
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        between(model)
        (y * y.detach().cos()).sum().backward()
        found.append([y, leaf.grad, model.weight.grad, model.bias.grad])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


class Rows(nn.Module):
    """A layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(5) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        variance = x.var(-1, unbiased=False, keepdim=True)
        return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(variance + 1e-5) * self.weight


@pytest.mark.parametrize("users", [Stored().eval(), Rows()], ids=["stored", "rows"])
def test_an_input_made_in_inference_mode(users: nn.Module) -> None:
    """Autograd saves none of those, and the user's code asks for none to be saved."""
    with torch.inference_mode():
        x = torch.randn(4, 6, 3, 5)
    model = optimize(copy.deepcopy(users), backend="eager", kernels="generated")
    found = []
    for each in (users, model):
        y = each(x)
        (y * y.detach().cos()).sum().backward()
        found.append([y, *[p.grad for p in each.parameters()]])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
