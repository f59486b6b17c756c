"""The net of the forum thread that this project was born from, with its hand-written BatchNorm.

On discuss.pytorch.org it is "Implementing Batchnorm in Pytorch. Problem with updating
self.running_mean and self.running_var". Retold with its peculiarities, which must come right:

- the buffers are rebound, not updated, and nothing is detached: the autograd graph of every step so
  far hangs on them;
- the variance is corrected twice, by n / (n - 1) inside `var` and by the batch size beside it;
- momentum weighs the old value, where torch's weighs the new one;
- training or testing is an argument of `forward`.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

TRAINING, TESTING = 0, 1  # the thread's values of `mode`


class BatchNorm(nn.Module):
    """The thread's norm with the `else:` that its page lost: training normalises with the batch.

    running_mean, running_var: (channels,), float32.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, momentum: float = 0.9, eps: float = 1e-5) -> None:
        super().__init__()
        self.channels, self.momentum, self.eps = channels, momentum, eps
        self.weight = nn.Parameter(torch.rand(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor, mode: int) -> Tensor:
        if mode == TRAINING:
            mean, var = self.update(x)
        else:
            mean, var = self.running_mean, self.running_var
        return self.normalise(x, mean, var)

    def update(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Move the running statistics towards the batch's, which are returned."""
        keep, batch = self.momentum, x.shape[0]
        mean = x.mean([0, 2, 3])
        var = x.var([0, 2, 3])
        self.running_mean = keep * self.running_mean + (1.0 - keep) * mean
        self.running_var = keep * self.running_var + (1.0 - keep) * (batch / (batch - 1) * var)
        return mean, var

    def normalise(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        shape = [1, self.channels, 1, 1]
        mean, var = mean.view(shape).expand_as(x), var.view(shape).expand_as(x)
        weight, bias = self.weight.view(shape).expand_as(x), self.bias.view(shape).expand_as(x)
        return weight * (x - mean) / (var + self.eps).sqrt() + bias


class LiteralBatchNorm(BatchNorm):
    """The thread's norm to the letter: training uses the running statistics just updated."""

    def forward(self, x: Tensor, mode: int) -> Tensor:
        if mode == TRAINING:
            self.update(x)
        return self.normalise(x, self.running_mean, self.running_var)


class NativeBatchNorm(nn.BatchNorm2d):
    """torch's own, called the thread's way."""

    def forward(self, input: Tensor, mode: int = TRAINING) -> Tensor:
        return functional.batch_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=mode == TRAINING,
            momentum=self.momentum or 0.0,
            eps=self.eps,
        )


class Net(nn.Module):
    """conv 3 -> 64, norm, relu, two pools, linear: (batch, 3, 32, 32) -> logits (batch, 10)."""

    bn1: BatchNorm | NativeBatchNorm

    def __init__(self, norm: Callable[[int], BatchNorm | NativeBatchNorm] = BatchNorm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1)
        self.bn1 = norm(64)
        self.pool = nn.MaxPool2d(kernel_size=2, stride=2)
        self.avgpool = nn.AvgPool2d(kernel_size=1, stride=1)
        self.classifier = nn.Linear(64 * 16 * 16, 10)

    def forward(self, x: Tensor, mode: int = TRAINING) -> Tensor:
        x = self.avgpool(self.pool(functional.relu(self.bn1(self.conv1(x), mode))))
        logits: Tensor = self.classifier(x.view(x.size(0), -1))
        return logits
