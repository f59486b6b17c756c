"""Models for the tests of verify(): right ones, and ones that are wrong in one place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class HandWritten(nn.Module):
    """A batch norm with switches, each of which is one wrong rewrite of it."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(channels) + 0.5)
        self.bias = nn.Parameter(torch.randn(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self.eps = 1e-5
        self.momentum = 0.1
        self.unbiased = True
        self.detached_mean = False
        self.statistics: torch.dtype | None = None
        self.ticks = 1
        self.offset = 0.0
        self.result: torch.dtype | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            source = x if self.statistics is None else x.to(self.statistics)
            mean = source.mean((0, 2, 3)).to(x.dtype)
            variance = source.var((0, 2, 3), correction=0).to(x.dtype)
            n = x.numel() / x.shape[1]
            correction = n / (n - 1) if self.unbiased else 1.0
            with torch.no_grad():
                self.num_batches_tracked += self.ticks
                self.running_mean.mul_(1 - self.momentum).add_(self.momentum * mean)
                self.running_var.mul_(1 - self.momentum).add_(self.momentum * correction * variance)
        else:
            mean, variance = self.running_mean, self.running_var
        if self.detached_mean:
            mean = mean.detach()
        y = (x - over(mean)) / torch.sqrt(over(variance) + self.eps)
        return (y * over(self.weight) + over(self.bias) + self.offset).to(self.result or x.dtype)


class Forum(nn.Module):
    """Rebinds its buffers, with their history, and normalises with the updated ones."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, repaired: bool = False) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(4))
        self.register_buffer("running_var", torch.ones(4))
        self.repaired = repaired

    def forward(self, x: Tensor) -> Tensor:
        mean = 0.9 * self.running_mean + 0.1 * x.mean((0, 2, 3))
        variance = 0.9 * self.running_var + 0.1 * x.var((0, 2, 3))
        if self.repaired:
            self.running_mean.copy_(mean.detach())
            self.running_var.copy_(variance.detach())
        else:
            self.running_mean, self.running_var = mean, variance
        return (x - over(mean)) / torch.sqrt(over(variance) + 1e-5)


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def over(channels: Tensor) -> Tensor:
    return channels.view(1, -1, 1, 1)


def images(**kind: Any) -> Tensor:
    return torch.randn(3, 3, 5, 5, generator=torch.Generator().manual_seed(5)).to(**kind)


def net(norm: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(1)
    norm = norm or HandWritten()
    return nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.Sigmoid(), nn.Flatten(), nn.Linear(100, 2))


def images_dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def changed(model: nn.Sequential, **change: Any) -> nn.Sequential:
    other = copy.deepcopy(model)
    for name, value in change.items():
        setattr(other[1], name, value)
    return other


def native(model: nn.Sequential) -> nn.Sequential:
    other = copy.deepcopy(model)
    norm = nn.BatchNorm2d(4)
    norm.load_state_dict(model[1].state_dict())
    other[1] = norm.to(images_dtype(model))
    return other.train(model.training)
