"""Which execution provider a session runs on, and what is missing where it cannot."""

from __future__ import annotations

import ctypes
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from .kernels import PROVIDERS
from .refusal import SessionError

Device = str | torch.device | None
_preloaded = threading.Event()


@dataclass(frozen=True)
class Place:
    """Where a session runs: the name of its provider in `PROVIDERS`, and which device of it."""

    name: str
    index: int = 0

    @property
    def provider(self) -> str:
        """Onnxruntime's name of the provider."""
        return PROVIDERS[self.name]

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return torch.device("cpu") if self.name == "cpu" else torch.device("cuda", self.index)

    def providers(self) -> list[Any]:
        """What onnxruntime is asked for, in order; the CPU takes what no other has a kernel of."""
        options = {"device_id": str(self.index)}
        asked: list[Any] = []
        if self.name == "tensorrt":
            asked.append((PROVIDERS["tensorrt"], options))
        if self.name != "cpu":
            asked.append((PROVIDERS["cuda"], options))
        return [*asked, PROVIDERS["cpu"]]


def place_for(device: Device) -> Place:
    """The place that a user means.

    Args:
        device: "cpu", "cuda", "cuda:1", "tensorrt", a `torch.device`, or None for a GPU where
            torch and onnxruntime both have one, else the CPU.

    Raises:
        ValueError: another device.
        SessionError: the provider is not in the installed onnxruntime, or there is no GPU.
    """
    if device is None:
        has_gpu = torch.cuda.is_available() and PROVIDERS["cuda"] in available()
        return Place("cuda" if has_gpu else "cpu")
    name, _, index = str(device).partition(":")
    if name not in PROVIDERS or (index and not index.isdigit()) or (name == "cpu" and index):
        raise ValueError(f"device is {str(device)!r}; it is one of {', '.join(PROVIDERS)} or None")
    place = Place(name, int(index or 0))
    if place.provider not in available():
        raise SessionError(
            f"onnxruntime {onnxruntime.__version__} has no {place.provider}, only "
            f"{', '.join(available())}: install onnxruntime-gpu, or pass device='cpu'"
        )
    if name != "cpu" and not torch.cuda.is_available():
        raise SessionError(f"device={str(device)!r}: {_without_gpu(place)}; or pass device='cpu'")
    if name != "cpu" and place.index >= torch.cuda.device_count():
        raise SessionError(f"device is {str(device)!r}; there are {torch.cuda.device_count()} GPUs")
    return place


def available() -> list[str]:
    """The providers that onnxruntime was built with."""
    found: list[str] = onnxruntime.get_available_providers()
    return found


def preload(place: Place) -> None:
    """Load CUDA's libraries, from torch's packages or NVIDIA's, once per process."""
    if place.name == "cpu" or _preloaded.is_set():
        return
    _preloaded.set()
    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()


def why_absent(place: Place) -> str:
    """What keeps a provider that was asked for from starting, for a message."""
    missing = missing_library(place)
    if missing is not None:
        return f"{place.provider} did not start: {missing}"
    return f"{place.provider} did not start, though its libraries load; is the driver new enough?"


def missing_library(place: Place) -> str | None:
    """The loader's complaint about a provider's library, None where it loads."""
    if place.name == "cpu":
        return None
    stem = "tensorrt" if place.name == "tensorrt" else "cuda"
    name = {"win32": f"onnxruntime_providers_{stem}.dll"}.get(
        sys.platform, f"libonnxruntime_providers_{stem}.so"
    )
    path = Path(onnxruntime.__file__).parent / "capi" / name
    if not path.exists():
        return f"{name} is not in the installed onnxruntime"
    try:
        ctypes.CDLL(str(path))
    except OSError as error:
        # its own symbols come from the process that loads it; only what it lacks is told
        return str(error) if "cannot open" in str(error) else None
    return None


def _without_gpu(place: Place) -> str:
    if not torch.version.cuda:
        return (
            f"torch {torch.__version__} is built without CUDA, so no tensor can be on a GPU for "
            f"{place.provider}: install a CUDA build of torch"
        )
    return f"torch sees no GPU for {place.provider}: check nvidia-smi and CUDA_VISIBLE_DEVICES"
