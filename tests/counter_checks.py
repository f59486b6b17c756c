"""What two processes check of code that counts samples, or divides by them, beside such norms."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.distributed as dist
from hand_written import Layer
from synchronised_checks import COUNT, PARTS, equals_whole, is_left
from torch import Tensor
from torch._dynamo.utils import counters

import bnrewrite


class Seen(Layer):
    """A running mean in which every sample that was ever seen has the same weight."""

    def __init__(self, update: str) -> None:
        super().__init__()
        self.update = update
        self.mean: Tensor
        self.seen: Tensor
        self.count: Tensor
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("seen", torch.tensor(0.0))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        mean, variance, n = x.mean(0), x.var(0, unbiased=False), x.shape[0]
        with torch.no_grad():
            if self.update == "before":
                momentum = n / (self.count + n)
                self.mean.mul_(1 - momentum).add_(momentum * mean)
                self.count += n
            elif self.update == "rebound":
                self.seen = self.seen + n / 2
                self.mean = self.mean + (mean - self.mean) * (n / 2 / self.seen)
            elif self.update == "used later":
                self.count += x.numel() // x.shape[1]
                self.mean.lerp_(mean, n / self.count)
            elif self.update == "a product":
                self.seen = self.seen * n + 1
                self.mean.lerp_(mean, n / (self.seen + n))
            elif self.update == "a mask":
                self.mean.lerp_(mean, n / (self.seen + n))
                self.seen += (x[:, 0] > 0).sum()
            elif self.update == "a tensor":
                self.mean.lerp_(mean, 1 / torch.full((), n))
            else:
                assert self.update == "a product alone"
                self.seen = self.seen * n + 1
        y = (x - mean) / torch.sqrt(variance + 1e-5)
        return y + torch.exp(x) * self.count if self.update == "used later" else y


def counts_all(update: str, backend: str = "eager") -> None:
    """The weight of a batch is that of all samples among all that were ever seen."""
    batches = [torch.randn(COUNT, 4) for _ in range(2)]
    equals_whole(Seen(update), batches, PARTS[dist.get_world_size()], backend)


class Divided(Layer):
    """Sums over the batch, with a division in Python."""

    def forward(self, x: Tensor) -> Tensor:
        share = 1.0 / x.shape[0]
        mean = x.sum(0) * share
        return (x - mean) / torch.sqrt((x - mean).square().sum(0) * share + 1e-5)


def divides() -> None:
    """By no sample too, in the graph of the first batch."""
    before = counters["stats"]["unique_graphs"]
    batches = [torch.randn(COUNT, 4) for _ in range(2)]
    equals_whole(Divided(), batches, PARTS[dist.get_world_size()])
    assert counters["stats"]["unique_graphs"] == before + 1


def divides_by_nothing_first() -> None:
    """A first batch without samples raises what the user's own code raises."""
    model = bnrewrite.optimize(Divided(), backend="eager", sync_stats=True)
    with pytest.raises(ZeroDivisionError, match="float division by zero"):
        model(torch.randn(0, 4))


def stays_exact() -> None:
    """An integer beyond the digits of the statistics' dtype takes the samples of all."""
    model = bnrewrite.optimize(Seen("before"), backend="eager", sync_stats=True)
    model.count.fill_(2**40)
    model(torch.randn(3 + dist.get_rank(), 4))
    assert int(model.count) == 2**40 + 7


ON_TWO: dict[str, Callable[[], None]] = {
    "samples counted before": partial(counts_all, "before"),
    "samples counted, rebound": partial(counts_all, "rebound", backend="aot_eager"),
    "samples counted, used later": partial(counts_all, "used later"),
    "a large count": stays_exact,
    "a division in Python": divides,
    "a division by nothing": divides_by_nothing_first,
    "a product of batches": partial(
        is_left, Seen("a product"), "seen counts samples of this process"
    ),
    "a number of some": partial(is_left, Seen("a mask"), "seen counts samples of this process"),
    "a number as a tensor": partial(
        is_left, Seen("a tensor"), "a tensor in them is made of its samples or their number"
    ),
    "a product beside": partial(
        is_left, Seen("a product alone"), "a statistic of it is used elsewhere too"
    ),
}
