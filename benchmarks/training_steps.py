"""A whole training step of models whose norms are written by hand: forward, loss and backward.

    python -m benchmarks.training_steps               writes training_steps.{json,md}
    python -m benchmarks.training_steps --compile     with torch.compile of both as further peers,
                                                      and the optimised one on Inductor
    python -m benchmarks.training_steps --keep-memory without the page faults of freed memory

The models have the shape of ResNet-18, of ConvNeXt-T and of a diffusion model's U-Net, on small
images; weights are random. Gradients end in ``.grad``, which is empty before, as in a training
loop.
"""

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import bnrewrite
from benchmarks import hand_written
from benchmarks.cases import HAND, NATIVE, OPTIMISED
from benchmarks.measure import CLOCKS, Clock, interleaved, keep_memory, saved_bytes
from benchmarks.network_cases import COMPILED, under_compile
from benchmarks.onnx_models import Block, Norm, unet
from benchmarks.tables import RESULTS, Results

INDUCTOR = f"{OPTIMISED}, Inductor"


class BasicBlock(Block):
    """ResNet-18's: two 3x3 convolutions with a norm behind each."""

    def __init__(self, before: int, after: int, stride: int, norm: Norm) -> None:
        body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False), norm(after), nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False), norm(after),
        )  # fmt: skip
        super().__init__(body, before, after, stride, norm)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7 convolution, LayerNorm over the channels, two pointwise ones, a shortcut."""

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 7, padding=3, groups=channels),
            norm(channels),
            nn.Conv2d(channels, 4 * channels, 1),
            nn.GELU(),
            nn.Conv2d(4 * channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.body(x)
        return y


class Network(nn.Module):
    """Layers one after the other, in a module of one's own: torch.compile makes one graph of it."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def resnet18(norm: Norm) -> nn.Module:
    """20 batch norms, on 64 to 512 channels."""
    blocks: list[nn.Module] = []
    before = 64
    for stage in range(4):
        for stride in (2 if stage else 1, 1):
            blocks.append(BasicBlock(before, 64 * 2**stage, stride, norm))
            before = 64 * 2**stage
    stem = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3, bias=False), norm(64), nn.ReLU())
    pool, flat = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return Network(stem, nn.MaxPool2d(3, 2, 1), *blocks, pool, flat, nn.Linear(512, 10))


def convnext_tiny(norm: Norm) -> nn.Module:
    """22 layer norms, on 96 to 768 channels."""
    layers: list[nn.Module] = [nn.Conv2d(3, 96, 4, 4), norm(96)]
    for stage, depth in enumerate((3, 3, 9, 3)):
        channels = 96 * 2**stage
        if stage:
            layers += [norm(channels // 2), nn.Conv2d(channels // 2, channels, 2, 2)]
        layers += [ConvNeXtBlock(channels, norm) for _ in range(depth)]
    pool, flat = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return Network(*layers, pool, flat, nn.Linear(768, 10))


@dataclass(frozen=True)
class Model:
    """A model made from its norm, and the two norms."""

    name: str
    make: Callable[[Norm], nn.Module]
    hand: Norm
    native: Norm
    shape: tuple[int, ...]


MODELS = (
    Model("ResNet-18", resnet18, hand_written.BatchNorm, nn.BatchNorm2d, (8, 3, 64, 64)),
    Model(
        "ConvNeXt-T",
        convnext_tiny,
        hand_written.ChannelNorm,
        hand_written.NativeChannelNorm,
        (4, 3, 64, 64),
    ),
    Model(
        "U-Net",
        lambda norm: Network(unet(norm, 64)),
        lambda channels: hand_written.GroupNorm(8, channels),
        lambda channels: nn.GroupNorm(8, channels),
        (2, 3, 64, 64),
    ),
)


@dataclass(frozen=True)
class Result:
    """Milliseconds of a step by peer, ratios of peers, bytes saved for the backward by peer."""

    model: str
    layout: str
    milliseconds: dict[str, float]
    spread: dict[str, float]
    over: dict[str, float]
    saved: dict[str, int]


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Measure, print the table, write it."""
    parser = argparse.ArgumentParser(description="training steps of whole models")
    parser.add_argument("--only", default="", help="models whose name contains this")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compile", action="store_true", help="torch.compile as further peers")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--keep-memory", action="store_true", help="freed memory, in this process")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.keep_memory:
        keep_memory()
    results = [
        measure(model, layout, options.rounds, CLOCKS[options.clock], compiled=options.compile)
        for model in MODELS
        if options.only in model.name
        for layout in ("contiguous", "channels_last")
    ]
    if not results:
        parser.error(f"{options.only!r} is in none of {[model.name for model in MODELS]}")
    peers = list(results[0].milliseconds)
    table = Results(
        name="training_steps_kept" if options.keep_memory else "training_steps",
        headings=("model", "layout", *(f"{peer} ms" for peer in peers),
                  *results[0].over,
                  "MiB saved for backward (" + " / ".join((HAND, NATIVE, OPTIMISED)) + ")"),
        rows=[_cells(result) for result in results],
        records=[asdict(result) for result in results],
        remark="Forward, loss and backward; medians of interleaved rounds; ratios are the medians "
        "of the rounds' ratios."
        + " The C library keeps memory that is freed." * options.keep_memory,
    )  # fmt: skip
    table.show()
    table.write(options.output)
    Console().print(f"written: {options.output}/{table.name}.json, {table.name}.md")
    return results


def measure(model: Model, layout: str, rounds: int, clock: Clock, *, compiled: bool) -> Result:
    """Check that the peers learn the same, and time them in turns."""
    torch.manual_seed(0)
    dense = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.randn(model.shape).contiguous(memory_format=dense)
    hand, native = (model.make(norm) for norm in (model.hand, model.native))
    for own, given in zip(native.parameters(), hand.parameters(), strict=True):
        own.data.copy_(given.data.reshape(own.shape))
    for each in (hand, native):
        lay_out: Any = each.to  # whose types know no layout
        lay_out(memory_format=dense)
    torch.compiler.reset()
    peers: dict[str, nn.Module] = {
        HAND: hand,
        NATIVE: native,
        OPTIMISED: bnrewrite.optimize(copy.deepcopy(hand), backend="eager"),
    }
    if compiled:
        peers |= {told: under_compile(peers[name]) for name, told in COMPILED.items()}
        peers[INDUCTOR] = bnrewrite.optimize(copy.deepcopy(hand), backend="inductor", dynamic=False)
    losses = [_loss(peer, x).item() for peer in peers.values()]
    torch.testing.assert_close(losses, [losses[0]] * len(losses), rtol=1e-3, atol=0)
    timings = interleaved(
        {name: _step(peer, x) for name, peer in peers.items()},
        rounds=rounds, device="cpu", clock=clock,
    )  # fmt: skip
    return Result(
        model=model.name,
        layout=layout,
        milliseconds={name: timing.median * 1e3 for name, timing in timings.items()},
        spread={name: timing.spread for name, timing in timings.items()},
        over={
            f"{ours} / {other}": timings[ours].ratio(timings[other])
            for ours in (OPTIMISED, INDUCTOR)
            for other in (HAND, NATIVE, *COMPILED.values())
            if ours in peers and other in peers
        },
        saved={
            name: saved_bytes(partial(_loss, peers[name], x), peers[name].parameters())
            for name in (HAND, NATIVE, OPTIMISED)
        },
    )


def _loss(peer: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = peer(x)
    return y.square().mean()


def _step(peer: nn.Module, x: Tensor) -> Callable[[], object]:
    def step() -> None:
        peer.zero_grad(set_to_none=True)
        torch.autograd.backward(_loss(peer, x))

    return step


def _cells(result: Result) -> list[str]:
    saved = " / ".join(f"{result.saved[name] / 2**20:.3g}" for name in (HAND, NATIVE, OPTIMISED))
    return [
        result.model, result.layout, *(f"{value:.3g}" for value in result.milliseconds.values()),
        *(f"{value:.2f}" for value in result.over.values()), saved,
    ]  # fmt: skip


if __name__ == "__main__":
    main()
