"""What the benchmarks share: `bnrewrite.measuring`, a training step, clocks, and the machine."""

import ctypes
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bnrewrite.measuring import Clock, Timing, interleaved, saved_bytes, synchronize

__all__ = [
    "CLOCKS", "Clock", "Timing", "interleaved", "keep_memory", "machine", "origin", "saved_bytes",
    "synchronize", "training_step",
]  # fmt: skip

MALLOPT = {"M_TRIM_THRESHOLD": (-1, 2**31 - 1), "M_TOP_PAD": (-2, 2**26), "M_MMAP_MAX": (-4, 0)}

# process: of a CPU that is shared, with one thread; it stands still while other processes run
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "process": time.process_time}


def training_step(
    model: nn.Module, inputs: Sequence[Tensor], cotangent: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    """A call of a model forward and backward: the gradients of its inputs and parameters."""
    wanted = [*inputs, *model.parameters()]
    # grad, not backward(): adding to .grad is the same work for all peers and would hide ratios
    return lambda: torch.autograd.grad(model(*inputs), wanted, cotangent)


def keep_memory() -> None:
    """Have the C library keep memory that is freed, as jemalloc and tcmalloc do.

    glibc gives it back to the system and takes it anew, page by page, in some steps and not in
    others; in a model that can be a quarter of the time, whoever's norms are in it.

    Raises:
        OSError: the C library has no such settings: measure without them.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        raise OSError("only glibc can be told to keep memory: leave --keep-memory out")
    for name, (number, value) in MALLOPT.items():
        if not library.mallopt(number, value):
            raise OSError(f"glibc did not take {name}={value}: leave --keep-memory out")


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


def origin(where: Mapping[str, Any]) -> str:
    """Where numbers come from, in a line: what `machine` found."""
    threads = f"{where['threads']} thread{'' if where['threads'] == 1 else 's'}"
    return f"{where['device']}, {threads}, torch {where['torch']}"


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
