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


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of images, as ConvNeXt has it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt((x - mean).pow(2).mean(1, keepdim=True) + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class NativeChannelNorm(nn.LayerNorm):
    """The same by the native operator, between two permutations."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class InstanceNorm(nn.Module):
    """InstanceNorm with an affine."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        std = (x.var((2, 3), keepdim=True, unbiased=False) + self.eps).sqrt()
        return (x - mean) / std * self.weight + self.bias


class Channels(nn.Module):
    """What the norms below have in common: a weight and a bias of each channel of images."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))


class StoredNorm(Channels):
    """A batch norm that normalises with the statistics that it has just stored."""

    mean: Tensor
    variance: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("variance", torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            mean = x.mean((0, 2, 3), keepdim=True)
            variance = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
            self.mean = 0.9 * self.mean + 0.1 * mean
            self.variance = 0.9 * self.variance + 0.1 * variance
        return (x - self.mean) / torch.sqrt(self.variance + 1e-5) * self.weight + self.bias


class DeviationNorm(Channels):
    """Division by the unbiased standard deviation plus eps, which no operator has."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((0, 2, 3), keepdim=True)
        return (x - mean) / (x.std((0, 2, 3), keepdim=True) + 1e-3) * self.weight + self.bias


class BatchRenorm(StoredNorm):
    """Batch renormalisation: corrected towards the stored statistics, within limits."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((0, 2, 3), keepdim=True)
        std = (x.var((0, 2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
        stored = (self.variance + 1e-5).sqrt()
        r = (std.detach() / stored).clamp(1 / 3, 3)
        d = ((mean.detach() - self.mean) / stored).clamp(-5, 5)
        with torch.no_grad():
            self.mean += 0.1 * (mean - self.mean)
            self.variance += 0.1 * (std**2 - self.variance)
        return ((x - mean) / std * r + d) * self.weight + self.bias


class AdaptiveNorm(nn.Module):
    """Adaptive instance normalisation: scale and shift of each sample come from a style."""

    style: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.affine = nn.Linear(16, 2 * channels)
        self.register_buffer("style", torch.linspace(-1, 1, 16))

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.affine(self.style.expand(len(x), -1))[..., None, None].chunk(2, 1)
        mean, std = x.mean((2, 3), keepdim=True), x.std((2, 3), keepdim=True) + 1e-5
        y: Tensor = (1 + scale) * (x - mean) / std + shift
        return y


class ResponseNorm(Channels):
    """Filter response normalisation, without its threshold."""

    def forward(self, x: Tensor) -> Tensor:
        length = torch.rsqrt(x.pow(2).mean((2, 3), keepdim=True) + 1e-6)
        y: Tensor = self.weight * (x * length) + self.bias
        return y


class GlobalResponseNorm(Channels):
    """ConvNeXt V2's: lengths of the channels over their mean, and a shortcut."""

    def forward(self, x: Tensor) -> Tensor:
        length: Tensor = torch.norm(x, p=2, dim=(2, 3), keepdim=True)
        return self.weight * (x * (length / (length.mean(1, keepdim=True) + 1e-6))) + self.bias + x


class SwitchedNorm(Channels):
    """Statistics of instances, layers and batches, mixed by weights that are learnt."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.mean_weight = nn.Parameter(torch.ones(3))
        self.var_weight = nn.Parameter(torch.ones(3))
        self.register_buffer("running_mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("running_var", torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = x.mean((2, 3), keepdim=True), x.var((2, 3), keepdim=True)
        square = var + mean**2
        layer_mean = mean.mean(1, keepdim=True)
        layer_var = square.mean(1, keepdim=True) - layer_mean**2
        if self.training:
            batch_mean = mean.mean(0, keepdim=True)
            batch_var = square.mean(0, keepdim=True) - batch_mean**2
            self.running_mean.mul_(0.9).add_(0.1 * batch_mean.detach())
            self.running_var.mul_(0.9).add_(0.1 * batch_var.detach())
        else:
            batch_mean, batch_var = self.running_mean, self.running_var
        a, b = torch.softmax(self.mean_weight, 0), torch.softmax(self.var_weight, 0)
        mean = a[0] * mean + a[1] * layer_mean + a[2] * batch_mean
        var = b[0] * var + b[1] * layer_var + b[2] * batch_var
        y: Tensor = (x - mean) / torch.sqrt(var + 1e-5)
        return y * self.weight + self.bias
