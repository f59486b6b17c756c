"""What is kept of a program for its backward, its gradients from that, and operators of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .layout import Layout
from .printing import Source
from .program import parse
from .record import PLAIN, copied, of_reference

Backward = Callable[[str, Tensor, Tensor, Tensor | None, Tensor, list[Tensor]], list[Tensor]]


@cache
def _read(text: str) -> tuple[frozenset[int], frozenset[int], frozenset[int]]:
    """The tensors that a backward reads; on whose values a gradient depends; that it copies."""
    source = Source(text, Layout((), 0), ())  # neither depends on loops or dtypes
    firm = source.firm()
    return frozenset(source.used()), frozenset(firm), frozenset(source.copied(firm))


def save(
    ctx: Any, text: str, x: Tensor, given: Sequence[Tensor], y: Tensor, moments: Tensor
) -> None:
    """Keep x, the moments, and what a backward reads of the tensors."""
    used, firm, copies = _read(text)
    program, kept = parse(text), []
    masks = bool(program.activation) and not program.residual
    for i in range(len(program.tensors)):
        traced = type(given[i]) not in PLAIN
        if i not in used or (traced and i not in firm and not masks):
            kept.append(torch.empty_like(given[i]))  # nothing but its shape is asked for
        elif i in copies:  # it may change before the backward; a copy does not
            kept.append(given[i].clone() if traced else copied(given[i]))
        else:  # where no gradient depends on its value, it may have changed since
            kept.append(given[i] if i in firm else given[i].data)
    ctx.save_for_backward(x, moments, *kept, *([y] if program.residual else []))
    ctx.text = text


def differentiate(
    ctx: Any, needed: Sequence[bool], dy: Tensor, kernels: Backward
) -> list[Tensor | None]:
    """The gradients of x, of the tensors, and of the residual: twice differentiable where asked.

    Args:
        ctx: what was saved.
        needed: which of them are.
        dy: the cotangent of y.
        kernels: of the backward.
    """
    x, moments, *given = ctx.saved_tensors
    program = parse(ctx.text)
    y = given[-1] if program.residual else None
    if torch.is_grad_enabled():
        return of_reference(ctx.text, [x, *given], needed, dy)
    dx, *made = kernels(ctx.text, dy, x, y, moments, given[: len(program.tensors)])
    rest = iter(made)
    placed = [None if i in program.fixed else next(rest) for i in range(len(program.tensors))]
    return [dx, *placed, *rest]


def register(forward: Any, backward: Backward) -> None:
    """Let autograd record an operator.

    Args:
        forward: of a text, x and tensors, which makes y, the moments and the updates.
        backward: of what is kept.
    """

    def keep(ctx: Any, inputs: tuple[str, Tensor, list[Tensor]], output: list[Tensor]) -> None:
        text, x, given = inputs
        save(ctx, text, x, given, output[0], output[1])

    def gradients(ctx: Any, cotangents: list[Tensor | None]) -> tuple[Any, ...]:
        dy = cotangents[0]
        needed = [ctx.needs_input_grad[1], *ctx.needs_input_grad[2]]
        if dy is None:
            return None, None, [None] * (len(needed) - 1)
        dx, *made = differentiate(ctx, needed, dy, backward)
        return None, dx, made

    forward.register_autograd(gradients, setup_context=keep)


def no_kernel(text: str, x: Tensor, tensors: Sequence[Tensor]) -> ValueError:
    """What an operator raises for tensors that no kernel takes."""
    shapes = [tuple(each.shape) for each in (x, *tensors)]
    return ValueError(
        f"no kernel of {text!r} takes {x.dtype} tensors of the shapes {shapes}: call "
        "bnrewrite.kernels.norm, which runs torch's operations then"
    )
