"""Kernels printed from formulas: every kind, layout and dtype against the formula in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from emulated import emulate, missing
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import ACROSS, AFFINE, LAYOUTS, PROGRAMS, by_reference, compare, draw, on_threads
from torch import Tensor
from torch._dynamo import compiled_autograd

from bnrewrite.kernels.generated import build, call, kernel, norm, norm_with_updates, runtime
from bnrewrite.kernels.generated.layout import arrange
from bnrewrite.kernels.generated.program import parse

SHAPES = {3: (3, 5, 37), 4: (3, 8, 5, 7)}
DTYPES = (torch.float64, torch.bfloat16, torch.float16)
SOME = ("batch relu", "group", "layer", "layer of channels", "running")


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """So many, however small a tensor is."""
    yield from on_threads(request.param, monkeypatch)


def rank(kind: str) -> int:
    return len(parse(PROGRAMS[kind]).dims)


def has_kernel(text: str, x: Tensor, *tensors: Tensor) -> bool:
    return call.kernel_of(text, x, tensors) is not None


@pytest.mark.parametrize("kind", PROGRAMS)
def test_values_and_gradients(kind: str, threads: int) -> None:
    problem = draw(PROGRAMS[kind], SHAPES[rank(kind)])
    assert has_kernel(problem.text, problem.x.float(), *[t.float() for t in problem.tensors])
    assert compare(problem, norm_with_updates, torch.float32) == []


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "contiguous"])
@pytest.mark.parametrize("kind", ["batch relu", "group", "layer", "layer of two axes", "residual"])
def test_layouts(kind: str, layout: str, threads: int) -> None:
    problem = draw(PROGRAMS[kind], SHAPES[rank(kind)], layout)
    assert compare(problem, norm_with_updates, torch.float32) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", SOME)
def test_dtypes(kind: str, dtype: torch.dtype) -> None:
    for layout in ("contiguous", "second axis inside")[: 1 + (kind == "group")]:
        problem = draw(PROGRAMS[kind], SHAPES[rank(kind)], layout)
        assert compare(problem, norm_with_updates, dtype) == []


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("layer", (2, 1, 5000)),  # rows longer than a block
        ("layer", (1, 1, 1)),
        ("layer", (4, 3, 1)),
        ("layer", (700, 2, 17)),  # more groups than are added up in single precision
        ("batch", (300, 3, 1, 1)),  # columns
        ("batch", (2, 1, 60, 50)),
        ("instance", (1, 1, 1, 1)),
        ("group", (2, 8, 1, 1)),
        ("layer of channels", (2, 300, 1, 5)),
    ],
)
def test_sizes(kind: str, shape: tuple[int, ...], threads: int) -> None:
    assert compare(draw(PROGRAMS[kind], shape), norm_with_updates, torch.float32) == []


@pytest.mark.parametrize("kind", ["batch relu", "corrected", "residual", "running"])
def test_many_short_rows_are_columns(kind: str, threads: int) -> None:
    """And few are rows, as in most of these tests: a column has moments to merge."""
    for samples, columns in ((7, 0), (8, 2)):
        problem = draw(PROGRAMS[kind], (samples, 5, 3, 7))
        found = arrange(parse(problem.text), problem.x.shape, problem.x.stride())
        assert found is not None
        assert found[0].columns == columns
        assert compare(problem, norm_with_updates, torch.float32) == []


@pytest.mark.parametrize(
    ("kind", "channels", "dtype"),
    [
        *((kind, 40, torch.float32) for kind in ("group", "kept apart", "residual", "response")),
        ("batch relu", 20, torch.float32),
        *(("batch relu", 40, dtype) for dtype in (torch.float32, *DTYPES)),
    ],
)
def test_columns_that_do_not_fill_vectors(kind: str, channels: int, dtype: torch.dtype) -> None:
    """The vector that reaches back adds to no sum what another has added."""
    problem = draw((PROGRAMS | ACROSS)[kind], (2, channels, 3, 11), "second axis inside")
    assert compare(problem, norm_with_updates, dtype) == []


@pytest.mark.parametrize("layout", ["contiguous", "second axis inside"])
@pytest.mark.parametrize("kind", ["residual", "group", "response"])
@pytest.mark.parametrize("threads", [2], indirect=True)
def test_results_that_are_written_past_the_caches(
    kind: str, layout: str, threads: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As those above 8 MiB are, here at any size."""
    limit = "constexpr int64_t PAST = int64_t(8) << 20;"
    assert build.PRELUDE.count(limit) == 1
    monkeypatch.setattr(
        build, "PRELUDE", build.PRELUDE.replace(limit, "constexpr int64_t PAST = 0;")
    )
    monkeypatch.setattr(kernel, "compiled_functions", kernel.compiled_functions.__wrapped__)
    monkeypatch.setenv("BNREWRITE_CACHE", str(tmp_path))
    for shape in ((2, 32, 3, 16), (2, 8, 5, 7), (2, 80, 15, 20)):  # at last unaligned groups
        problem = draw((PROGRAMS | ACROSS)[kind], shape, layout)
        assert compare(problem, norm_with_updates, torch.float32) == []


on_processors = pytest.mark.parametrize(
    ("kind", "layout", "dtype"),
    [
        ("batch relu", "contiguous", torch.float32),
        ("group silu", "second axis inside", torch.float32),
        ("residual", "second axis inside", torch.float64),
        ("layer", "contiguous", torch.bfloat16),
        ("batch relu", "second axis inside", torch.float16),
    ],
)


@pytest.mark.parametrize("processor", ["x86-64-v2", "x86-64-v3"])  # vectors of 16 and 32 bytes
@on_processors
def test_processors_with_shorter_vectors(
    processor: str,
    kind: str,
    layout: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Than the one that the tests run on may have."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("x86-64-v3 needs a processor with AVX2")
    flags = [f"-march={processor}" if flag == build.NATIVE else flag for flag in build.FLAGS]
    monkeypatch.setattr(build, "FLAGS", flags)
    monkeypatch.setattr(kernel, "compiled_functions", kernel.compiled_functions.__wrapped__)
    monkeypatch.setattr(call, "_kernels", {})
    monkeypatch.setattr(runtime, "_programs", {})
    monkeypatch.setenv("BNREWRITE_CACHE", str(tmp_path))
    for sizes in (SHAPES[rank(kind)], (2, 40, 3, 11)[: rank(kind)]):
        problem = draw(PROGRAMS[kind], sizes, layout)
        assert compare(problem, norm_with_updates, dtype) == []


@on_processors
def test_arm_processors(
    kind: str, layout: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reason = missing()
    if reason:
        pytest.skip(reason)
    emulate(monkeypatch, tmp_path)
    problem = draw(PROGRAMS[kind], (2, 40, 3, 11)[: rank(kind)], layout)
    assert compare(problem, norm_with_updates, dtype) == []


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(2, 70), min_size=3, max_size=3),
    inside=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    kind=st.sampled_from(["layer", "batch relu"]),
)
def test_drawn_sizes(sizes: list[int], inside: bool, dtype: torch.dtype, kind: str) -> None:
    shape = [*sizes, 3][: rank(kind)]
    layout = "second axis inside" if inside and kind == "batch relu" else "contiguous"
    assert compare(draw(PROGRAMS[kind], shape, layout), norm_with_updates, dtype) == []


@pytest.mark.parametrize(
    ("program", "shape"),
    [
        ("x[n c h w] over c; t0[c]; t1[c]", (1, 2, 256, 256)),  # columns, by row
        ("x[n c d] over c d; t0[c]; t1[c]", (1, 2, 300000)),  # rows, by row
        ("x[a b d] over b d; t0[d]; t1[d]", (2, 20000, 2)),  # rows, by element
    ],
)
def test_long_sums_inside_a_group(program: str, shape: tuple[int, ...]) -> None:
    """What a tensor inside a group takes of very many elements keeps its digits."""
    problem = draw(f"{program}; centre = M; {AFFINE}", shape)
    source = torch.Generator().manual_seed(5)
    x, cotangent = (torch.randn(shape, generator=source).double() for _ in range(2))
    problem = replace(problem, x=x, cotangent=cotangent)
    assert compare(problem, norm_with_updates, torch.float32) == []


@pytest.mark.parametrize("kind", SOME)
def test_derivatives(kind: str) -> None:
    """First and second ones, of what the kernels make in float64."""
    text = PROGRAMS[kind]
    problem = draw(text, (2, 3, 5) if rank(kind) == 3 else (2, 8, 2, 2))
    noise = torch.randn(problem.x.shape, generator=torch.Generator().manual_seed(3)).double() / 64
    x = (problem.x + noise).requires_grad_()  # nothing lies where relu bends
    free = [t.requires_grad_(i not in parse(text).fixed) for i, t in enumerate(problem.tensors)]
    torch.autograd.gradcheck(lambda *given: norm(text, *given), (x, *free))
    torch.autograd.gradgradcheck(lambda *given: norm(text, *given), (x, *free))


@pytest.mark.parametrize("kind", ["layer", "residual", "running"])
def test_gradients_by_compiled_autograd(kind: str) -> None:
    """It gives a node back what it saved, where it can trace that."""
    runtime.build()
    problem = draw(PROGRAMS[kind], SHAPES[rank(kind)])
    problem.run(norm_with_updates, torch.float32)
    expected = problem.run(norm_with_updates, torch.float32)  # by what the first call added
    torch.compiler.reset()
    with compiled_autograd._enable(torch.compile(backend="eager")):
        found = problem.run(norm_with_updates, torch.float32)
    torch.testing.assert_close(found, expected)


def test_a_step_with_and_without_a_graph_is_the_same() -> None:
    problem = draw(PROGRAMS["batch relu"], (3, 8, 5, 7))
    x = problem.x.float().requires_grad_()
    y = norm(problem.text, x, *[t.float() for t in problem.tensors])
    found = [
        torch.autograd.grad(y, x, problem.cotangent.float(), retain_graph=True, create_graph=c)[0]
        for c in (False, True)
    ]
    assert [each.requires_grad for each in found] == [False, True]
    torch.testing.assert_close(found[0], found[1].detach())


@pytest.mark.parametrize("layout", ["contiguous", "second axis inside"])
def test_the_variance_of_numbers_far_from_zero(layout: str) -> None:
    text = f"{PROGRAMS['batch']}; u0 = M; u1 = V"
    x = LAYOUTS[layout](torch.randn(8, 8, 30, 30) + 4096)
    one = torch.ones(8)
    _, mean, variance = norm_with_updates(text, x, one, one)
    exact = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    assert (variance / exact[0] - 1).abs().max() < 1e-5
    assert (mean - exact[1]).abs().max() <= torch.finfo(torch.float32).eps * 4096


STRANGE = {
    "nan": float("nan"),
    "inf": float("inf"),
    "-inf": -float("inf"),
    "zero": 0.0,
    "huge": 1e25,
    "tiny": 1e-25,
}


def test_short_rows_whose_squares_all_round_alike() -> None:
    """Float32's numbers in float64: what each addition loses is alike, and 280 of them add up."""
    program = (
        "x[a b c d] over b c d; t0[b] fixed; centre = M; scale = (V + 1e-5)**(-1/2)*t0; u0 = V"
    )
    errors = []
    for seed in range(20):
        drawn = torch.randn(2, 8, 5, 7, generator=torch.Generator().manual_seed(seed)) + 5
        x = drawn.double().contiguous(memory_format=torch.channels_last)
        _, variances = norm_with_updates(program, x, torch.ones(8, dtype=torch.float64))
        for sample, variance in zip(x, variances.flatten().tolist(), strict=True):
            numbers = [Fraction(number) for number in sample.flatten().tolist()]
            mean = sum(numbers) / len(numbers)
            exact = sum((number - mean) ** 2 for number in numbers) / len(numbers)
            errors.append(abs(float(Fraction(variance) / exact - 1)))
    assert max(errors) < 3e-15  # torch.var: 1.1e-15


@pytest.mark.parametrize("place", ["group", "element"])
@pytest.mark.parametrize("value", STRANGE)
@pytest.mark.parametrize("kind", ["layer", "mean square", "running", "length", "deviation"])
def test_exceptional_values(kind: str, value: str, place: str) -> None:
    """NaN and inf are where the formula by torch's operations has them."""
    problem = draw(PROGRAMS[kind], SHAPES[rank(kind)])
    x = problem.x.clone()
    (x[:, 1] if place == "group" else x[1, 1].view(-1)[2:3]).fill_(STRANGE[value])
    problem = replace(problem, x=x)
    mine = problem.run(norm_with_updates, torch.float32)
    for name, own in problem.run(by_reference, torch.float32).items():
        if name == "gradient of x" and value in ("huge", "tiny"):
            continue  # beside 1e25 what one rounding makes of a sum is as large as the sum
        assert (mine[name].isnan() == own.isnan()).all(), name
        assert (mine[name].isinf() == own.isinf()).all(), name


@pytest.mark.parametrize("layout", ["contiguous", "second axis inside"])
def test_a_stopped_statistic_gives_an_infinite_number_no_gradient(layout: str) -> None:
    problem = draw("x[n c h w] over h w about zero; scale = (Vs + 1.0e-5)**(-1/2)", (2, 3, 5, 7))
    x = LAYOUTS[layout](problem.x.index_fill(3, torch.tensor(2), torch.inf))
    problem = replace(problem, x=x)
    own, mine = (problem.run(f, torch.float32) for f in (by_reference, norm_with_updates))
    torch.testing.assert_close(mine["gradient of x"], own["gradient of x"])


def test_infinite_means_stay_infinite() -> None:
    """As ``mean`` has them: buffers take them."""
    text = "x[n c h w] over n h w; centre = M; scale = 1; u0 = M"
    for layout in ("contiguous", "second axis inside"):
        x = torch.randn(4, 6, 11, 30)
        x[1, 0, 2, 2] = x[3, 1, 10, 10] = torch.inf
        x[0, 2, 0, 0] = -torch.inf
        x[0, 3, 0, 0], x[1, 3, 0, 0] = torch.inf, -torch.inf
        x[2, 4, 0, 0] = torch.nan
        x = LAYOUTS[layout](x)
        y, mean = norm_with_updates(text, x)
        torch.testing.assert_close(mean, x.mean((0, 2, 3)), equal_nan=True)
        torch.testing.assert_close(y, x - x.mean((0, 2, 3), keepdim=True), equal_nan=True)


def test_two_forwards_before_a_backward_and_buffers_that_change_between() -> None:
    problem = draw(PROGRAMS["running"], (3, 8, 5, 7))
    results = []
    for function in (norm_with_updates, by_reference):
        x = problem.x.float().requires_grad_()
        tensors = [t.float() for t in problem.tensors]
        outputs = []
        for _ in range(2):
            y, *updates = function(problem.text, x, *tensors)
            outputs.append(y)
            tensors[2:] = (
                [t.clone() for t in tensors[2:]] if function is by_reference else tensors[2:]
            )
            for buffer, new in zip(tensors[2:], updates, strict=True):
                assert not new.requires_grad
                buffer.copy_(new)
        results.append(torch.autograd.grad(outputs[0] * outputs[1], x, problem.cotangent.float()))
    torch.testing.assert_close(results[0], results[1])


def test_without_a_kernel_a_buffer_may_change_before_the_backward() -> None:
    text = "x[n c h w] over n c; t0[c h] fixed; centre = M; scale = t0*(V + 1.0e-5)**(-1/2)"
    problem = draw(text, (3, 8, 5, 7))
    x, scale = problem.x.float().requires_grad_(), problem.tensors[0].float()
    assert not has_kernel(text, x, scale)  # it varies along the rows and along the columns
    assert compare(problem, norm_with_updates, torch.float32) == []
    expected = torch.autograd.grad(norm(text, x, scale), x, problem.cotangent.float())
    y = norm(text, x, scale)
    scale.zero_()
    torch.testing.assert_close(torch.autograd.grad(y, x, problem.cotangent.float()), expected)


def test_updates_have_the_kept_axes_and_their_own_memory() -> None:
    text = f"{PROGRAMS['instance']}; u0 = M; u1 = V"
    problem = draw(text, (3, 8, 5, 7), "second axis inside")
    x, *tensors = (t.float() for t in (problem.x, *problem.tensors))
    _, mean, variance = norm_with_updates(text, x, *tensors)
    torch.testing.assert_close(mean, x.mean((2, 3)))
    before = variance.clone()
    mean.zero_()
    assert torch.equal(variance, before)


def test_what_has_no_kernel_runs_by_operations() -> None:
    text, x = PROGRAMS["layer"], torch.randn(3, 5, 37)
    one = torch.ones(37)
    expected = norm(text, x, one, one)
    assert norm(text, x.to("meta"), one.to("meta"), one.to("meta")).is_meta
    negative = torch.ops.aten._neg_view.default  # what ``z.conj().imag`` is made of
    torch.testing.assert_close(norm(text, negative(-x), one, one), expected)
    torch.testing.assert_close(norm(text, x, negative(-one), one), expected)
    assert norm(text, x[:0], one, one).shape == (0, 5, 37)
    with pytest.raises(RuntimeError, match="invalid for input of size 3"):
        norm(text, x, torch.ones(3), one)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_residual_of_another_dtype_is_added_by_operations(dtype: torch.dtype) -> None:
    """A kernel reads it as it reads x: other memory, and beyond its end."""
    problem = draw(PROGRAMS["residual"], SHAPES[4])
    x, *tensors = (t.float() for t in (problem.x, *problem.tensors))
    expected = norm(problem.text, x, *tensors)
    for _ in range(2):
        y = norm(problem.text, x, *tensors[:-1], tensors[-1].to(dtype))
        torch.testing.assert_close(y, expected)


def test_the_mean_of_what_is_taken_about_zero_is_zero_in_gradients_too() -> None:
    text = "x[n c] over c about zero; scale = (V + 1.0e-5)**(-1/2); shift = 1 - M*0.5"
    assert compare(draw(text, (5, 33)), norm_with_updates, torch.float32) == []


def test_what_varies_along_rows_and_along_columns_is_not_compiled(
    caplog: pytest.LogCaptureFixture,
) -> None:
    text = "x[n c w] over n w; t0[n]; t1[w]; centre = M; scale = t0*t1*(V + 1.0e-5)**(-1/2)"
    problem = draw(text, (4, 3, 5))
    assert not has_kernel(text, problem.x, *problem.tensors)
    assert caplog.text == ""
    assert compare(problem, norm_with_updates, torch.float32) == []


def test_a_default_device_is_not_where_moments_are_written() -> None:
    text, x, one = PROGRAMS["layer"], torch.randn(3, 5, 37), torch.ones(37)
    expected = norm(text, x, one, one)
    with torch.device("meta"):
        assert torch.equal(norm(text, x, one, one), expected)


def test_cotangents_in_another_layout() -> None:
    text, x = PROGRAMS["layer"], torch.randn(3, 5, 37, requires_grad=True)
    weight, bias = torch.ones(37), torch.zeros(37)
    y = norm(text, x, weight, bias)
    cotangent = torch.randn(37, 5, 3).permute(2, 1, 0)
    (mine,) = torch.autograd.grad(y, x, cotangent, retain_graph=True)
    torch.testing.assert_close(mine, torch.autograd.grad(y, x, cotangent.contiguous())[0])
    y = norm(text, x, weight, bias)
    (mine,) = torch.autograd.grad(y.sum(), x)
    assert mine.abs().max() < 1e-5  # a norm's outputs add up to a constant
