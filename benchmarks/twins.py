"""An optimised model and its native twin, trained on the same batches by several processes.

alone          both under DistributedDataParallel; statistics are those of each process
generated      likewise, with kernels printed from the formula, and buffers that stay apart
synchronised   the optimised model takes the statistics of all processes (`sync_stats=True`);
               its twin, in every process, is PyTorch's own on the whole batch, unwrapped
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import bnrewrite
from benchmarks import hand_written

MODELS = ("alone", "generated", "synchronised")
CHANNELS, WIDTH = 4, 6
DECAY = 0.9  # of the average of the weights
SCALE = 8  # what a sum of squared errors is divided by: batches may be empty
HALF_OF_THE_DIGITS = torch.finfo(torch.float64).eps ** 0.5


class Rebinding(hand_written.BatchNorm):
    """The usual spelling, which binds its statistics to new tensors, and a counter."""

    num_batches_tracked: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked = self.num_batches_tracked + 1
        return super().forward(x)


class InPlace(Rebinding):
    """E[x^2] - E[x]^2, statistics updated in place."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked += 1
            mean = x.mean((0, 2, 3))
            var = (x * x).mean((0, 2, 3)) - mean**2
            count = x.numel() / x.size(1)
            self.running_mean.lerp_(mean.detach(), self.momentum)
            self.running_var.lerp_(var.detach() * count / (count - 1), self.momentum)
        else:
            mean, var = self.running_mean, self.running_var
        scale = self.weight * torch.rsqrt(var + self.eps)
        return x * scale.view(1, -1, 1, 1) + (self.bias - mean * scale).view(1, -1, 1, 1)


class Net(nn.Module):
    """Two convolutions with batch norms, a layer norm over the channels, a linear layer.

    A convolution has no bias: before a batch norm its gradient is nothing but rounding.
    """

    def __init__(self, by_hand: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, CHANNELS, 3, bias=False)
        self.one = Rebinding(CHANNELS) if by_hand else nn.BatchNorm2d(CHANNELS)
        self.second = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        self.two = InPlace(CHANNELS) if by_hand else nn.BatchNorm2d(CHANNELS)
        self.rows = hand_written.LayerNorm(CHANNELS) if by_hand else nn.LayerNorm(CHANNELS)
        self.last = nn.Linear(CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.one(self.first(x)))
        x = torch.relu(self.two(self.second(x)))
        y: Tensor = self.last(self.rows(x.mean((2, 3))))
        return y


class Trainer:
    """A model, its optimiser and the average of its weights and statistics."""

    def __init__(self, model: nn.Module, call: Any, whole: bool) -> None:
        """Of a model.

        Args:
            model: whose state is compared and saved.
            call: it, or what wraps it.
            whole: whether it is given the samples of all processes, instead of its own.
        """
        self.model, self.call, self.whole = model, call, whole
        self.optimiser = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, weight_decay=1e-3)
        average = get_ema_multi_avg_fn(DECAY)  # type: ignore[no-untyped-call]
        self.ema = AveragedModel(model, multi_avg_fn=average, use_buffers=True).eval()

    def train(self, batches: Sequence[tuple[Tensor, Sequence[int]]]) -> None:
        """One step on the gradients of some batches; only the last one's are sent."""
        self.optimiser.zero_grad()
        for x, sizes in batches[:-1]:
            if isinstance(self.call, DistributedDataParallel):
                with self.call.no_sync():
                    self._backward(x, sizes)
            else:
                self._backward(x, sizes)
        self._backward(*batches[-1])
        self.optimiser.step()

    def _backward(self, x: Tensor, sizes: Sequence[int]) -> None:
        x = self.own(x, sizes)
        wanted = torch.sin(3 * x.mean((1, 2, 3))) + x[:, 0, 0, 0]
        loss = (self.call(x).squeeze(1) - wanted).square().sum() / SCALE
        torch.autograd.backward(loss / dist.get_world_size() if self.whole else loss)

    def own(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """The part of a batch that this process works on."""
        return x if self.whole else torch.split(x, list(sizes))[dist.get_rank()]

    @torch.no_grad()
    def evaluate(self, x: Tensor) -> dict[str, Tensor]:
        """Outputs of the model and of its average in evaluation."""
        self.model.eval()
        found = {"outputs": self.call(x), "outputs of the average": self.ema(x)}
        self.model.train()
        return found

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Every tensor that a later step depends on, by kind."""
        optimiser = self.optimiser.state_dict()["state"]
        average = {name: value.detach() for name, value in self.ema.named_parameters()}
        return {
            "parameters": {name: value.detach() for name, value in self.model.named_parameters()},
            "buffers": dict(self.model.named_buffers()),
            "optimiser": {f"{i}.{k}": v for i, each in optimiser.items() for k, v in each.items()},
            "average": average | dict(self.ema.named_buffers()),
        }

    def save(self, path: Path) -> None:
        """Write a checkpoint: the first process's."""
        if dist.get_rank() == 0:
            parts = (self.model, self.optimiser, self.ema)
            torch.save([each.state_dict() for each in parts], path)
        dist.barrier()

    def load(self, path: Path) -> None:
        """Go back to a checkpoint, this one's or its twin's."""
        model, optimiser, ema = torch.load(path)
        self.model.load_state_dict(model)
        self.optimiser.load_state_dict(optimiser)
        self.ema.load_state_dict(ema)
        dist.barrier()


def twins(name: str) -> tuple[Trainer, Trainer]:
    """An optimised model and its native twin, in float64, with the same weights.

    Args:
        name: one of `MODELS`.
    """
    torch.manual_seed(1)
    users, native = (Net(by_hand).double() for by_hand in (True, False))
    native.load_state_dict(users.state_dict())
    whole = name == "synchronised"
    kernels = "generated" if name == "generated" else "auto"
    own = bnrewrite.optimize(users, backend="eager", kernels=kernels, sync_stats=whole)
    apart = {} if name == "alone" else {"broadcast_buffers": False}
    wrap: Any = partial(DistributedDataParallel, **apart)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of `broadcast_buffers`, for a later name
        wrapped, beside = wrap(own), native if whole else wrap(native)
    return Trainer(own, wrapped, whole=False), Trainer(native, beside, whole)


def difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest difference over the largest value; infinite where a counter differs."""
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    largest, distance = 0.0, 0.0
    for name, right in wanted.items():
        if not right.is_floating_point():
            distance = distance if torch.equal(found[name], right) else float("inf")
        elif right.numel():
            largest = max(largest, float(right.abs().max()))
            distance = max(distance, float((found[name] - right).abs().nan_to_num(torch.inf).max()))
    return distance / largest if distance else 0.0
