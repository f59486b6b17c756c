"""The operators of kernels on a CPU, which compilers place: what they make, in every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from programs import ACROSS, AFFINE, LAYOUTS, PROGRAMS, compare, draw
from torch import Tensor

from bnrewrite.kernels.generated import call, operators, runtime
from bnrewrite.kernels.generated.kernel import Kernel
from bnrewrite.kernels.generated.program import parse

EVERY = PROGRAMS | ACROSS
SHAPES = {3: (3, 5, 37), 4: (3, 8, 5, 7)}
KINDS = ("batch relu", "group", "layer of two axes", "kept apart", "residual", "running", "mixture")
LAID_OUT = ("contiguous", "second axis inside", "with holes")


@pytest.fixture(params=["compiled runtime", "Python", "contiguous"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What runs one: C++; Python until that is built; kernels of contiguous tensors alone."""
    if request.param == "compiled runtime":
        runtime.build()
    else:
        monkeypatch.setattr(runtime, "forward", lambda *given: None)
        monkeypatch.setattr(runtime, "backward", lambda *given: None)
    if request.param == "contiguous":
        monkeypatch.setattr(operators, "kernel_of", _of_contiguous)
    return str(request.param)


def _of_contiguous(text: str, x: Tensor, tensors: list[Tensor]) -> Kernel | None:
    return call.kernel_of(text, x, tensors) if x.is_contiguous() else None


def by_operator(text: str, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    y, _, *updates = torch.ops.bnrewrite.norm_forward_cpu(text, x, list(tensors))
    return (y, *(update.detach() for update in updates))


@pytest.mark.parametrize("layout", LAID_OUT)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind: str, layout: str, way: str) -> None:
    text = EVERY[kind]
    problem = draw(text, SHAPES[len(parse(text).dims)], layout)
    by_operator(problem.text, problem.x.float(), *(t.float() for t in problem.tensors))
    assert compare(problem, by_operator, torch.float32) == []  # by what the first call looked for


@pytest.mark.parametrize("kind", KINDS)
def test_x_may_be_moved_before_the_backward(kind: str, way: str) -> None:
    """A compiler saves x in a layout of its own; moments lie in the order of the program's axes."""
    text = EVERY[kind]
    problem = draw(text, SHAPES[len(parse(text).dims)])
    forward = torch.ops.bnrewrite.norm_forward_cpu
    program, x, dy = parse(text), problem.x.float(), problem.cotangent.float()
    tensors = [t.float() for t in problem.tensors]
    own = tensors[: len(program.tensors)]
    y, moments, *_ = forward(text, x, tensors)
    wanted = _gradients(text, dy, x, y, moments, own)
    moved = LAYOUTS["second axis inside"](x)
    torch.testing.assert_close(forward(text, moved, tensors)[1], moments)
    for other in (LAYOUTS["last axis outside"](x), moved):
        found = _gradients(text, dy, other, y, LAYOUTS["with holes"](moments), own)
        torch.testing.assert_close(found, wanted)
        assert found[0].stride() == torch.empty_like(other).stride()


def _gradients(text: str, dy: Tensor, x: Tensor, y: Tensor, *given: Any) -> list[Tensor]:
    result: list[Tensor] = torch.ops.bnrewrite.norm_backward_cpu(
        text, dy, x, y if parse(text).residual else None, *given
    )
    return result


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("batch relu", "with holes"),
        ("layer of two axes", "second axis inside"),
        ("residual", "contiguous"),
        ("running", "second axis inside"),
        ("mixture", "with holes"),
    ],
)
def test_schemas_autograd_and_fake_tensors(kind: str, layout: str, way: str) -> None:
    text = EVERY[kind]
    problem, program = draw(text, SHAPES[len(parse(text).dims)], layout), parse(text)
    x = LAYOUTS[layout](problem.x.float()).requires_grad_()
    tensors = [t.float() for t in problem.tensors]
    inputs = [t.requires_grad_(i not in program.fixed) for i, t in enumerate(tensors)]
    forward = torch.ops.bnrewrite.norm_forward_cpu.default
    torch.library.opcheck(forward, (text, x, inputs))
    plain = [t.detach() for t in tensors]
    y, moments, *_ = forward(text, x.detach(), plain)
    kept = y if program.residual else None
    given = (
        text, problem.cotangent.float(), x.detach(), kept, moments, plain[: len(program.tensors)],
    )  # fmt: skip
    torch.library.opcheck(torch.ops.bnrewrite.norm_backward_cpu.default, given)


def test_tensors_that_no_kernel_takes() -> None:
    """They are named, with the remedy."""
    text = "x[a b] over b; t0[b]; centre = M; scale = t0"
    given = (text, torch.randn(3, 4), [torch.randn(5)])
    with pytest.raises(ValueError, match=r"no kernel of .* \[\(3, 4\), \(5,\)\]: call bnrewrite"):
        torch.ops.bnrewrite.norm_forward_cpu(*given)


def test_second_derivatives() -> None:
    """By the formula, as without the operator."""
    text = PROGRAMS["layer"]
    problem = draw(text, (1, 2, 3))
    noise = torch.randn(problem.x.shape, generator=torch.Generator().manual_seed(3)).double() / 64
    given = [t.requires_grad_() for t in (problem.x + noise, *problem.tensors)]
    check = torch.autograd.gradgradcheck
    assert check(lambda *values: by_operator(text, *values)[0], given, fast_mode=True)


@pytest.mark.parametrize("follows", ["", "; relu; residual"])
@pytest.mark.parametrize("fixed", ["", " fixed"])
def test_a_bias_may_change_before_the_backward(fixed: str, follows: str) -> None:
    """No gradient depends on its value: a compiler saves nothing of it that may not change."""
    text = f"x[a b] over b; t0[b]; t1[b]{fixed}; centre = M; {AFFINE}{follows}"
    weight, bias = (torch.randn(5, requires_grad=takes) for takes in (True, not fixed))
    x, residual, dy = (torch.randn(4, 5, requires_grad=takes) for takes in (True, False, False))
    given = [weight, bias, *([residual] if follows else [])]
    compiled = torch.compile(by_operator, backend="aot_eager")
    expected, y = (run(text, x, *given)[0] for run in (by_operator, compiled))
    wanted = torch.autograd.grad(expected, [x, weight], dy)
    with torch.no_grad():
        bias.add_(1)
    torch.testing.assert_close(torch.autograd.grad(y, [x, weight], dy), wanted)
