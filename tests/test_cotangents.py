"""A kernel writes the gradient of x where its cotangent lies, if nobody else has that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from programs import ACROSS, PROGRAMS, draw
from torch import Tensor

from bnrewrite.kernels.generated import norm, norm_with_updates, runtime
from bnrewrite.kernels.generated.program import parse

BATCH = PROGRAMS["batch relu"]
SOME = ("batch relu", "layer", "layer of channels", "group silu", "residual", "response")
KINDS = {name: text for name, text in (PROGRAMS | ACROSS).items() if name in SOME}


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """The runtime, without which memory is not written again."""
    runtime.build()


@pytest.mark.parametrize(
    ("layout", "channels"),
    [("contiguous", 8), ("second axis inside", 8), ("second axis inside", 40)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradients_are_those_of_a_cotangent_that_is_kept(
    kind: str, layout: str, channels: int
) -> None:
    """40 columns are two vectors and one that reaches back into what was written."""
    text = KINDS[kind]
    shape = (3, 5, channels - 3) if len(parse(text).dims) == 3 else (3, channels, 5, 13)
    problem = draw(text, shape, layout)
    x = problem.x.float().requires_grad_()
    fixed = parse(text).fixed
    tensors = [t.float().requires_grad_(i not in fixed) for i, t in enumerate(problem.tensors)]
    wanted = [x, *(t for t in tensors if t.requires_grad)]
    cotangent = problem.cotangent.float()
    norm(text, x, *tensors)  # a kernel is there from the second call on
    y = norm_with_updates(text, x, *tensors)[0]
    kept = torch.autograd.grad(y, wanted, cotangent, retain_graph=True)
    free = torch.autograd.grad((y * cotangent).sum(), wanted)
    for mine, expected in zip(free, kept, strict=True):
        assert torch.equal(mine, expected)


def tensors() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(3)
    x, cotangent = (torch.randn(4, 8, 5, 5, generator=source) for _ in range(2))
    weight = torch.rand(8, generator=source) + 0.5
    return x.requires_grad_(), weight.requires_grad_(), torch.zeros(8), cotangent


def allocated(keep: Callable[[Tensor], object] | None) -> int:
    """How many tensors as large as x a backward allocates."""
    x, weight, bias, cotangent = tensors()
    norm(BATCH, x, weight, bias)
    y = norm(BATCH, x * 1, weight, bias)
    if keep is not None:
        y.register_hook(keep)  # type: ignore[no-untyped-call]
    loss = (y * cotangent).sum()
    with torch.profiler.profile(profile_memory=True) as profile:
        torch.autograd.grad(loss, x)
    results: Any = profile.profiler
    events = results.kineto_results.events()
    return sum(event.name() == "[memory]" and event.nbytes() == x.nbytes for event in events)


def test_memory_is_written_again() -> None:
    kept: list[Tensor] = []
    assert allocated(None) == allocated(kept.append) - 1


def by_hook(y: Tensor, kept: list[Tensor]) -> Tensor:
    y.register_hook(kept.append)  # type: ignore[no-untyped-call]
    return y


def by_retained_gradient(y: Tensor, kept: list[Tensor]) -> Tensor:
    y.retain_grad()
    kept.append(y)  # its gradient is read at the end
    return y


def by_a_view(y: Tensor, kept: list[Tensor]) -> Tensor:
    y.register_hook(lambda dy: kept.append(dy[:1]))  # type: ignore[no-untyped-call]
    return y


def by_memory_of_numpy(y: Tensor, kept: list[Tensor]) -> Tensor:
    class FromNumpy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            return y.clone()

        @staticmethod
        def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
            array = cotangents[0].numpy().copy()
            kept.append(torch.from_numpy(array))
            return torch.from_numpy(array)

    result: Tensor = FromNumpy.apply(y)  # type: ignore[no-untyped-call]
    return result


@pytest.mark.parametrize("keep", [by_hook, by_retained_gradient, by_a_view, by_memory_of_numpy])
def test_what_someone_keeps_stays(keep: Callable[[Tensor, list[Tensor]], Tensor]) -> None:
    x, weight, bias, cotangent = tensors()
    norm(BATCH, x, weight, bias)
    kept: list[Tensor] = []
    y = norm(BATCH, x * 1, weight, bias)
    (keep(y, kept) * cotangent).sum().backward()  # type: ignore[no-untyped-call]
    (found,) = kept
    if found is y:
        assert y.grad is not None
        found = y.grad
    assert torch.equal(found, cotangent[: len(found)])


@pytest.mark.parametrize("shape", [(4, 8, 5, 5), (-1,)], ids=["itself", "views of it"])
def test_a_cotangent_that_goes_two_ways(shape: tuple[int, ...]) -> None:
    x, weight, bias, cotangent = tensors()
    other = torch.zeros_like(x).requires_grad_()
    norm(BATCH, x, weight, bias)
    total = norm(BATCH, x * 1, weight, bias).view(shape) + other.view(shape)
    (total * cotangent.view(shape)).sum().backward()  # type: ignore[no-untyped-call]
    assert other.grad is not None
    assert torch.equal(other.grad, cotangent)


def test_the_cotangent_itself_is_asked_for() -> None:
    x, weight, bias, cotangent = tensors()
    norm(BATCH, x, weight, bias)
    y = norm(BATCH, x * 1, weight, bias)
    dy, dx = torch.autograd.grad((y * cotangent).sum(), [y, x])
    assert torch.equal(dy, cotangent)
    assert not torch.equal(dx, cotangent)
