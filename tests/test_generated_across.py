"""Kernels of norms whose groups need each other's statistics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from programs import ACROSS, LAYOUTS, by_reference, compare, draw, on_threads

from bnrewrite.kernels import check_program, norm
from bnrewrite.kernels.generated import call, norm_with_updates

pytestmark = pytest.mark.usefixtures("repeatable")
SHAPE = (3, 8, 5, 7)
INSIDE = "second axis inside"  # columns
KINDS = [("response", "contiguous"), ("response", INSIDE), ("mixture", INSIDE)]


@pytest.fixture(params=[1, 4])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Fewer than there are sets of groups that share means, and more."""
    yield from on_threads(request.param, monkeypatch)


@pytest.mark.parametrize(("kind", "layout"), KINDS)
def test_values_and_gradients(kind: str, layout: str, threads: int) -> None:
    problem = draw(ACROSS[kind], SHAPE, layout)
    single = [t.float() for t in problem.tensors]
    assert call.kernel_of(problem.text, problem.x.float(), single) is not None
    assert compare(problem, norm_with_updates, torch.float32) == []


@pytest.mark.parametrize(
    ("kind", "shape", "layout"),
    [
        ("response", (1, 1, 1, 1), "contiguous"),
        ("response", (70, 3, 2, 2), "expanded"),
        ("response", (2, 70, 30, 31), INSIDE),
        ("response", (2, 3, 30, 50), "with holes"),
        ("mixture", (2, 3, 40, 3), INSIDE),
    ],
)
def test_sizes(kind: str, shape: tuple[int, ...], layout: str, threads: int) -> None:
    assert compare(draw(ACROSS[kind], shape, layout), norm_with_updates, torch.float32) == []


def test_columns_of_several_groups(threads: int) -> None:
    """Rows too short to be read as such, with others outside: several columns make a group."""
    text = (
        "x[n c h w] over n w; t0[c]; m0[c] = Root(N*V); "
        "scale = t0*Root(N*V)/(m0 + 1.0e-6) + 1; relu"
    )
    assert compare(draw(text, (4, 3, 5, 7)), norm_with_updates, torch.float32) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    assert compare(draw(ACROSS["response"], SHAPE, INSIDE), norm_with_updates, dtype) == []


def test_derivatives() -> None:
    """First and second ones, of what the kernels make in float64."""
    problem = draw(ACROSS["response"], (2, 3, 2, 3), INSIDE)
    noise = torch.randn(problem.x.shape, generator=torch.Generator().manual_seed(3)).double() / 64
    given = [(problem.x + noise).requires_grad_(), *(t.requires_grad_() for t in problem.tensors)]
    torch.autograd.gradcheck(lambda *each: norm(problem.text, *each), given)
    torch.autograd.gradgradcheck(lambda *each: norm(problem.text, *each), given)


@pytest.mark.parametrize(("kind", "layout"), KINDS)
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["element", "group", "sample"])
def test_exceptional_values(kind: str, place: str, value: float, layout: str) -> None:
    """NaN and inf are where the formula by torch's operations has them, others are close."""
    problem = draw(ACROSS[kind], SHAPE)
    x = problem.x.clone()
    {"element": x[1, 1, 2, 2], "group": x[1, 1], "sample": x[1]}[place].fill_(value)
    problem = replace(problem, x=LAYOUTS[layout](x))
    mine = problem.run(norm_with_updates, torch.float32)
    for name, own in problem.run(by_reference, torch.float32).items():
        torch.testing.assert_close(mine[name], own, equal_nan=True, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layout", ["contiguous", INSIDE])
def test_no_gradient_flows_to_what_buffers_alone_take(layout: str) -> None:
    """A sample that is infinite makes no NaN of the gradients of others."""
    text = (
        "x[n c h w] over h w; m0[c] = M; m1[c] = V + (M - m0)**2; centre = M; "
        "scale = (V + 1.0e-5)**(-1/2); u0 = m0; u1 = m1"
    )
    problem = draw(text, SHAPE)
    x = problem.x.clone()
    x[1, 1] = float("inf")
    gradient = replace(problem, x=LAYOUTS[layout](x)).run(norm_with_updates, torch.float32)
    assert gradient["gradient of x"][[0, 2]].isfinite().all()
    assert gradient["u0"][:, 1].isinf().all()


def test_a_tensor_inside_a_group_has_no_kernel() -> None:
    text = "x[n c h w] over h w; t0[w]; m0[n] = V; centre = M; scale = t0/m0"
    assert check_program(text) == "a mean over groups, and a tensor inside a group"
