"""Kernels of means over groups under Triton's interpreter, run by ``test_triton_kernels.py``."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from contract import contract_violations, error
from programs import ACROSS, Problem, by_reference, compare, draw
from test_models_across import Response, Switched
from torch import Tensor, nn

from bnrewrite import explain, optimize
from bnrewrite.kernels.generated import runtime
from bnrewrite.kernels.generated.program import parse
from bnrewrite.kernels.generated.record import are_plain
from bnrewrite.kernels.triton import launch, operators, run_on_gpu, tiles

assert operators  # its import registers the operators
assert os.environ.get("TRITON_INTERPRET") == "1", "run tests/test_triton_kernels.py"

SHAPE = (2, 4, 3, 7)
INSIDE = "second axis inside"
RESPONSE = "x[n c h w] over h w about zero; t0[c]; "
TEXTS = ACROSS | {
    "residual": (
        f"{RESPONSE}m0[n] = Root(N*V); scale = t0*Root(N*V)/(m0 + 1.0e-6); residual; relu"
    ),
    "of all": "x[n c h w] over h w; t0[c]; m0[] = t0*M; centre = m0; scale = 1; u0 = m0; gelu",
    "stopped": f"{RESPONSE}m0[n] = Vs; scale = t0*(Vs + m0)**(-1/2); silu",
    "of rows": "x[n c h w] over w; m0[h n] = M; m1[c] = V + m0; centre = m0; scale = 1/m1",
    "of one group": "x[n c h w] over n c h w; m0[] = V; centre = M; scale = (V + m0)**(-1/2)",
}
SQUARED = (
    "x[n c h w] over h w about zero; m0[n] = Root(N*V); scale = (1 + (Root(N*V) - m0)**2)**(-1/2)"
)


@pytest.fixture(params=["whole groups", "parts of groups"])
def tiling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Groups of small tensors are in one tile each, and so are those of a mean; or in several."""
    launch._remembered.cache_clear()
    if request.param == "parts of groups":
        for name, value in {"PART": 16, "ROWS": 16, "SHARED": 8}.items():
            monkeypatch.setattr(tiles, name, value)
    return str(request.param)


def by_kernels(text: str, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    made = run_on_gpu(text, x, tensors)
    assert made is not None
    return made


def launched(problem: Problem) -> launch.Launch:
    found = launch.launch_of(problem.text, problem.x.float(), [t.float() for t in problem.tensors])
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        *((kind, "contiguous") for kind in TEXTS if kind not in ("mixture", "of rows")),
        ("mixture", INSIDE),
    ],
)
def test_values_and_gradients(kind: str, layout: str, tiling: str) -> None:
    problem = draw(TEXTS[kind], SHAPE, layout)
    parts = {cut.parts > 1 for cut in (launched(problem).forward, launched(problem).backward)}
    assert parts == {tiling == "parts of groups"}
    assert compare(problem, by_kernels, torch.float32) == []


@pytest.mark.parametrize(
    ("kind", "shape", "layout"),
    [
        ("response", (1, 1, 1, 1), "contiguous"),
        ("response", (5, 3, 2, 2), "expanded"),
        ("response", (2, 3, 40, 103), "with holes"),
        ("mixture", (2, 3, 20, 1), INSIDE),
        ("of rows", (2, 3, 4, 5), "contiguous"),
    ],
)
def test_sizes(kind: str, shape: tuple[int, ...], layout: str) -> None:
    launch._remembered.cache_clear()
    assert compare(draw(TEXTS[kind], shape, layout), by_kernels, torch.float32) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    assert compare(draw(TEXTS["response"], SHAPE, INSIDE), by_kernels, dtype) == []


@pytest.mark.parametrize("tiling", ["parts of groups"], indirect=True)
def test_counting_in_64_bits(monkeypatch: pytest.MonkeyPatch, tiling: str) -> None:
    monkeypatch.setattr(launch, "LARGEST", 0)
    assert compare(draw(TEXTS["mixture"], SHAPE), by_kernels, torch.float32) == []


@pytest.mark.parametrize(
    ("kind", "place", "value"),
    [
        ("response", "sample", 0.0),
        ("response", "element", float("inf")),
        ("mixture", "sample", 0.0),
        ("mixture", "element", float("nan")),
        ("mixture", "element", float("inf")),
    ],
)
def test_exceptional_values(kind: str, place: str, value: float) -> None:
    """NaN and inf are where the formula by torch's operations has them, others are close."""
    problem = draw(TEXTS[kind], SHAPE)
    x = problem.x.clone()
    {"element": x[1, 1, 2, 2], "sample": x[1]}[place].fill_(value)
    problem = replace(problem, x=x)
    mine = problem.run(by_kernels, torch.float32)
    for name, own in problem.run(by_reference, torch.float32).items():
        torch.testing.assert_close(mine[name], own, equal_nan=True, rtol=1e-3, atol=1e-3)


def by_hand(_: str, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """``SQUARED`` as it is written."""
    lengths = torch.norm(x, dim=(2, 3), keepdim=True)
    return (x * (1 + (lengths - lengths.mean(1, keepdim=True)).square()).rsqrt(),)


def test_differences_of_groups_far_from_zero(tiling: str) -> None:
    """Moments have more digits than float32, in which operations by hand lose theirs."""
    problem = draw(SQUARED, (3, 8, 5, 7), mean=4096)
    exact = problem.run(by_hand, torch.float64)
    users = problem.run(by_hand, torch.float32)
    mine = problem.run(by_kernels, torch.float32)
    for name, value in exact.items():
        assert 4 * error(mine[name], value) < error(users[name], value), name


def test_operators() -> None:
    """Schemas, autograd and fake tensors; tracing is in ``test_triton_builds.py``."""
    problem = draw(TEXTS["response"], SHAPE)
    x = problem.x.float().requires_grad_()
    tensors = [t.float().requires_grad_() for t in problem.tensors]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    forward, backward = torch.ops.bnrewrite.norm_forward, torch.ops.bnrewrite.norm_backward
    torch.library.opcheck(forward.default, (problem.text, x, tensors), test_utils=checks)
    x, plain = x.detach(), [t.detach() for t in tensors]
    _, moments, *_ = forward(problem.text, x, plain)
    given = (problem.text, problem.cotangent.float(), x, None, moments, plain)
    torch.library.opcheck(backward.default, given, test_utils=checks)


def test_derivatives_of_derivatives() -> None:
    problem = draw(TEXTS["response"], (2, 2, 1, 2))
    noise = torch.randn(problem.x.shape, generator=torch.Generator().manual_seed(3)).double() / 64
    given = [t.requires_grad_() for t in (problem.x + noise, *problem.tensors)]
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        check(lambda *each: by_kernels(problem.text, *each)[0], given, fast_mode=True)


def test_what_is_kept_for_the_backward() -> None:
    """A moment and two coefficients of each group, and the means, in double precision."""
    problem = draw(TEXTS["response"], SHAPE)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        single = [t.float() for t in problem.tensors]
        by_kernels(problem.text, problem.x.float().requires_grad_(), *single)
    tensors = sum(4 * t.numel() for t in problem.tensors)
    assert sum(kept.values()) <= 4 * problem.x.numel() + 8 * (3 * 8 + 2) + tensors


@pytest.mark.parametrize("build", [Response, partial(Switched, far=4096)])
def test_models(
    build: Callable[[int], nn.Module], monkeypatch: pytest.MonkeyPatch, repeatable: None
) -> None:
    """The texts that the passes write, with the buffers: the contract holds here too."""
    texts: list[str] = []

    def call(text: str, x: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        if not are_plain(x, *tensors):
            return None
        texts.append(text)
        return by_kernels(text, x, *tensors)

    monkeypatch.setattr(runtime, "call", call)

    def generated(model: Any) -> Any:
        return optimize(model, backend="eager", kernels="generated")

    model, batches = build(4), [torch.randn(SHAPE) * 2 + 0.5 for _ in range(2)]
    assert contract_violations(model, generated, batches) == []
    assert any(parse(text).means for text in texts)
    (site,) = explain(generated(model), batches[0]).sites
    assert site.lowering == "generated"


def test_what_has_no_kernel() -> None:
    text = "x[n c h w] over h w; t0[w]; m0[n] = V; centre = M; scale = t0/m0"
    assert run_on_gpu(text, torch.randn(SHAPE), [torch.ones(7)]) is None
    assert run_on_gpu(TEXTS["response"], torch.randn(0, 8, 5, 7), [torch.ones(8)] * 2) is None
