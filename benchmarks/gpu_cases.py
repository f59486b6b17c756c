"""What is measured on a GPU: norms of known models at their sizes, by hand and native."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import hand_written

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KINDS = ("hand-written", "native")


class Residual(nn.Module):
    """``relu(norm(x) + residual)``."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """In the order that residual networks have it."""
        y: Tensor = self.norm(x)
        return (y + residual).relu()


class Forum(nn.Module):
    """A batch norm that normalises with the statistics that it has just stored."""

    mean: Tensor
    variance: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("variance", torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Without gradients through what was stored."""
        with torch.no_grad():
            mean = x.mean((0, 2, 3), keepdim=True)
            variance = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
            self.mean = 0.9 * self.mean + 0.1 * mean
            self.variance = 0.9 * self.variance + 0.1 * variance
        return (x - self.mean) / torch.sqrt(self.variance + 1e-5) * self.weight + self.bias


class ChannelsFirst(nn.Module):
    """A layer norm over axis 1 of an image, as ConvNeXt has it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """The moments of each pixel."""
        mean = x.mean(1, keepdim=True)
        centred = x - mean
        variance = centred.pow(2).mean(1, keepdim=True)
        x = centred / torch.sqrt(variance + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class NativeChannelsFirst(nn.LayerNorm):
    """The same by the native operator, between two permutations."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, input: Tensor) -> Tensor:
        """Permute, normalise, permute back."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _relu(norm: nn.Module) -> nn.Module:
    return nn.Sequential(norm, nn.ReLU())


@dataclass(frozen=True)
class Norm:
    """A norm in its two forms, and by Liger where that has it; each from the number of channels."""

    name: str
    hand: Callable[[int], nn.Module]
    native: Callable[[int], nn.Module]
    sizes: tuple[tuple[int, ...], ...]
    passes: (
        int  # over the tensor, of a forward and a backward that read and write no more than needed
    )
    liger: str | None = None
    inputs: int = 1


CASES = (
    Norm(
        "batch_norm + relu",
        lambda c: _relu(hand_written.BatchNorm(c)),
        lambda c: _relu(nn.BatchNorm2d(c)),
        ((32, 256, 56, 56), (32, 512, 28, 28), (32, 1024, 14, 14), (32, 64, 112, 112)),
        8,
    ),
    Norm(
        "batch_norm + add + relu",
        lambda c: Residual(hand_written.BatchNorm(c)),
        lambda c: Residual(nn.BatchNorm2d(c)),
        ((32, 256, 56, 56), (32, 2048, 7, 7)),
        12,
        inputs=2,
    ),
    Norm("general", Forum, nn.BatchNorm2d, ((32, 256, 56, 56),), 8),
    Norm(
        "rms_norm",
        hand_written.RMSNorm,
        lambda d: nn.RMSNorm(d, eps=1e-6),
        ((4, 2048, 4096), (1, 2048, 8192)),
        5,
        "LigerRMSNorm",
    ),
    Norm(
        "layer_norm",
        hand_written.LayerNorm,
        nn.LayerNorm,
        ((64, 197, 768), (256, 77, 512)),
        5,
        "LigerLayerNorm",
    ),
    Norm("layer_norm of channels", ChannelsFirst, NativeChannelsFirst, ((32, 96, 56, 56),), 5),
    Norm(
        "group_norm",
        lambda c: hand_written.GroupNorm(32, c),
        lambda c: nn.GroupNorm(32, c),
        ((16, 512, 32, 32), (32, 128, 56, 56)),
        5,
    ),
    Norm(
        "l2_normalize",
        lambda _: hand_written.L2Normalize(-1),
        lambda _: hand_written.NativeL2Normalize(-1),
        ((8192, 1024),),
        5,
    ),
)


@dataclass(frozen=True)
class Case:
    """A norm at a size, in a memory layout and a dtype."""

    norm: Norm
    shape: tuple[int, ...]
    layout: str
    dtype: str

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{self.norm.name}, {shape}, {self.layout}, {self.dtype}"

    @property
    def channels(self) -> int:
        """Axis 1 of an image, else the last one."""
        return self.shape[1 if len(self.shape) == 4 else -1]

    def tensors(self, device: str) -> list[Tensor]:
        """Random inputs, and the cotangent."""
        made = []
        for _ in range(self.norm.inputs + 1):
            x = torch.randn(self.shape, device=device, dtype=DTYPES[self.dtype])
            is_image = len(self.shape) == 4
            made.append(x.contiguous(memory_format=LAYOUTS[self.layout]) if is_image else x)
        return made

    def models(self, device: str) -> dict[str, nn.Module]:
        """By hand and native, with equal parameters."""
        made = {}
        for name, make in zip(KINDS, (self.norm.hand, self.norm.native), strict=True):
            made[name] = make(self.channels).to(device, DTYPES[self.dtype]).train()
        torch.manual_seed(0)
        for parameters in zip(*(model.parameters() for model in made.values()), strict=True):
            parameters[0].data.normal_(1.0, 0.25)
            parameters[1].data.copy_(parameters[0].data.reshape(parameters[1].shape))
        return made

    def liger(self, native: nn.Module) -> nn.Module | None:
        """Liger's module with the native one's parameters, where it is installed and has one."""
        if self.norm.liger is None:
            return None
        try:
            transformers = importlib.import_module("liger_kernel.transformers")
        except ImportError:
            return None
        make: Any = getattr(transformers, self.norm.liger)
        model: nn.Module = make(self.channels, eps=native.eps)
        parameter = next(native.parameters())
        model = model.to(parameter.device, parameter.dtype)
        model.load_state_dict(copy.deepcopy(native.state_dict()), strict=False)
        return model


def cases(only: str | None = None) -> list[Case]:
    """All cases whose text contains ``only``, the first size of every norm before the second."""
    dtypes = ("float32", "bfloat16")
    every = [
        (place, Case(norm, shape, layout, dtype))
        for norm in CASES
        for place, shape in enumerate(norm.sizes)
        for layout in (LAYOUTS if len(shape) == 4 else ("contiguous",))
        for dtype in dtypes
    ]
    ordered = [case for _, case in sorted(every, key=lambda pair: pair[0])]
    return [case for case in ordered if only is None or only in str(case)]
