"""What is measured: norms at sizes and memory layouts, each as three equal peers."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import bnrewrite
from benchmarks import hand_written

HAND, NATIVE, OPTIMISED = PEERS = ("hand-written", "native", "optimised")
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Size:
    """A tensor's shape, and how many norms follow each other on it."""

    shape: tuple[int, ...]
    depth: int = 1

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return shape if self.depth == 1 else f"{self.depth} on {shape}"


# A call of an optimised model costs microseconds (Dynamo's guards), however many norms are in it.
# A stack shows what a small norm costs inside a model, the last size what it costs alone.
IMAGES = (
    Size((32, 64, 56, 56)),
    Size((8, 256, 14, 14), 16),
    Size((2, 16, 8, 8), 16),
    Size((2, 16, 8, 8)),
)
TOKENS = (
    Size((8, 512, 768)),
    Size((4, 128, 256), 16),
    Size((2, 8, 64), 16),
    Size((2, 8, 64)),
)


@dataclass(frozen=True)
class Norm:
    """A norm in its two forms, each made from the number of channels."""

    name: str
    hand: Callable[[int], nn.Module]
    native: Callable[[int], nn.Module]
    sizes: tuple[Size, ...]  # channels: axis 1 of rank 4, else the last axis


NORMS = (
    Norm(
        "batch_norm + relu",
        lambda channels: nn.Sequential(hand_written.BatchNorm(channels), nn.ReLU()),
        lambda channels: nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU()),
        IMAGES,
    ),
    Norm("layer_norm", hand_written.LayerNorm, nn.LayerNorm, TOKENS),
    Norm("rms_norm", hand_written.RMSNorm, lambda features: nn.RMSNorm(features, eps=1e-6), TOKENS),
    Norm(
        "group_norm",
        lambda channels: hand_written.GroupNorm(8, channels),
        lambda channels: nn.GroupNorm(8, channels),
        IMAGES,
    ),
    Norm(
        "l2_normalize",
        lambda channels: hand_written.L2Normalize(-1),
        lambda channels: hand_written.NativeL2Normalize(-1),
        TOKENS,
    ),
    Norm(
        "l2_normalize (channels)",
        lambda channels: hand_written.L2Normalize(1),
        lambda channels: hand_written.NativeL2Normalize(1),
        IMAGES,
    ),
)


@dataclass(frozen=True)
class Case:
    """A norm at a size, in a memory layout, in training or evaluation."""

    norm: Norm
    size: Size
    layout: str
    training: bool

    @property
    def mode(self) -> str:
        return "train" if self.training else "eval"

    def __str__(self) -> str:
        return f"{self.norm.name}, {self.size}, {self.layout}, {self.mode}"

    def tensor(self, device: str) -> Tensor:
        """A random float32 tensor of the case's shape and layout."""
        x = torch.randn(self.size.shape, device=device)
        return x.contiguous(memory_format=LAYOUTS[self.layout]) if x.dim() == 4 else x

    def peers(self, x: Tensor) -> dict[str, nn.Module]:
        """The three peers, with equal parameters, of x's device and dtype."""
        channels = x.shape[1] if x.dim() == 4 else x.shape[-1]
        hand, native = (
            nn.Sequential(*(make(channels) for _ in range(self.size.depth)))
            .to(x.device, x.dtype)
            .train(self.training)
            for make in (self.norm.hand, self.norm.native)
        )
        for own, given in zip(native.parameters(), hand.parameters(), strict=True):
            own.data.copy_(given.data.normal_().reshape(own.shape))
        torch.compiler.reset()  # else the second shape of a norm turns its graph dynamic
        optimised = bnrewrite.optimize(copy.deepcopy(hand), backend="eager")
        return {HAND: hand, NATIVE: native, OPTIMISED: optimised}

    def check(self, x: Tensor) -> None:
        """Raise where the peers are not one formula; float64 tells a formula from a rounding."""
        wide = x.double()
        peers = self.peers(wide)
        expected = peers[NATIVE](wide)
        for name in (HAND, OPTIMISED):
            actual = peers[name](wide)
            torch.testing.assert_close(actual, expected, msg=f"{name}: not what native gives")


def cases(only: str | None = None) -> list[Case]:
    """All cases whose text ("layer_norm, 2x8x64, contiguous, train") contains `only`."""
    every = [
        Case(norm, size, layout, training)
        for norm in NORMS
        for size in norm.sizes
        for layout in (LAYOUTS if len(size.shape) == 4 else ("contiguous",))
        for training in (True, False)
    ]
    return [case for case in every if only is None or only in str(case)]
