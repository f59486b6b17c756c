"""Triton kernels under Triton's interpreter, against the formula in float64.

``test_triton_kernels.py`` runs this file in a process of its own: whether Triton interprets is
decided for the whole process, when it is imported.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from programs import LAYOUTS, PROGRAMS, Problem, by_reference, compare, draw
from torch import Tensor

from bnrewrite.kernels.generated.program import parse
from bnrewrite.kernels.triton import launch, operators, run_on_gpu, tiles

assert operators  # its import registers the operators
assert os.environ.get("TRITON_INTERPRET") == "1", "run tests/test_triton_kernels.py"

SHAPES = {3: (3, 5, 37), 4: (3, 8, 5, 7)}
PARTS = [
    *((kind, "contiguous") for kind in ("batch relu", "group", "layer")),
    *((kind, "contiguous") for kind in ("length", "deviation", "running")),
    ("group", "second axis inside"),
    ("residual", "second axis inside"),
]
SMALL_RESULTS = "x[a b] over b; t0[b]; centre = M; scale = 1.0e-3*t0*(V + 1.0e-5)**(-1/2)"
SMALL = {"FORWARD": 16, "BACKWARD": 16, "PART": 128, "ROWS": 16}


def shape(kind: str) -> tuple[int, ...]:
    return SHAPES[len(parse(PROGRAMS[kind]).dims)]


def by_kernels(text: str, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    made = run_on_gpu(text, x, tensors)
    assert made is not None
    return made


def are_whole(problem: Problem) -> set[bool]:
    """Whether tiles have whole groups, of the forward and the backward."""
    tensors = [tensor.float() for tensor in problem.tensors]
    found = launch.launch_of(problem.text, problem.x.float(), tensors)
    assert found is not None
    return {found.forward.whole, found.backward.whole}


@pytest.fixture(params=["whole groups", "parts of groups"])
def tiling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whole groups of small tensors fit into a tile, unless tiles are tiny."""
    launch._remembered.cache_clear()
    if request.param == "parts of groups":
        for name, value in SMALL.items():
            monkeypatch.setattr(tiles, name, value)
    return str(request.param)


@pytest.mark.parametrize("kind", PROGRAMS)
def test_whole_groups(kind: str) -> None:
    problem = draw(PROGRAMS[kind], shape(kind))
    assert are_whole(problem) == {True}
    assert compare(problem, by_kernels, torch.float32) == []


@pytest.mark.parametrize("tiling", ["parts of groups"], indirect=True)
@pytest.mark.parametrize(("kind", "layout"), PARTS)
def test_parts_of_groups(kind: str, layout: str, tiling: str) -> None:
    problem = draw(PROGRAMS[kind], shape(kind), layout)
    assert are_whole(problem) == {False}
    assert compare(problem, by_kernels, torch.float32) == []


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "contiguous"])
@pytest.mark.parametrize("kind", ["running", "layer of two axes"])
def test_layouts(kind: str, layout: str) -> None:
    launch._remembered.cache_clear()
    assert compare(draw(PROGRAMS[kind], shape(kind), layout), by_kernels, torch.float32) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["group", "layer", "running"])
def test_dtypes(kind: str, dtype: torch.dtype) -> None:
    launch._remembered.cache_clear()
    assert compare(draw(PROGRAMS[kind], shape(kind)), by_kernels, dtype) == []


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (PROGRAMS["layer"], (2, 1, 1)),
        (PROGRAMS["layer"], (1, 1, 70)),
        (PROGRAMS["batch"], (1, 1, 1, 2)),
        (PROGRAMS["batch"], (70, 3, 1, 1)),
        (PROGRAMS["instance"], (1, 1, 1, 1)),
        (PROGRAMS["group"], (2, 8, 1, 1)),
        *[
            (PROGRAMS["batch"] + f"; {name}", (3, 8, 5, 7))
            for name in ("relu6", "leaky_relu 0.1", "silu", "gelu", "gelu_tanh", "sigmoid", "tanh")
        ],
        (f"{SMALL_RESULTS}; tanh", (3, 37)),
        (PROGRAMS["layer"] + "; to float32; u0 = M; u1 = V**(1/3)", (3, 5, 37)),
        ("x[a b] over a b; t0[a]; centre = M; scale = t0/Na; u0 = M/Nb", (3, 37)),
        ("x[n c h w] over n c; t0[c h] fixed; centre = M; scale = t0*(V + 0.1)**(-1/2)",
         (3, 8, 5, 7)),
        ("x[a b] over b; t0[b]; t1[b]; centre = M; scale = t0/t1*(V + 0.1)**(-1/2); shift = t1**2",
         (3, 37)),
    ],
)  # fmt: skip
def test_other_programs_and_sizes(text: str, size: tuple[int, ...]) -> None:
    launch._remembered.cache_clear()
    assert compare(draw(text, size), by_kernels, torch.float32) == []


@pytest.mark.parametrize("kind", ["running"])
def test_counting_in_64_bits(kind: str, tiling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "LARGEST", 0)
    assert compare(draw(PROGRAMS[kind], shape(kind)), by_kernels, torch.float32) == []


def test_the_variance_of_numbers_far_from_zero(tiling: str) -> None:
    text = f"{PROGRAMS['batch']}; u0 = M; u1 = V"
    x = torch.randn(4, 3, 8, 9, generator=torch.Generator().manual_seed(1)) + 4096
    one = torch.ones(3)
    _, mean, variance = by_kernels(text, x, one, one)
    exact = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    assert (variance / exact[0] - 1).abs().max() < 1e-5
    assert (mean - exact[1]).abs().max() <= torch.finfo(torch.float32).eps * 4096


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, 1e25])
@pytest.mark.parametrize("kind", ["running", "deviation"])
def test_exceptional_values(kind: str, value: float) -> None:
    """NaN and inf are where the formula by torch's operations has them."""
    launch._remembered.cache_clear()
    problem = draw(PROGRAMS[kind], shape(kind))
    x = problem.x.clone()
    x[:, 1].fill_(value)
    problem = replace(problem, x=x)
    mine = problem.run(by_kernels, torch.float32)
    for name, own in problem.run(by_reference, torch.float32).items():
        if name == "gradient of x" and value == 1e25:
            continue  # beside 1e25 what one rounding makes of a sum is as large as the sum
        assert (mine[name].isnan() == own.isnan()).all(), name
        assert (mine[name].isinf() == own.isinf()).all(), name


def test_infinite_means_stay_infinite(tiling: str) -> None:
    text = "x[n c h w] over n h w; centre = M; scale = 1; u0 = M"
    x = torch.randn(3, 4, 5, 7)
    x[1, 0, 2, 2], x[0, 1, 0, 0], x[2, 2, 0, 0] = torch.inf, -torch.inf, torch.nan
    y, mean = by_kernels(text, x)
    torch.testing.assert_close(mean, x.mean((0, 2, 3)), equal_nan=True)
    assert (y.isnan() == (x - x.mean((0, 2, 3), keepdim=True)).isnan()).all()


@pytest.mark.parametrize("kind", ["group", "running"])
def test_values_and_gradients_of_the_operator(kind: str) -> None:
    def by_operator(text: str, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        y, _, *updates = torch.ops.bnrewrite.norm_forward(text, x, list(tensors))
        return (y, *(update.detach() for update in updates))

    assert compare(draw(PROGRAMS[kind], shape(kind)), by_operator, torch.float32) == []


@pytest.mark.parametrize("kind", ["residual", "running"])
def test_operators(kind: str) -> None:
    """Schemas, autograd and fake tensors; tracing is in ``test_triton_builds.py``."""
    problem = draw(PROGRAMS[kind], shape(kind))
    fixed, program = parse(problem.text).fixed, parse(problem.text)
    x = problem.x.float().requires_grad_()
    tensors = [t.float().requires_grad_(i not in fixed) for i, t in enumerate(problem.tensors)]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    forward, backward = torch.ops.bnrewrite.norm_forward, torch.ops.bnrewrite.norm_backward
    torch.library.opcheck(forward.default, (problem.text, x, tensors), test_utils=checks)
    plain = [t.detach() for t in tensors]
    y, moments, *_ = forward(problem.text, x.detach(), plain)
    given = (
        problem.text, problem.cotangent.float(), x.detach(), y if program.residual else None,
        moments, plain[: len(program.tensors)],
    )  # fmt: skip
    torch.library.opcheck(backward.default, given, test_utils=checks)


@pytest.mark.parametrize("kind", ["layer", "residual"])
def test_derivatives_of_derivatives(kind: str) -> None:
    text = PROGRAMS[kind]
    problem = draw(text, (1, 2, 3) if kind == "layer" else (2, 2, 1, 2))
    noise = torch.randn(problem.x.shape, generator=torch.Generator().manual_seed(3)).double() / 64
    x = problem.x + noise  # nothing lies where relu bends
    given = [t.requires_grad_() for t in (x, *problem.tensors)]
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        check(lambda *values: by_kernels(text, *values)[0], given, fast_mode=True)


def test_a_buffer_that_changes_before_the_backward() -> None:
    problem = draw(PROGRAMS["running"], shape("running"))
    x, tensors = problem.x.float().requires_grad_(), [t.float() for t in problem.tensors]
    y, *updates = by_kernels(problem.text, x, *tensors)
    expected = torch.autograd.grad(y, x, problem.cotangent.float(), retain_graph=True)
    for buffer, new in zip(tensors[2:], updates, strict=True):
        assert not new.requires_grad
        buffer.copy_(new)
    torch.testing.assert_close(torch.autograd.grad(y, x, problem.cotangent.float()), expected)


def test_a_bias_may_change_before_the_backward() -> None:
    """The native operators allow it: no gradient depends on its value."""
    text = PROGRAMS["layer"]
    problem = draw(text, shape("layer"))
    x, weight, bias = (t.float().requires_grad_() for t in (problem.x, *problem.tensors))
    y = by_kernels(text, x, weight, bias)[0]
    expected = torch.autograd.grad(y, x, problem.cotangent.float(), retain_graph=True)
    with torch.no_grad():
        bias.add_(1.0)
    torch.testing.assert_close(torch.autograd.grad(y, x, problem.cotangent.float()), expected)


def test_what_has_no_kernel() -> None:
    text = PROGRAMS["layer"]
    one = torch.ones(37)
    x = torch.randn(3, 5, 37)
    assert run_on_gpu(text, x[:0], [one, one]) is None
    assert run_on_gpu(text, x, [one]) is None
    assert run_on_gpu(text, x, [one, torch.ones(3)]) is None
    assert run_on_gpu(text, x, [one, torch.ones(37, device="meta")]) is None
    assert run_on_gpu(text, x.int(), [one, one]) is None
    sevenths = text.replace("**(-1/2)", "**M")
    assert run_on_gpu(sevenths, x, [one, one]) is None
    silu = PROGRAMS["residual"].replace("relu", "silu")
    image, two = torch.randn(3, 8, 5, 7), torch.ones(8)
    assert run_on_gpu(silu, image, [two, two, image]) is None  # the sum is not kept
    both = text.replace("t0*(V", "1/(t0 + V)*(V")
    assert run_on_gpu(both, x, [one, one]) is None
    with pytest.raises(ValueError, match=r"no kernel of .* takes torch.float32 tensors"):
        torch.ops.bnrewrite.norm_forward(text, x, [one])
