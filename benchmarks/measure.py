"""How time and memory are measured here, in one place.

Time: the candidates take turns within every round, in an order that rotates, so that a machine that
slows down slows all of them. The figure is a median, a ratio the median of the rounds' own ratios.

Memory: what autograd keeps for the backward, counted exactly through `saved_tensors_hooks`, each
storage once.
"""

import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles

import torch
from torch.autograd.graph import saved_tensors_hooks

SHORTEST_SAMPLE = (
    2e-3  # seconds; shorter calls are repeated, the clock and the loop would count otherwise
)


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

    def ratio(self, other: "Timing") -> float:
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
) -> dict[str, Timing]:
    """Time the candidates in turns.

    Args:
        candidates: name -> a call that does one unit of work.
        rounds: how many samples each gets, at least 2.
        warmup: calls of each before the first sample (compiling, caches, the allocator).
        device: whose queue is waited for.

    Returns:
        name -> seconds per call, one entry per round.
    """
    repeats = {name: _repeats(call, warmup, device) for name, call in candidates.items()}
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    for _ in range(rounds):
        for name in order:
            samples[name].append(_sample(candidates[name], repeats[name], device))
        order.append(order.pop(0))
    return {name: Timing(tuple(seconds)) for name, seconds in samples.items()}


def saved_bytes(call: Callable[[], object], owned: Iterable[torch.Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward of what `call` computes.

    Args:
        call: a forward pass; its result is dropped.
        owned: tensors that exist anyway (parameters, buffers); saving them costs nothing. What is
            saved as a copy of one of them counts.

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
    free = {tensor.untyped_storage().data_ptr() for tensor in owned}
    return sum(storage.nbytes() for address, storage in kept.items() if address not in free)


def machine(device: torch.device | str = "cpu") -> dict[str, str | int]:
    """What a reader needs to know about where the numbers come from."""
    cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"{_processor()} (CPU)",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "command": "python -m " + " ".join([_module_name(), *sys.argv[1:]]),
    }


def _repeats(call: Callable[[], object], warmup: int, device: torch.device | str) -> int:
    for _ in range(warmup):
        call()
    once = min(_sample(call, 1, device) for _ in range(3))
    return max(1, round(SHORTEST_SAMPLE / once))


def _sample(call: Callable[[], object], repeats: int, device: torch.device | str) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or "unknown processor"


def _module_name() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec is not None else sys.argv[0]
