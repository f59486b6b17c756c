"""Hand-written norms that the tests of capture and of state run on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn


class Layer(nn.Module):
    """A module whose call is known to give a tensor."""

    if TYPE_CHECKING:

        def __call__(self, *args: Any, **kwargs: Any) -> Tensor: ...


class RowNorm(Layer):
    """A LayerNorm over the last axis."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)
        self.bias = nn.Parameter(torch.rand(size))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = x.var(-1, unbiased=False, keepdim=True)
        return (x - mean) / torch.sqrt(variance + 1e-5) * self.weight + self.bias


class BatchNorm(Layer):
    """A BatchNorm over the second axis; `update` says how its running statistics are kept."""

    def __init__(self, channels: int, update: str = "rebind") -> None:
        super().__init__()
        self.update = update
        self.weight = nn.Parameter(torch.rand(channels) + 0.5)
        self.bias = nn.Parameter(torch.rand(channels))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.num_batches_tracked: Tensor
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, *[1] * (x.dim() - 2))
        if self.training:
            axes = [0, *range(2, x.dim())]
            mean, variance = x.mean(axes), x.var(axes, unbiased=False)
            self.num_batches_tracked += 1
            count = x.numel() / x.size(1)
            self.track(mean, variance * count / (count - 1))
        else:
            mean, variance = self.running_mean, self.running_var
        y = (x - mean.view(shape)) / torch.sqrt(variance.view(shape) + 1e-5)
        return y * self.weight.view(shape) + self.bias.view(shape)

    def track(self, mean: Tensor, variance: Tensor) -> None:
        if self.update == "rebind":
            self.running_mean = 0.9 * self.running_mean + 0.1 * mean
            self.running_var = 0.9 * self.running_var + 0.1 * variance
        elif self.update == "rebind detached":
            self.running_mean = 0.9 * self.running_mean + 0.1 * mean.detach()
            self.running_var = 0.9 * self.running_var + 0.1 * variance.detach()
        elif self.update == "rebind without gradients":
            with torch.no_grad():
                self.running_mean = 0.9 * self.running_mean + 0.1 * mean
                self.running_var = 0.9 * self.running_var + 0.1 * variance
        elif self.update == "in place":
            self.running_mean.mul_(0.9).add_(0.1 * mean)
            self.running_var.mul_(0.9).add_(0.1 * variance)
        elif self.update == "in place without gradients":
            with torch.no_grad():
                self.running_mean.mul_(0.9).add_(0.1 * mean)
                self.running_var.mul_(0.9).add_(0.1 * variance)
        elif self.update == "copy":
            self.running_mean.copy_(0.9 * self.running_mean + 0.1 * mean.detach())
            self.running_var.copy_(0.9 * self.running_var + 0.1 * variance.detach())
        elif self.update == "lerp":
            self.running_mean.lerp_(mean.detach(), 0.1)
            self.running_var.lerp_(variance.detach(), 0.1)
        elif self.update == "data":
            self.running_mean.data = 0.9 * self.running_mean.data + 0.1 * mean.data
            self.running_var.data = 0.9 * self.running_var.data + 0.1 * variance.data
        elif self.update == "data in place":
            self.running_mean.data.mul_(0.9).add_(mean.data, alpha=0.1)
            self.running_var.data.mul_(0.9).add_(variance.data, alpha=0.1)
        else:
            assert self.update == "cumulative average"
            factor = 1.0 / float(self.num_batches_tracked)
            with torch.no_grad():
                self.running_mean = factor * mean + (1 - factor) * self.running_mean
                self.running_var = factor * variance + (1 - factor) * self.running_var


UPDATES = (
    "rebind",
    "rebind detached",
    "rebind without gradients",
    "in place",
    "in place without gradients",
    "copy",
    "lerp",
    "data",
    "data in place",
    "cumulative average",
)


class Net(Layer):
    """A convolution, a hand-written BatchNorm, a ReLU."""

    def __init__(self, channels: int = 4, update: str = "rebind") -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3)
        self.norm = BatchNorm(channels, update)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)))


class Running(Layer):
    """A BatchNorm that updates its statistics before it normalises, or as the last thing it does.

    Activation checkpointing stops computing the forward again once it has all that was saved: the
    first kind is updated twice, the second once, where nothing is saved behind it.
    """

    def __init__(self, size: int, at_the_end: bool = False) -> None:
        super().__init__()
        self.at_the_end = at_the_end
        self.weight = nn.Parameter(torch.rand(size))
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = x.mean(0), x.var(0)
        if not self.training:
            mean = self.mean
        elif not self.at_the_end:
            self.mean.lerp_(mean.detach(), 0.1)
        y = self.weight * (x - mean) / torch.sqrt(variance + 1e-5)
        if self.training and self.at_the_end:
            self.mean.lerp_(mean.detach(), 0.1)
        return y


def images(size: int = 4) -> Tensor:
    """A batch for `Net`."""
    return torch.randn(size, 3, 8, 8)


def row_norm(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Docstring of the user's."""
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + eps)


def same(model: Any, other: Any, x: Tensor) -> None:
    """Both give the same on x."""
    torch.testing.assert_close(model(x), other(x), rtol=1e-4, atol=1e-5)


def train(model: Any, x: Tensor) -> None:
    """One step with a cotangent that is random, and the same each time."""
    torch.manual_seed(0)
    y = model(x)
    torch.autograd.backward((y.float() * torch.randn(y.shape)).sum())
