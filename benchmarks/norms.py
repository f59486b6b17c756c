"""Speed and memory of the result: hand-written, native and optimised, in one interleaved run.

    python -m benchmarks.norms      every case; writes norms.{json,md,png} to benchmarks/results
    python -m benchmarks.norms --only batch_norm --rounds 11 --output elsewhere

A case is a norm at a shape and a memory layout, in training (forward and backward: time per step,
bytes kept for the backward) and in evaluation (forward only).
"""

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import bnrewrite
from benchmarks import hand_written
from benchmarks.measure import interleaved, machine, saved_bytes
from benchmarks.tables import RESULTS, Results

PEERS = ("hand-written", "native", "optimised")
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Norm:
    """A norm in its two forms, and the shapes that it is measured at."""

    name: str
    hand: Callable[[int], nn.Module]  # from the number of channels
    native: Callable[[int], nn.Module]
    shapes: tuple[tuple[int, ...], ...]  # channels: axis 1 of rank 4, else the last axis


IMAGES = ((32, 64, 56, 56), (8, 256, 14, 14), (2, 16, 8, 8))
TOKENS = ((8, 512, 768), (4, 128, 256), (2, 8, 64))

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
class Result:
    """One case: milliseconds per peer, ratios of the optimised one, bytes saved for backward."""

    norm: str
    shape: tuple[int, ...]
    layout: str
    mode: str
    milliseconds: dict[str, float]
    spread: dict[str, float]
    over_native: float
    over_hand_written: float
    saved: dict[str, int] | None  # None in evaluation
    lowerings: tuple[str, ...]


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Measure what was asked for, print the table, and write the three files."""
    parser = argparse.ArgumentParser(description="hand-written, native and optimised norms")
    parser.add_argument("--only", help="norms whose name contains this")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)

    cases = [
        (norm, shape, layout, mode)
        for norm in NORMS
        if options.only is None or options.only in norm.name
        for shape in norm.shapes
        for layout in (LAYOUTS if len(shape) == 4 else ("contiguous",))
        for mode in ("train", "eval")
    ]
    if not cases:
        parser.error(f"no norm's name contains {options.only!r}: {[n.name for n in NORMS]}")
    console = Console()
    results = [
        run_case(*case, rounds=options.rounds, device=options.device)
        for case in track(cases, "measuring", console=console, transient=True)
    ]
    table = Results(
        name="norms",
        headings=HEADINGS,
        rows=[_cells(result) for result in results],
        records=[asdict(result) for result in results],
        remark="Medians of interleaved rounds; ratios are medians of the rounds' ratios.",
        device=options.device,
    )
    table.show(console)
    table.write(options.output)
    _plot(results, options.output / "norms.png", str(machine(options.device)["device"]))
    console.print(f"written: {options.output}/norms.json, norms.md, norms.png")
    return results


def run_case(
    norm: Norm, shape: tuple[int, ...], layout: str, mode: str, *, rounds: int, device: str
) -> Result:
    """Build the three peers with equal parameters, check that they agree, time them in turns."""
    torch.manual_seed(0)
    training = mode == "train"
    x, cotangent = (_input(shape, layout, device) for _ in range(2))
    _check_agreement(_peers(norm, x.double(), training=training), x.double())
    peers = _peers(norm, x, training=training)
    with torch.set_grad_enabled(training):
        report = bnrewrite.explain(peers["hand-written"], x.requires_grad_(training))
        calls = {
            name: _training_step(peer, x, cotangent) if training else _call(peer, x)
            for name, peer in peers.items()
        }
        timings = interleaved(calls, rounds=rounds, device=device)
    saved = None
    if training:
        saved = {
            name: saved_bytes(_call(peer, x), [*peer.parameters(), *peer.buffers()])
            for name, peer in peers.items()
        }
    optimised = timings["optimised"]
    return Result(
        norm=norm.name,
        shape=shape,
        layout=layout,
        mode=mode,
        milliseconds={name: timing.median * 1e3 for name, timing in timings.items()},
        spread={name: timing.spread for name, timing in timings.items()},
        over_native=optimised.ratio(timings["native"]),
        over_hand_written=optimised.ratio(timings["hand-written"]),
        saved=saved,
        lowerings=tuple(site.lowering or "left" for site in report.sites),
    )


def _input(shape: tuple[int, ...], layout: str, device: str) -> Tensor:
    x = torch.randn(shape, device=device)
    return x.contiguous(memory_format=LAYOUTS[layout]) if len(shape) == 4 else x


def _peers(norm: Norm, x: Tensor, *, training: bool) -> dict[str, nn.Module]:
    channels = x.shape[1] if x.dim() == 4 else x.shape[-1]
    hand = norm.hand(channels).to(x.device, x.dtype).train(training)
    native = norm.native(channels).to(x.device, x.dtype).train(training)
    for own, given in zip(native.parameters(), hand.parameters(), strict=True):
        own.data.copy_(given.data.normal_().reshape(own.shape))
    torch.compiler.reset()  # else the second shape of a norm turns its graph dynamic
    optimised = bnrewrite.optimize(copy.deepcopy(hand), backend="eager")
    return {"hand-written": hand, "native": native, "optimised": optimised}


def _check_agreement(peers: dict[str, nn.Module], x: Tensor) -> None:
    """Raise where the peers are not one formula; in float64, where a spelling's rounding is small."""
    expected = peers["native"](x)
    for name in ("hand-written", "optimised"):
        torch.testing.assert_close(peers[name](x), expected, msg=f"{name}: not what native gives")


def _call(peer: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    return lambda: peer(x)


def _training_step(peer: nn.Module, x: Tensor, cotangent: Tensor) -> Callable[[], object]:
    inputs = (x, *peer.parameters())
    # grad, not backward(): adding to .grad is the same work for all peers and would hide ratios
    return lambda: torch.autograd.grad(peer(x), inputs, cotangent)


HEADINGS = (
    "norm",
    "shape",
    "layout",
    "mode",
    *(f"{peer} ms" for peer in PEERS),
    "optimised / native",
    "optimised / hand-written",
    "MiB saved for backward (" + " / ".join(PEERS) + ")",
    "lowering",
)


def _cells(result: Result) -> list[str]:
    saved = result.saved
    return [
        result.norm,
        "x".join(map(str, result.shape)),
        result.layout,
        result.mode,
        *(f"{result.milliseconds[peer]:.3g}" for peer in PEERS),
        f"{result.over_native:.2f}",
        f"{result.over_hand_written:.2f}",
        "" if saved is None else " / ".join(f"{saved[peer] / 2**20:.3g}" for peer in PEERS),
        ", ".join(result.lowerings),
    ]


def _plot(results: list[Result], path: Path, device: str) -> None:
    import matplotlib as mpl  # here: only the plot needs it, and its import takes a second

    mpl.use("Agg")
    from matplotlib import pyplot

    labels = [
        f"{result.norm}, {'x'.join(map(str, result.shape))}, {result.layout}, {result.mode}"
        for result in results
    ]
    rows = range(len(results))
    figure, axes = pyplot.subplots(figsize=(10, 0.32 * len(results) + 1.5), layout="constrained")
    for offset, peer in zip((-0.2, 0.2), ("hand-written", "optimised"), strict=True):
        ratios = [result.milliseconds[peer] / result.milliseconds["native"] for result in results]
        axes.barh([row + offset for row in rows], ratios, height=0.38, label=peer)
    axes.axvline(1.0, color="black", linewidth=1, label="native = 1")
    axes.set_yticks(rows, labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("time relative to the native module (less is faster)")
    axes.set_title(device, fontsize=9)
    axes.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
