"""Hand-written norm modules that are equal to one of torch.nn, and others that are nearly so."""

from __future__ import annotations

import torch
from hand_written import Layer
from torch import Tensor, nn


class Weighted(Layer):
    """A weight and a bias."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)
        self.bias = nn.Parameter(torch.rand(size))

    def _affine(self, x: Tensor) -> Tensor:
        return x * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


class Groups(Weighted):
    """A GroupNorm of two groups."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        groups = x.view(n, 2, c // 2, h, w)
        mean = groups.mean((2, 3, 4), keepdim=True)
        variance = groups.var((2, 3, 4), unbiased=False, keepdim=True)
        return self._affine(((groups - mean) / torch.sqrt(variance + 1e-5)).view(n, c, h, w))


class Instances(Weighted):
    """An InstanceNorm2d."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        return self._affine((x - mean) * (x.var((2, 3), False, keepdim=True) + 1e-3).rsqrt())


class Bare(Layer):
    """A LayerNorm without parameters."""

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + 1e-6)


class RootMeanSquare(Layer):
    """An RMSNorm as language models write it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)
        self.variance_epsilon = 1e-6

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden.dtype)


class Tracking(Weighted):
    """A BatchNorm2d without a counter, of which one thing can be changed."""

    def __init__(self, size: int, **changes: object) -> None:
        super().__init__(size)
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(size))
        self.register_buffer("running_var", torch.ones(size))
        self.changes = changes

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.running_mean, self.running_var
        eps = 1e-5
        if self.training:
            mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
            if "detached" in self.changes:
                mean = mean.detach()
            n = x.size(0) if "by batch" in self.changes else x.numel() / x.size(1)
            unbiased = variance if "biased" in self.changes else variance * n / (n - 1)
            self.running_mean.lerp_(mean.detach(), 0.1)
            self.running_var.lerp_(unbiased.detach(), 0.2 if "uneven" in self.changes else 0.1)
        elif "eps" in self.changes:
            eps = 1e-3
        elif "batch in evaluation" in self.changes:
            mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        shape = (1, -1, 1, 1)
        y = (x - mean.view(shape)) / torch.sqrt(variance.view(shape) + eps)
        weight = 1 + self.weight if "one more" in self.changes else self.weight
        y = y * weight.view(shape) + self.bias.view(shape)
        if "activation" in self.changes:
            y = torch.relu(y)
        if "dropout" in self.changes:
            y = torch.dropout(y, 0.5, self.training)
        if "before" in self.changes:
            y = y + torch.sin(x)
        return y.double() if "double" in self.changes else y
