"""Networks that the tests export: hand-written norms, and models of `transformers`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers_models import HIDDEN, MODELS, configured, images, made, model_of

from examples.forum_net import TESTING, Net


class ChannelNorm(nn.Module):
    """A BatchNorm of images, written by hand, in evaluation mode."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(channels) + 0.5)
        self.beta = nn.Parameter(torch.randn(channels))
        self.mean: Tensor
        self.spread: Tensor
        self.register_buffer("mean", 0.1 * torch.randn(channels))
        self.register_buffer("spread", torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, 1, 1)
        centred = (x - self.mean.view(shape)) / torch.sqrt(self.spread.view(shape) + 1e-5)
        return self.gamma.view(shape) * centred + self.beta.view(shape)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions with a norm behind each, and a shortcut."""

    def __init__(self, before: int, inner: int, stride: int, norm: Callable[[int], nn.Module]):
        super().__init__()
        after = 4 * inner
        self.conv1, self.norm1 = nn.Conv2d(before, inner, 1, bias=False), norm(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False)
        self.norm2 = norm(inner)
        self.conv3, self.norm3 = nn.Conv2d(inner, after, 1, bias=False), norm(after)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            strided = nn.Conv2d(before, after, 1, stride, bias=False)
            self.shortcut = nn.Sequential(strided, norm(after))

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norm1(self.conv1(x)))
        y = functional.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y)) + self.shortcut(x)
        return functional.relu(y)


class ResNet(nn.Module):
    """ResNet-50 with few channels and any norm: 53 of them."""

    def __init__(self, norm: Callable[[int], nn.Module] = ChannelNorm, width: int = 4) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 7, 2, 3, bias=False), norm(width)
        blocks: list[nn.Module] = []
        channels = width
        for stage, depth in enumerate((3, 4, 6, 3)):
            for block in range(depth):
                inner, stride = width * 2**stage, 2 if stage and not block else 1
                blocks.append(Bottleneck(channels, inner, stride, norm))
                channels = 4 * inner
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.norm(self.stem(x))), 3, 2, 1)
        logits: Tensor = self.classifier(self.blocks(x).mean((2, 3)))
        return logits


def detr() -> tuple[nn.Module, dict[str, Any]]:
    """DETR with its frozen norms, on a small backbone."""
    sizes = {"embedding_size": 8, "hidden_sizes": [16], "depths": [1]}
    resnet = configured("ResNet", **sizes, layer_type="basic", out_features=["stage1"])
    settings: dict[str, Any] = {"d_model": HIDDEN, "num_queries": 4}
    for part in ("encoder", "decoder"):
        settings |= {f"{part}_layers": 1, f"{part}_attention_heads": 2, f"{part}_ffn_dim": 16}
    source = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
    config = configured("Detr", backbone_config=resnet, **source, **settings)
    return model_of("DetrModel", config), {"pixel_values": images(32)}


@dataclass(frozen=True)
class Case:
    """A model to export.

    Attributes:
        build: makes it, and the arguments of its call.
        norms: how often each standard norm stands in its file at opset 23.
        arithmetic: the other operations on numbers that may remain, none of which is a norm's.
        dynamic: sizes that vary, by argument and dimension.
    """

    build: Callable[[], tuple[nn.Module, dict[str, Any]]]
    norms: dict[str, int]
    arithmetic: dict[str, int] = field(default_factory=dict)
    dynamic: dict[str, dict[int, str]] = field(default_factory=dict)


def forum() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    return Net(), {"x": torch.randn(2, 3, 32, 32), "mode": TESTING}


def resnet() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    return ResNet(), {"x": torch.randn(2, 3, 32, 32)}


def transformer(name: str) -> Callable[[], tuple[nn.Module, dict[str, Any]]]:
    return lambda: made(MODELS[name])


POINTWISE = ("Add", "Sub", "Mul", "Div", "Sqrt", "Reciprocal", "Pow", "Exp", "Log", "Neg", "Abs")
REDUCTIONS = ("Mean", "Sum", "SumSquare", "L1", "L2", "Max", "Min", "Prod")
ARITHMETIC = {*POINTWISE, *(f"Reduce{each}" for each in REDUCTIONS), "Max", "Min", "Clip", "CumSum"}
NORMS = {f"{each}Normalization" for each in ("Layer", "RMS", "Instance", "Batch", "Group")}
IMAGES = {"pixel_values": {0: "batch"}}
CASES = {
    # stored statistics behind a convolution are in its weight
    "forum": Case(forum, {}, dynamic={"x": {0: "batch"}}),
    "resnet50": Case(
        resnet,
        {},
        {"Add": 16, "ReduceMean": 1},  # shortcuts, the pool
        {"x": {0: "batch"}},
    ),
    "convnext": Case(
        transformer("convnext"),
        {"LayerNormalization": 5},
        {"Add": 6, "Mul": 2, "ReduceMean": 1},  # biases and shortcuts, layer scales, the pool
        IMAGES,
    ),
    "sam": Case(
        transformer("sam"),
        {"LayerNormalization": 4},
        {"Add": 9, "Mul": 1},  # biases, positions and shortcuts, the scale of attention
        IMAGES,
    ),
    "llama": Case(
        transformer("llama"),
        {"RMSNormalization": 5},
        # rotations, the scale of attention, gates; positions and the mask
        {"Mul": 15, "Add": 12, "Neg": 4, "Sub": 2, "Max": 2, "CumSum": 1},
        {"input_ids": {0: "batch", 1: "length"}},
    ),
    "t5": Case(
        transformer("t5"),
        {"RMSNormalization": 7},
        # shortcuts and biases of positions, of which the buckets are computed
        {"Add": 16, "Mul": 2, "Div": 2, "Sub": 1, "Abs": 1, "Log": 1, "Min": 1},
        {"input_ids": {0: "batch", 1: "length"}, "decoder_input_ids": {0: "batch"}},
    ),
    "detr": Case(
        detr,
        {"LayerNormalization": 6},
        # biases and shortcuts; the encoding of positions divides by what it has counted
        {"Add": 30, "Mul": 5, "Div": 4, "CumSum": 2, "Max": 1},
        IMAGES,
    ),
}
