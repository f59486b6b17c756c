"""Kernels and autograd: what is kept for a backward, and the call of the eager stage."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..generated.printing import Unprintable
from ..generated.saving import differentiate, save
from .launch import Launch, launch_of, run_backward, run_forward


def found(text: str, x: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, Launch | None]:
    """A tensor without holes or repeats in memory, and how a program runs on it, if it does."""
    try:
        launch = launch_of(text, x, tensors)
        if launch is None and x.numel():
            x = x.clone(memory_format=torch.preserve_format)
            launch = launch_of(text, x, tensors)
    except Unprintable:
        return x, None
    return x, launch


def device_of(x: Tensor) -> AbstractContextManager[None]:
    """Kernels are launched on the current device; those of fake tensors are not."""
    if isinstance(x, FakeTensor):
        return nullcontext()
    place: Any = torch.cuda.device_of
    current: AbstractContextManager[None] = place(x)
    return current


def call(launch: Launch, text: str, x: Tensor, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """``y`` and the updates of a program, recorded where a gradient is wanted.

    Args:
        launch: made for these.
        text: the program.
        x: dense in memory.
        given: the tensors of the program, then the residual, where it has one.
    """
    if torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in given)):
        x, *given = (t.clone() if t.is_inference() else t for t in (x, *given))  # to be saved
        made: tuple[Tensor, ...] = Recorded.apply(launch, text, x, *given)  # type: ignore[no-untyped-call]
        return made
    with device_of(x):
        y, _, updates = run_forward(launch, x, given)
    return (y, *updates)


class Recorded(torch.autograd.Function):
    """Kernels that autograd records, without an operator around them."""

    @staticmethod
    def forward(
        ctx: Any, launch: Launch, text: str, x: Tensor, *given: Tensor
    ) -> tuple[Tensor, ...]:
        """``y`` and the updates."""
        with device_of(x):
            y, moments, updates = run_forward(launch, x, given)
        save(ctx, text, x, given, y, moments)
        ctx.launch = launch
        ctx.mark_non_differentiable(*updates)
        return (y, *updates)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x, of the tensors, and of the residual."""

        def kernels(text: str, dy: Tensor, x: Tensor, *kept: Any) -> list[Tensor]:
            with device_of(x):
                return gradients(ctx.launch, dy, x, *kept)

        return None, None, *differentiate(ctx, ctx.needs_input_grad[2:], cotangents[0], kernels)


def gradients(
    launch: Launch, dy: Tensor, x: Tensor, y: Tensor | None, moments: Tensor, given: list[Tensor]
) -> list[Tensor]:
    """The gradients of x, of the free tensors, and of the residual."""
    dx, dresidual, made = run_backward(launch, dy, x, y, moments, given)
    return [dx, *(made[i] for i in launch.tiled.free), *([] if dresidual is None else [dresidual])]
