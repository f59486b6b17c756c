"""Norms of known networks at their sizes, by hand and native, for a CPU and for a GPU."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import hand_written
from benchmarks.cases import HAND, LAYOUTS, NATIVE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COMPILED = {HAND: f"compiled {HAND}", NATIVE: f"compiled {NATIVE}"}


def under_compile(model: nn.Module) -> nn.Module:
    """A copy under torch.compile, for the sizes that it sees."""
    made = copy.deepcopy(model)
    made.compile(dynamic=False)
    return made


class Residual(nn.Module):
    """``relu(norm(x) + residual)``."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """In the order that residual networks have it."""
        y: Tensor = self.norm(x)
        return (y + residual).relu()


def _relu(norm: nn.Module) -> nn.Module:
    return nn.Sequential(norm, nn.ReLU())


@dataclass(frozen=True)
class Norm:
    """A norm in its two forms, each made from the number of channels, at sizes of networks.

    Attributes:
        passes: over the tensor, of a training step that reads and writes no more than it must.
        results: how many tensors as large as x are new among these.
        liger: the name of Liger's module, where it has one.
        inputs: how many tensors as large as x are given.
        equal: the native one computes the same; else it is what people would take instead.
    """

    name: str
    hand: Callable[[int], nn.Module]
    native: Callable[[int], nn.Module]
    sizes: tuple[tuple[int, ...], ...]
    passes: int
    results: int = 2
    liger: str | None = None
    inputs: int = 1
    equal: bool = True


BATCH, EACH = 8, 5  # statistics over the batch: x is read for them; of a part that stays in a cache
# ResNet-50's, batch 32: inside its blocks, and what leaves them
INSIDE = ((32, 64, 56, 56), (32, 128, 28, 28), (32, 256, 14, 14), (32, 512, 7, 7))
OUTSIDE = ((32, 256, 56, 56), (32, 512, 28, 28), (32, 1024, 14, 14), (32, 2048, 7, 7))
STEM = (32, 64, 112, 112)


def _general(name: str, hand: Callable[[int], nn.Module], passes: int) -> Norm:
    """A formula that no operator has, beside the batch norm that people would take instead."""
    return Norm(
        name=f"{name} + relu",
        hand=lambda c: _relu(hand(c)),
        native=lambda c: _relu(nn.BatchNorm2d(c)),
        sizes=((32, 64, 56, 56), (32, 128, 28, 28), (32, 1024, 14, 14)),
        passes=passes,
        equal=False,
    )


CASES = (
    Norm(
        "batch_norm + relu",
        lambda c: _relu(hand_written.BatchNorm(c)),
        lambda c: _relu(nn.BatchNorm2d(c)),
        (*OUTSIDE, *INSIDE, STEM),
        BATCH,
    ),
    Norm(
        "batch_norm + add + relu",
        lambda c: Residual(hand_written.BatchNorm(c)),
        lambda c: Residual(nn.BatchNorm2d(c)),
        OUTSIDE,
        passes=BATCH + 4,
        results=3,
        inputs=2,
    ),
    _general("stored_norm", hand_written.StoredNorm, BATCH),
    _general("deviation_norm", hand_written.DeviationNorm, BATCH),
    _general("batch_renorm", hand_written.BatchRenorm, BATCH),
    _general("adaptive_norm", hand_written.AdaptiveNorm, EACH),
    _general("response_norm", hand_written.ResponseNorm, EACH),
    _general("global_response_norm", hand_written.GlobalResponseNorm, EACH),
    _general("switched_norm", hand_written.SwitchedNorm, BATCH),
    Norm(
        "rms_norm",  # of Llama 7B, of 70B, and of a sentence of T5
        hand_written.RMSNorm,
        lambda d: nn.RMSNorm(d, eps=1e-6),
        ((4, 2048, 4096), (1, 2048, 8192), (8, 128, 512)),
        EACH,
        liger="LigerRMSNorm",
    ),
    Norm(
        "layer_norm",  # of ViT-B, of CLIP's texts, and of ConvNeXt-T with the channels last
        hand_written.LayerNorm,
        nn.LayerNorm,
        ((64, 197, 768), (256, 77, 512), (32, 3136, 96), (32, 49, 768)),
        EACH,
        liger="LigerLayerNorm",
    ),
    Norm(
        "layer_norm of channels",  # of ConvNeXt-T
        hand_written.ChannelNorm,
        hand_written.NativeChannelNorm,
        ((32, 96, 56, 56), (32, 384, 14, 14)),
        EACH,
    ),
    Norm(
        "group_norm",  # of diffusion's U-Net, and of ResNet-50
        lambda c: hand_written.GroupNorm(32, c),
        lambda c: nn.GroupNorm(32, c),
        ((16, 512, 32, 32), (32, 128, 56, 56), (32, 1024, 14, 14)),
        EACH,
    ),
    Norm(
        "instance_norm",  # of style transfer
        hand_written.InstanceNorm,
        lambda c: nn.InstanceNorm2d(c, affine=True),
        ((8, 128, 64, 64), (8, 32, 256, 256)),
        EACH,
    ),
    Norm(
        "l2_normalize",  # of CLIP's heads, and of many queries
        lambda _: hand_written.L2Normalize(-1),
        lambda _: hand_written.NativeL2Normalize(-1),
        ((8192, 1024), (256, 512), (1024, 768)),
        EACH,
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
        for name, make in ((HAND, self.norm.hand), (NATIVE, self.norm.native)):
            made[name] = make(self.channels).to(device, DTYPES[self.dtype]).train()
        torch.manual_seed(0)
        for parameter in made[HAND].parameters():
            parameter.data.normal_(1.0, 0.25)
        if self.norm.equal:
            for parameters in zip(*(model.parameters() for model in made.values()), strict=True):
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


def cases(only: str | None = None, dtypes: Sequence[str] = ("float32", "bfloat16")) -> list[Case]:
    """All cases whose text contains ``only``, the first size of every norm before the second."""
    every = [
        (place, Case(norm, shape, layout, dtype))
        for norm in CASES
        for place, shape in enumerate(norm.sizes)
        for layout in (LAYOUTS if len(shape) == 4 else ("contiguous",))
        for dtype in dtypes
    ]
    ordered = [case for _, case in sorted(every, key=lambda pair: pair[0])]
    return [case for case in ordered if only is None or only in str(case)]
