"""Norms as people write them: what the benchmarks optimise and compare with the native modules."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class BatchNorm(nn.Module):
    """BatchNorm over a channel axis 1, with running statistics, in the usual spelling."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            count = x.numel() / x.size(1)
            mean = x.mean([0, 2, 3])
            var = x.var([0, 2, 3], unbiased=False)
            with torch.no_grad():
                m = self.momentum
                self.running_mean = m * mean + (1 - m) * self.running_mean
                self.running_var = m * var * count / (count - 1) + (1 - m) * self.running_var
        else:
            mean, var = self.running_mean, self.running_var
        x = (x - mean[None, :, None, None]) / torch.sqrt(var[None, :, None, None] + self.eps)
        return x * self.weight[None, :, None, None] + self.bias[None, :, None, None]


class LayerNorm(nn.Module):
    """LayerNorm over the last axis."""

    def __init__(self, features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        var = centred.pow(2).mean(-1, keepdim=True)
        return self.weight * (centred / torch.sqrt(var + self.eps)) + self.bias


class RMSNorm(nn.Module):
    """RMSNorm over the last axis."""

    def __init__(self, features: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class GroupNorm(nn.Module):
    """GroupNorm through a view that splits the channels; the memory layout stays."""

    def __init__(self, groups: int, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.unflatten(x, 1, (self.groups, -1))
        mean = x.mean((2, 3, 4), keepdim=True)
        var = x.var((2, 3, 4), keepdim=True, unbiased=False)
        x = ((x - mean) / (var + self.eps).sqrt()).flatten(1, 2)
        return x * self.weight + self.bias


class L2Normalize(nn.Module):
    """Division by the Euclidean length along one axis."""

    def __init__(self, axis: int, eps: float = 1e-12) -> None:
        super().__init__()
        self.axis, self.eps = axis, eps

    def forward(self, x: Tensor) -> Tensor:
        return x / x.pow(2).sum(self.axis, keepdim=True).sqrt().clamp_min(self.eps)


class NativeL2Normalize(nn.Module):
    """`functional.normalize` as a module."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        return functional.normalize(x, dim=self.axis)
