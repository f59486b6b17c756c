"""How time and memory are measured, in one place.

Time: the candidates take turns within every round, so that a machine that slows down slows all of
them, in random order and each behind a call of its own that is not timed: what ran before decides
what is in the caches and what the allocator has at hand, and cost up to three times the norm itself
(GroupNorm, 32x64x56x56, CPU). The figure is a median, a ratio the median of the rounds' own ratios.

Memory: what autograd keeps for the backward, counted exactly through `saved_tensors_hooks`, each
storage once.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles

import torch
from torch.autograd.graph import saved_tensors_hooks

Clock = Callable[[], float]

# seconds; shorter calls are repeated, the clock and the loop would count otherwise
SHORTEST_SAMPLE = 2e-3


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one entry per round, in the order of the rounds."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.samples)

    @property
    def spread(self) -> float:
        """The quartiles' distance over the median: 0.1 is a quiet machine, 0.5 a noisy one."""
        low, _, high = quantiles(self.samples, n=4)
        return (high - low) / self.median

    def ratio(self, other: Timing) -> float:
        """Median over the rounds of this one's time divided by `other`'s in the same round."""
        return median(a / b for a, b in zip(self.samples, other.samples, strict=True))


def synchronize(device: torch.device | str = "cpu") -> None:
    """Wait for the device's queue: a GPU call returns before its work is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 31,
    warmup: int = 3,
    device: torch.device | str = "cpu",
    clock: Clock = time.perf_counter,
    after_round: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Time the candidates in turns.

    Args:
        candidates: name -> a call that does one unit of work.
        rounds: how many samples each gets, at least 2.
        warmup: calls of each before the first sample (compiling, caches, the allocator).
        device: whose queue is waited for.
        clock: `time.process_time` on a CPU that is shared and with one thread: it stands still
            while other processes run.
        after_round: called after each round, outside of what is timed.

    Returns:
        name -> seconds per call, one entry per round.
    """
    repeats = {name: _repeats(call, warmup, device, clock) for name, call in candidates.items()}
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    order, shuffle = list(candidates), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            samples[name].append(_sample(candidates[name], repeats[name], device, clock))
        after_round()
    return {name: Timing(tuple(seconds)) for name, seconds in samples.items()}


def saved_bytes(call: Callable[[], object], parameters: Iterable[torch.Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward of what `call` computes.

    Args:
        call: a forward pass; its result is dropped.
        parameters: not counted, they exist anyway. A buffer counts, live or copied: that a
            backward must see its old value is why it is saved.

    Returns:
        The sum over the distinct storages that were saved, whole storages, in bytes.
    """
    kept: dict[int, torch.UntypedStorage] = {}  # holding them keeps addresses from being used again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    free = {tensor.untyped_storage().data_ptr() for tensor in parameters}
    return sum(storage.nbytes() for address, storage in kept.items() if address not in free)


def _repeats(
    call: Callable[[], object], warmup: int, device: torch.device | str, clock: Clock
) -> int:
    for _ in range(warmup):
        call()
    once = min(_sample(call, 1, device, clock) for _ in range(3))
    return max(1, round(SHORTEST_SAMPLE / once))


def _sample(
    call: Callable[[], object], repeats: int, device: torch.device | str, clock: Clock
) -> float:
    call()
    synchronize(device)
    start = clock()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (clock() - start) / repeats
