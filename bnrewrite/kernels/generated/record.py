"""Kernels and autograd, in Python: what runs until the compiled runtime is there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd import forward_ad

from .arranged import back, dense, like
from .kernel import Kernel
from .program import before_residual, parse
from .reference import reference

PLAIN = (torch.Tensor, torch.nn.Parameter)


def forward(
    kernel: Kernel, x: Tensor, given: Sequence[Tensor]
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """``y``, the moments, and the updates.

    Args:
        kernel: made for these tensors.
        x: dense.
        given: the tensors of the program, then the residual, where it has one.
    """
    count = len(kernel.orders)
    residual = like(given[count], x) if kernel.residual else None
    y = torch.empty_like(x, dtype=kernel.result)
    moments = x.new_empty((kernel.saved, kernel.groups), dtype=kernel.single)
    new = [moments.new_empty(kernel.groups) for _ in range(kernel.updates)]
    ordered = [dense(t, order) for t, order in zip(given[:count], kernel.orders, strict=True)]
    kernel.run(kernel.forward, [x, residual, y, moments, *new, *ordered])
    sizes, places = kernel.kept
    return y, moments, tuple(update.view(sizes).permute(places) for update in new)


def backward(
    kernel: Kernel,
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    moments: Tensor,
    given: Sequence[Any],
    *,
    wanted: bool = True,
) -> tuple[Tensor | None, list[Tensor], Tensor | None]:
    """The gradients of x, of the free tensors, and of the residual.

    Args:
        kernel: made for these tensors.
        dy: the cotangent of y.
        x: dense.
        y: what the forward made, where a residual was added.
        moments: what the forward made.
        given: the tensors of the program; those that no backward reads may be None.
        wanted: whether the gradient of x is.
    """
    dx = torch.empty_like(x) if wanted else None
    dresidual = torch.empty_like(x) if kernel.residual else None
    ordered: list[Any] = [
        None if t is None else dense(t, order)
        for t, order in zip(given, kernel.orders, strict=True)
    ]
    made = [torch.empty_like(ordered[i]) for i in kernel.free]
    pointers = [like(dy, x), x, y, moments, dx, dresidual, *ordered, *made]
    kernel.run(kernel.backward, pointers)
    placed = [
        back(gradient, given[i], kernel.orders[i])
        for i, gradient in zip(kernel.free, made, strict=True)
    ]
    return dx, placed, dresidual


class Recorded(torch.autograd.Function):
    """A kernel that autograd records."""

    @staticmethod
    def forward(
        ctx: Any, kernel: Kernel, text: str, x: Tensor, *given: Tensor
    ) -> tuple[Tensor, ...]:
        """``y`` and the updates; x and the moments are saved."""
        y, moments, updates = forward(kernel, x, given)
        kept: list[Tensor | None] = [None] * len(kernel.orders)
        for i in kernel.used:  # a buffer may change before the backward; a copy does not
            if i in kernel.copied:
                kept[i] = copied(given[i])
            else:
                kept[i] = given[i] if i in kernel.firm else given[i].data  # whatever its value is
        ctx.save_for_backward(x, moments, *kept, *([y] if kernel.residual else []))
        ctx.kernel, ctx.text = kernel, text
        ctx.mark_non_differentiable(*updates)
        return (y, *updates)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x, of the tensors, and of the residual."""
        kernel, needed = ctx.kernel, ctx.needs_input_grad[2:]
        x, moments, *given = ctx.saved_tensors
        dy = cotangents[0]
        if torch.is_grad_enabled() or not are_plain(dy):
            return (None, None, *of_reference(ctx.text, [x, *given], needed, dy))
        tensors = given[: len(kernel.orders)]
        y = given[-1] if kernel.residual else None
        dx, made, dresidual = backward(kernel, dy, x, y, moments, tensors, wanted=needed[0])
        found: list[Tensor | None] = [dx, *[None] * len(tensors)]
        for i, gradient in zip(kernel.free, made, strict=True):
            found[1 + i] = gradient if needed[1 + i] else None
        return (None, None, *found, *([dresidual] if kernel.residual else []))


def copied(tensor: Tensor) -> Tensor:
    """A tensor's values as they are now, to be saved; derivatives of derivatives reach it.

    The slope of an activation depends on a bias.
    """
    with torch.enable_grad():
        return tensor.clone()


def are_plain(*given: Tensor, device: str = "cpu") -> bool:
    """Whether nothing must see the operations, and numbers are where their addresses say."""
    if (
        forward_ad._current_level >= 0
        or _functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    ):
        return False
    return all(
        type(tensor) in PLAIN
        and tensor.device.type == device
        and torch._C._has_storage(tensor)
        and not tensor.is_neg()
        for tensor in given
    )


def of_reference(
    text: str, given: Sequence[Tensor | None], needed: Sequence[bool], cotangent: Tensor
) -> list[Tensor | None]:
    """Gradients that can be differentiated any number of times.

    Args:
        text: the program.
        given: x, the tensors, and in the place of a residual, whose value nobody kept, y.
        needed: which of them take a gradient.
        cotangent: of y.
    """
    again = torch.is_grad_enabled()
    program = parse(text)
    if program.residual:
        y = given[-1]
        assert y is not None
        cotangent = torch.where(y.detach() <= 0, 0.0, cotangent)  # ReLU is what follows a residual
        found = of_reference(before_residual(text), given[:-1], needed[:-1], cotangent)
        return [*found, cotangent if needed[-1] else None]
    with torch.enable_grad():
        # by other names: x may be made of the same weight, which is no way that counts here
        pairs = zip(given, needed, strict=True)
        given = [None if t is None else _alias(t, need) for t, need in pairs]
        x, *tensors = given
        assert x is not None
        filled = [x.new_zeros(()) if t is None else t for t in tensors]  # of updates alone
        y = reference(text, x, filled, updates=False)[0]
    pairs = zip(given, needed, strict=True)
    wanted = [tensor for tensor, need in pairs if need and tensor is not None]
    made = iter(torch.autograd.grad(y, wanted, cotangent, create_graph=again, allow_unused=True))
    return [next(made) if need else None for need in needed]


def _alias(tensor: Tensor, needed: bool) -> Tensor:
    """The same by another name, which has a gradient of its own."""
    if tensor.requires_grad:
        return tensor.view_as(tensor)
    return tensor.detach().requires_grad_(needed)
