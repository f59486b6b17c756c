"""Triton kernels compiled for GPUs that are not there, and traced: registers, spills, graphs."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import ACROSS, PROGRAMS
from torch import Tensor
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.aot_autograd import aot_function
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from bnrewrite.kernels.generated.program import parse

triton = pytest.importorskip("triton")

from bnrewrite.kernels.triton import launch, operators, tiles  # noqa: E402
from bnrewrite.kernels.triton.compiled import kernel  # noqa: E402

TARGETS = (80, 90, 100)
NAMES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16"}
LAST = torch.channels_last
PLAIN = torch.contiguous_format

TEXTS = (
    PROGRAMS
    | ACROSS
    | {
        "layer gelu": f"{PROGRAMS['layer']}; gelu_tanh",
        "of extents": "x[n c h] over n h; centre = M; scale = (V*N/Max(1, Nn*Nh - 1))**(-1/2)",
        "means of extents": (
            "x[n c h] over h; m0[c] = V*Nh/Max(1, Nn*Nh - 1); centre = M; scale = (V + m0)**(-1/2)"
        ),
    }
)

# What fills its tile most: most registers, and each of the six kernels for each way through memory.
BUILDS: list[tuple[str, tuple[int, ...], torch.dtype, torch.memory_format]] = [
    ("layer", (16, 512, 8192), torch.bfloat16, PLAIN),
    ("layer", (8, 512, 16384), torch.float32, PLAIN),
    ("layer of channels", (32, 96, 56, 56), torch.bfloat16, PLAIN),
    ("residual", (32, 64, 56, 56), torch.bfloat16, LAST),
    ("batch relu", (32, 64, 56, 56), torch.float32, PLAIN),
    ("group", (32, 64, 56, 56), torch.float32, PLAIN),
    ("layer gelu", (16, 512, 4096), torch.bfloat16, PLAIN),
    ("batch relu", (8192, 64, 64, 80), torch.bfloat16, PLAIN),  # more than 32 bits count
]


MEANS: list[tuple[str, tuple[int, ...], torch.dtype, torch.memory_format]] = [
    ("response", (32, 192, 28, 28), torch.float32, PLAIN),
    ("mixture", (32, 64, 56, 56), torch.bfloat16, LAST),
]


@dataclass(frozen=True)
class Call:
    """A kernel that a program launches, and with what."""

    found: launch.Launch
    name: str
    tile: tiles.Tile | tiles.MeanTile
    arguments: tuple[Any, ...]
    parts: bool


def fakes(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    program = parse(TEXTS[kind])
    sizes = program.axis_sizes(shape)
    tensors = [torch.empty([sizes[axis] for axis in own]) for own in program.tensors]
    x = torch.empty(shape, dtype=dtype)
    return x, [*tensors, *([torch.empty_like(x)] if program.residual else [])]


def calls(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format
) -> Iterator[Call]:
    """Every launch of a forward and a backward."""
    text, seen = TEXTS[kind], []
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode():

        def remember(
            self: launch.Launch,
            name: str,
            _: Any,
            tile: tiles.Tile | tiles.MeanTile,
            *given: Any,
            parts: bool,
        ) -> None:
            seen.append(Call(self, name, tile, given, parts))

        patch.setattr(launch.Launch, "run", remember)
        x, tensors = fakes(kind, shape, dtype)
        x = x.to(memory_format=layout)
        tensors = [t.to(memory_format=layout) if t.shape == x.shape else t for t in tensors]
        found = launch.launch_of(text, x, tensors)
        assert found is not None
        y, moments, _ = launch.run_forward(found, x, tensors)
        masked = y if parse(text).residual else None
        launch.run_backward(found, torch.empty_like(y), x, masked, moments, tensors)
    return iter(seen)


def compiled(call: Call, target: int) -> Any:
    """A kernel compiled for a GPU, with what Triton knows of such arguments."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = kernel(call.found.tiled, call.name)
    extents = [call.found.sizes[str(symbol)[1:]] for symbol in call.found.tiled.extents]
    constants = call.tile.sizes | ({"P": call.tile.most_parts} if call.parts else {})
    values = [*call.arguments, *call.found.lengths, *extents, *constants.values()]
    signature: dict[str, str] = {}
    known: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for place, (parameter, value) in enumerate(zip(function.params, values, strict=True)):
        if isinstance(value, Tensor):
            signature[parameter.name] = f"*{NAMES[value.dtype]}"
        elif parameter.is_constexpr or value == 1:
            signature[parameter.name] = "constexpr"
            known[place,] = value
            continue
        else:
            signature[parameter.name] = "i32"
        if isinstance(value, Tensor) or value % 16 == 0:
            attributes[place,] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, known, attributes)
    options = {"num_warps": call.tile.warps, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def usage(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers, and bytes of spills, of each thread."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [str(tool), "--dump-resource-usage", str(path)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", told)}


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_spills(
    target: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """At the chosen tiles; ``--junitxml`` reports the registers of each kernel."""
    names = set()
    for build in [*BUILDS, *MEANS] if target == 90 else [*BUILDS[:5:2], MEANS[0]]:
        for call in calls(*build):
            made = compiled(call, target)
            found = usage(made.asm["cubin"], tmp_path)
            label = f"{call.name} of {build[0]}, sm_{target}"
            record_property(label, f"{found}, {call.tile}")
            assert found["STACK"] == found["LOCAL"] == 0, f"{label}: {found}, {call.tile}"
            assert found["REG"] * call.tile.warps * 32 <= 65536, f"{label}: {found}, {call.tile}"
            names.add(call.name)
    means = {"forward_mean0", "forward_groups", "backward_mean0", "backward_groups"}
    if target == 90:
        means |= {
            f"{direction}_mean{k}" for direction in ("forward", "backward") for k in (1, 2, 3)
        }
    assert means <= names
    assert len(names - means) == 6


@pytest.mark.parametrize(
    ("kind", "shape", "looping"),
    [
        ("of extents", (64, 256, 49), ["backward"]),
        ("of extents", (8, 64, 3136), ["backward_sums"]),
        ("means of extents", (8, 64, 49), ["forward_mean0", "backward_mean0"]),
    ],
)
def test_extents_inside_a_loop(kind: str, shape: tuple[int, ...], looping: list[str]) -> None:
    """Nothing changes its type there, which Triton would not compile, and its interpreter runs."""
    found = [call for call in calls(kind, shape, torch.float32, PLAIN) if call.name in looping]
    assert [call.name for call in found] == looping
    for call in found:
        assert compiled(call, 90).asm["cubin"]


def test_memory_is_read_in_vectors() -> None:
    for build in (BUILDS[0], BUILDS[4]):
        for call in calls(*build):
            code = compiled(call, 90).asm["ptx"]
            assert re.search(r"ld\.global\S*\.v4\.b32", code), (build, call.name)


class Target:
    """In the place of a driver, where there is no GPU."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing asks for one, to find out what a kernel writes to."""
    monkeypatch.setattr(triton.runtime.driver, "_active", Target())


def kernels_of(graph: GraphModule) -> list[Any]:
    return [node for node in graph.graph.nodes if "triton_kernel" in str(node.target)]


@pytest.mark.parametrize("kind", ["layer", "running", "residual", "response"])
def test_what_torch_compile_sees(kind: str, target: None) -> None:
    """Kernels, no opaque operator, and what each of them writes and what it only reads."""
    text, program = TEXTS[kind], parse(TEXTS[kind])
    shape = (64, 8, 768) if kind == "layer" else (32, 64, 56, 56)
    graphs: list[GraphModule] = []

    def keep(gm: GraphModule, example_inputs: Sequence[Any]) -> Any:
        graphs.append(gm)
        return make_boxed_func(gm.forward)

    def call(x: Tensor, *tensors: Tensor) -> Any:
        y, _, *updates = torch.ops.bnrewrite.norm_forward(text, x, list(tensors))
        return (y.sin(), *(update.detach() for update in updates))

    with FakeTensorMode():
        x, tensors = fakes(kind, shape, torch.float32)
        for i, tensor in enumerate([x, *tensors], -1):
            tensor.requires_grad_(i not in program.fixed)
        y, *_ = aot_function(call, keep, keep)(x, *tensors)
        y.backward(torch.empty_like(y))
    written = {"y", "moments", "means", "spreads", "sums", "totals", "slopes", "dx", "dresidual"}
    for graph, moments in zip(graphs, (True, False), strict=True):
        found = kernels_of(graph)
        assert len(found) in ((4,) if program.means else (1, 2))
        assert "bnrewrite" not in graph.code
        for node in found:
            names = set(node.kwargs["tensors_to_clone"])
            own = {name for name in names if re.fullmatch(r"(own|cells|updates)\d", name)}
            assert names - own <= (written if moments else written - {"moments"})
    kept = {name for node in kernels_of(graphs[0]) for name in node.kwargs["tensors_to_clone"]}
    assert {"y", "moments"} <= kept


def test_symbolic_sizes(target: None) -> None:
    """One graph for all batches: lengths and grids are computed when it runs."""
    for kind, shape in (
        ("layer", (64, 8, 768)),
        ("batch relu", (32, 64, 56, 56)),
        ("response", (32, 192, 28, 28)),
    ):
        text = TEXTS[kind]
        with FakeTensorMode():
            x, tensors = fakes(kind, shape, torch.float32)

        def call(x: Tensor, *tensors: Tensor, text: str = text) -> list[Tensor]:
            y, moments, *_ = operators.forward(text, x, list(tensors))
            return [y, *operators.backward(text, y, x, None, moments, list(tensors))]

        given = [torch.empty(t.shape) for t in (x, *tensors)]
        graph = make_fx(call, tracing_mode="symbolic")(*given)
        found = kernels_of(graph)
        assert found
        for node in found:
            assert not isinstance(node.kwargs["kwargs"]["n0"], int)
        assert any(not isinstance(node.kwargs["grid"][0][0], int) for node in found)
