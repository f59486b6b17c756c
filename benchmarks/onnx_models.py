"""What is exported and measured: models whose norms are written by hand, and their native twins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import hand_written
from examples.forum_net import TESTING, BatchNorm, NativeBatchNorm, Net

Norm = Callable[[int], nn.Module]


@dataclass(frozen=True)
class Pair:
    """A model, the same with native modules, and the arguments of a call."""

    name: str
    hand: nn.Module
    native: nn.Module
    arguments: dict[str, Any]
    input_names: tuple[str, ...]


class Block(nn.Module):
    """ResNet's: the sum of a body and of a shortcut, through a ReLU."""

    def __init__(self, body: nn.Module, before: int, after: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.body = body
        same = stride == 1 and before == after
        strided = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), norm(after))
        self.shortcut: nn.Module = nn.Identity() if same else strided

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x) + self.shortcut(x)
        return functional.relu(y)


class Bottleneck(Block):
    """1x1, 3x3, 1x1 convolutions with a norm behind each."""

    def __init__(self, before: int, inner: int, stride: int, norm: Norm) -> None:
        after = 4 * inner
        body = nn.Sequential(
            nn.Conv2d(before, inner, 1, bias=False), norm(inner), nn.ReLU(),
            nn.Conv2d(inner, inner, 3, stride, 1, bias=False), norm(inner), nn.ReLU(),
            nn.Conv2d(inner, after, 1, bias=False), norm(after),
        )  # fmt: skip
        super().__init__(body, before, after, stride, norm)


def resnet50(norm: Norm, width: int = 16) -> nn.Module:
    """ResNet-50 with a quarter of its channels: 53 norms."""
    blocks: list[nn.Module] = []
    channels = width
    for stage, depth in enumerate((3, 4, 6, 3)):
        for block in range(depth):
            stride = 2 if stage and not block else 1
            blocks.append(Bottleneck(channels, width * 2**stage, stride, norm))
            channels = 4 * width * 2**stage
    stem = nn.Sequential(nn.Conv2d(3, width, 7, 2, 3, bias=False), norm(width), nn.ReLU())
    pool, flat = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(stem, nn.MaxPool2d(3, 2, 1), *blocks, pool, flat, nn.Linear(channels, 10))


def convolutions(norm: Norm, channels: int = 48, depth: int = 6) -> nn.Module:
    """Depthwise convolution, norm, two pointwise convolutions, as in ConvNeXt."""
    blocks = [
        nn.Sequential(
            nn.Conv2d(channels, channels, 7, padding=3, groups=channels),
            norm(channels),
            nn.Conv2d(channels, 2 * channels, 1),
            nn.GELU(),
            nn.Conv2d(2 * channels, channels, 1),
        )
        for _ in range(depth)
    ]
    return nn.Sequential(nn.Conv2d(3, channels, 4, 4), *blocks)


def unet(norm: Norm, channels: int = 32, depth: int = 6) -> nn.Module:
    """3x3 convolutions with a group norm and SiLU behind each, as in diffusion models."""
    blocks: list[nn.Module] = []
    for _ in range(depth):
        blocks += [nn.Conv2d(channels, channels, 3, padding=1), norm(channels), nn.SiLU()]
    return nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), *blocks)


def perceptron(norm: Norm, features: int = 256, depth: int = 6) -> nn.Module:
    """Linear layers with a LayerNorm and GELU behind each."""
    blocks: list[nn.Module] = []
    for _ in range(depth):
        blocks += [nn.Linear(features, features), norm(features), nn.GELU()]
    return nn.Sequential(*blocks)


def llama() -> nn.Module:
    """A small Llama of transformers."""
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 4}
    config = transformers.LlamaConfig(vocab_size=512, **sizes, **heads, use_cache=False)
    config._attn_implementation = "eager"
    model: nn.Module = transformers.LlamaModel(config)
    return model


def with_native_norms(model: nn.Module) -> nn.Module:
    """A Llama whose norms are `nn.RMSNorm`."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child).__name__ == "LlamaRMSNorm":
                norm: Any = child
                setattr(parent, name, nn.RMSNorm(norm.weight.shape[0], norm.variance_epsilon))
    return model


def pairs(only: str | None = None) -> list[Pair]:
    """All, or those with this in their name; weights are random, statistics are not 0 and 1."""
    found = [
        _pair("forum's net", lambda norm: Net(norm), BatchNorm, NativeBatchNorm,
              {"x": torch.randn(8, 3, 32, 32), "mode": TESTING}),
        _pair("ResNet-50", resnet50, hand_written.BatchNorm, nn.BatchNorm2d,
              {"input": torch.randn(4, 3, 96, 96)}),
        _pair("ConvNeXt-like", convolutions, hand_written.ChannelNorm,
              hand_written.NativeChannelNorm,
              {"input": torch.randn(4, 3, 96, 96)}),
        _pair("U-Net-like", unet, lambda c: hand_written.GroupNorm(8, c),
              lambda c: nn.GroupNorm(8, c), {"input": torch.randn(4, 3, 48, 48)}),
        _pair("perceptron", perceptron, hand_written.LayerNorm, nn.LayerNorm,
              {"input": torch.randn(64, 256)}),
        Pair("Llama", llama(), with_native_norms(llama()),
             {"input_ids": torch.randint(3, 500, (2, 64))}, ("input_ids",)),
    ]  # fmt: skip
    for pair in found:
        _randomise(pair)
    return [pair for pair in found if only is None or only in pair.name]


def _pair(
    name: str,
    build: Callable[[Any], nn.Module],
    hand: Callable[..., nn.Module],
    native: Callable[..., nn.Module],
    arguments: dict[str, Any],
) -> Pair:
    tensors = tuple(key for key, value in arguments.items() if isinstance(value, Tensor))
    return Pair(name, build(hand), build(native), arguments, tensors)


def _randomise(pair: Pair) -> None:
    for model in (pair.hand.eval(), pair.native.eval()):
        torch.manual_seed(0)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
