"""Triton kernels without a GPU: interpreted in a process of its own, chosen by the passes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule

from bnrewrite.capture.canonical import Canonical, canonicalise
from bnrewrite.kernels import norm, why_no_triton
from bnrewrite.options import Options
from bnrewrite.passes import rewrite
from bnrewrite.passes.cost_table import Table, Work

FILES = [
    Path(__file__).with_name(name)
    for name in ("triton_interpreted.py", "triton_interpreted_across.py")
]


def test_every_kernel_under_the_interpreter() -> None:
    """The tests of ``triton_interpreted.py`` and of ``triton_interpreted_across.py``."""
    version = pytest.importorskip("triton").__version__
    if Version(version) < Version("3.7") and Version(np.__version__) >= Version("2.4"):
        pytest.skip("the interpreter of this Triton has no loops with this NumPy")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        *map(str, FILES),
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    outcome = subprocess.run(
        command,
        cwd=FILES[0].parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert outcome.returncode == 0, outcome.stdout[-4000:] + outcome.stderr[-1000:]
    passed = re.search(r"(\d+) passed", outcome.stdout)
    assert passed is not None
    assert int(passed[1]) > 90


class LayerNorm(nn.Module):
    """A layer norm by hand, and the activation behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * self.weight
        ).relu()


class Response(nn.Module):
    """The length of each channel over the mean of all lengths, or over the largest."""

    def __init__(self, *, largest: bool = False) -> None:
        super().__init__()
        self.largest = largest

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.norm(x, p=2, dim=(2, 3), keepdim=True)
        others = lengths.amax(1, True) if self.largest else lengths.mean(1, True)
        y: Tensor = x * (lengths / (others + 1e-6)) + x
        return y.relu()


ROWS, IMAGES = (32, 64), (4, 64, 14, 14)


def on_a_gpu(
    options: Options, model: nn.Module | None = None, shape: tuple[int, ...] = ROWS
) -> tuple[str | None, str, list[object]]:
    """The lowering, the notes and the targets that a model gets whose tensors lie on a GPU."""
    graphs: list[Canonical] = []

    def backend(graph: GraphModule, inputs: Sequence[Tensor]) -> Callable[..., object]:
        graphs.append(canonicalise(graph, inputs))
        return graph.forward

    torch.compile(model or LayerNorm(), backend=backend)(torch.randn(shape))
    (canonical,) = graphs
    for node in canonical.module.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            with value.fake_mode:
                node.meta["val"] = torch.empty_strided(
                    value.shape, value.stride(), dtype=value.dtype, device="cuda"
                )
    (site,) = rewrite(canonical, options)
    targets = [node.target for node in canonical.module.graph.nodes]
    return site.lowering, str(site), targets


def test_a_gpu_gets_kernels_where_they_are_asked_for() -> None:
    pytest.importorskip("triton")
    lowering, _, targets = on_a_gpu(Options(kernels="generated"))
    assert lowering == "generated"
    assert norm in targets
    assert torch.ops.aten.relu.default not in targets


def test_inductor_gets_the_operator() -> None:
    """It takes the kernels over; a function in Python would stop it."""
    pytest.importorskip("triton")
    lowering, _, targets = on_a_gpu(Options(kernels="generated", stage="inductor"))
    assert lowering == "generated"
    assert torch.ops.bnrewrite.norm_forward.default in targets
    assert not {norm, torch.ops.aten.relu.default} & set(targets)
    for options in (Options(stage="inductor"), Options(kernels="generated", stage="export")):
        assert torch.ops.bnrewrite.norm_forward.default not in on_a_gpu(options)[2]


def test_a_gpu_gets_kernels_of_means_over_groups(unwritable: list[str]) -> None:
    """By a call or by the operator; a maximum over groups has none, as on a CPU."""
    pytest.importorskip("triton")
    eager = Options(kernels="generated")
    inductor = Options(kernels="generated", stage="inductor")
    operator = torch.ops.bnrewrite.norm_forward.default
    for options, target in ((eager, norm), (inductor, operator)):
        lowering, _, targets = on_a_gpu(options, Response(), IMAGES)
        assert lowering == "generated"
        assert target in targets
        assert torch.ops.aten.relu.default not in targets
    assert unwritable == []
    lowering, _, targets = on_a_gpu(eager, Response(largest=True), IMAGES)
    assert lowering != "generated"
    assert norm not in targets
    assert unwritable == ["another statistic than the mean and the variance"]


def test_inductor_gets_none_where_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr("bnrewrite.passes.generated.operator_of", lambda *given: None)
    lowering, _, targets = on_a_gpu(Options(kernels="generated", stage="inductor"))
    assert lowering == "native"
    assert norm not in targets


@pytest.mark.parametrize("kernels", ["auto", "native", "composite"])
def test_a_gpu_gets_none_unasked(kernels: str) -> None:
    """No GPU has measured them."""
    lowering, _, targets = on_a_gpu(Options(kernels=kernels))
    assert lowering in ("native", "composite")
    assert norm not in targets


def test_a_gpu_that_was_measured_takes_what_won(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    key = Work("layer_norm", "rows", "float32", training=False).key
    for generated, expected in ((1.0, "generated"), (3.0, "native")):
        times = {"generated": (generated,), "native": (2.0,), "composite": (4.0,)}
        table = Table((2048,), {key: times})
        monkeypatch.setattr("bnrewrite.passes.costs.table_of", lambda device, stage, t=table: t)
        assert on_a_gpu(Options())[0] == expected


def test_a_gpu_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        why_no_triton.cache_clear()
        reason = why_no_triton()
    why_no_triton.cache_clear()
    assert reason == "triton is not installed"
    monkeypatch.setattr("bnrewrite.passes.plan.why_no_triton", lambda: reason)
    lowering, told, targets = on_a_gpu(Options(kernels="generated"))
    assert lowering == "native"
    assert "no kernel is compiled for it: triton is not installed" in told
    assert norm not in targets


def test_a_cpu_needs_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)  # whoever imports it now gets an error
    x = torch.randn(3, 5)
    y = norm("x[a b] over b; centre = M; scale = 1", x)
    torch.testing.assert_close(y, x - x.mean(-1, keepdim=True))
