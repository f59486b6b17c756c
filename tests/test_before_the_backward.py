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


class Modulated(nn.Module):
    """A norm that is scaled and shifted by what another network computes for each sample."""

    def __init__(self, modulate: Callable[[Tensor, Tensor], Tensor], affine: bool) -> None:
        super().__init__()
        self.modulate, self.affine = modulate, affine
        self.weight = nn.Parameter(torch.rand(5) + 0.5)
        self.bias = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        variance = x.var(-1, unbiased=False, keepdim=True)
        y = (x - x.mean(-1, keepdim=True)) * torch.rsqrt(variance + 1e-5)
        return self.modulate(y * self.weight + self.bias if self.affine else y, scale)


MODULATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a sum": lambda y, scale: y * (1 + scale) + scale,
    "a multiple": lambda y, scale: torch.relu(y * (2 * scale)),
    "an opposite": lambda y, scale: y * -scale,
}


@pytest.mark.parametrize(
    ("modulation", "affine"),
    [("a sum", False), ("a multiple", False), ("a multiple", True), ("an opposite", True)],
)
def test_a_further_scale_changes(modulation: str, affine: bool) -> None:
    """The user's code saves what it computes of the scale, and may write to the scale itself."""
    users = Modulated(MODULATIONS[modulation], affine)
    x, drawn = torch.randn(4, 7, 5), torch.randn(4, 1, 5)
    found = []
    for model in (users, optimize(copy.deepcopy(users), backend="eager", kernels="generated")):
        leaf, given = x.clone().requires_grad_(), drawn.clone().requires_grad_()
        scale = given * 1
        y = model(leaf, scale)
        with torch.no_grad():
            scale.zero_()
        (y * torch.arange(5).cos()).sum().backward()
        found.append([y, leaf.grad, given.grad, *[p.grad for p in model.parameters()]])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
