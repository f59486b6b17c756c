"""Train nets on the digits, several in turns on the same batches, and record what a step took."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.digits import Digits
from examples.forum_net import TESTING, TRAINING

BATCH = 64
WARMUP_STEPS = 3  # these train, but are not in the figures: capture, caches, the allocator


@dataclass(frozen=True)
class Steps:
    """Seconds per training step: the first, which captures, and those behind the warm-up."""

    first: float
    seconds: tuple[float, ...]


def batches(digits: Digits, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Full batches of the training images and labels, in a new order per epoch."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(epochs):
        order = torch.randperm(len(digits.train_images), generator=generator)
        for start in range(0, len(order) - BATCH + 1, BATCH):
            chosen = order[start : start + BATCH]
            yield digits.train_images[chosen], digits.train_labels[chosen]


def train_in_turns(nets: Mapping[str, nn.Module], digits: Digits, epochs: int) -> dict[str, Steps]:
    """Train every net on every batch, in an order that rotates.

    Returns:
        name -> what its steps (forward, backward, optimiser) took.
    """
    optimisers = {name: _optimiser(net) for name, net in nets.items()}
    taken: dict[str, list[float]] = {name: [] for name in nets}
    order = list(nets)
    for images, labels in batches(digits, epochs):
        for name in order:
            start = time.perf_counter()
            _step(nets[name], optimisers[name], images, labels)
            taken[name].append(time.perf_counter() - start)
        order.append(order.pop(0))
    return {
        name: Steps(seconds[0], tuple(seconds[WARMUP_STEPS:])) for name, seconds in taken.items()
    }


def train_alone(net: nn.Module, digits: Digits, epochs: int) -> None:
    """Train one net; raises what its backward raises."""
    optimiser = _optimiser(net)
    for images, labels in batches(digits, epochs):
        _step(net, optimiser, images, labels)


@torch.no_grad()
def accuracy(net: nn.Module, digits: Digits) -> float:
    """The share of unseen images that the net names correctly, with its running statistics."""
    predicted = [
        net(images, TESTING).argmax(1) for images in torch.split(digits.test_images, BATCH)
    ]
    return float((torch.cat(predicted) == digits.test_labels).float().mean())


def autograd_nodes(tensor: Tensor) -> int:
    """How many autograd nodes hang on a tensor: 0 for a buffer as it should be."""
    seen: set[Any] = set()
    waiting: list[Any] = [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(following for following, _ in node.next_functions)
    return len(seen)


def _optimiser(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)


def _step(net: nn.Module, optimiser: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    optimiser.zero_grad(set_to_none=True)
    functional.cross_entropy(net(images, TRAINING), labels).backward()  # type: ignore[no-untyped-call]
    optimiser.step()
