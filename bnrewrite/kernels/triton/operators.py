"""The operators ``bnrewrite::norm_forward`` and ``bnrewrite::norm_backward``.

They are registered with ``torch.library`` as operators made of Triton kernels: eager code launches
these, fake tensors run the Python around them, and ``torch.compile`` sees through to each kernel.
What is differentiated twice runs by torch's operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..generated.printing import Unprintable
from ..generated.program import Program, parse
from ..generated.record import of_reference
from .launch import Launch, launch_of, run_backward, run_forward


def _forward(text: str, x: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """``y``, the moments of each group, and the updates of a program.

    Args:
        text: the program, as ``program.py`` of ``kernels.generated`` says.
        x: of its dimensions, in any layout.
        tensors: t0, t1, ... and the residual, where the program adds one.

    Raises:
        ValueError: the program has no kernel for these.
    """
    x, launch = _launch(text, x, tensors)
    with _device_of(x):
        y, moments, updates = run_forward(launch, x, tensors)
    return [y, moments, *updates]


def _backward(
    text: str, dy: Tensor, x: Tensor, y: Tensor | None, moments: Tensor, tensors: list[Tensor]
) -> list[Tensor]:
    """The gradients of x, of the tensors that take one, and of the residual.

    Args:
        text: the program.
        dy: the cotangent of y.
        x: as it was given to the forward.
        y: what the forward made, where an activation follows a residual.
        moments: what the forward made.
        tensors: those of the program, without the residual.
    """
    residual = [x] * parse(text).residual  # the launch asks for its shape alone
    x, launch = _launch(text, x, [*tensors, *residual])
    with _device_of(x):
        dx, dresidual, made = run_backward(launch, dy, x, y, moments, tensors)
    free = [made[i] for i in launch.tiled.source.free()]
    return [dx, *free, *([] if dresidual is None else [dresidual])]


def _device_of(x: Tensor) -> AbstractContextManager[None]:
    """Kernels are launched on the current device; those of fake tensors are not."""
    if isinstance(x, FakeTensor):
        return nullcontext()
    place: Any = torch.cuda.device_of
    current: AbstractContextManager[None] = place(x)
    return current


def _launch(text: str, x: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, Launch]:
    dense, launch = found(text, x, tensors)
    if launch is None:
        shapes = [tuple(each.shape) for each in (x, *tensors)]
        raise ValueError(
            f"no kernel of {text!r} takes {x.dtype} tensors of the shapes {shapes}: call "
            "bnrewrite.kernels.norm, which runs torch's operations then"
        )
    return dense, launch


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


def _save(ctx: Any, inputs: tuple[str, Tensor, list[Tensor]], output: list[Tensor]) -> None:
    """Keep x, the moments, and what the backward reads of the tensors."""
    text, x, given = inputs
    program = parse(text)
    _, launch = found(text, x, given)
    assert launch is not None
    source = launch.tiled.source
    firm, free = source.firm(), source.free()
    kept: list[Tensor] = []
    for i in range(len(program.tensors)):
        if i not in firm:  # its shape and dtype alone are asked for
            kept.append(torch.empty_like(given[i]))
        else:  # a buffer may change before the backward; a copy does not
            kept.append(given[i] if i in free else given[i].clone())
    residual = given[len(kept) :]
    masked = program.residual and bool(program.activation)
    ctx.save_for_backward(x, output[1], output[0] if masked else None, *kept, *residual)
    ctx.text = text


def _differentiate(ctx: Any, cotangents: list[Tensor | None]) -> tuple[Any, ...]:
    """The gradients of x, of the tensors, and of the residual."""
    x, moments, y, *given = ctx.saved_tensors
    program = parse(ctx.text)
    dy = cotangents[0]
    if dy is None:
        return None, None, [None] * len(given)
    if torch.is_grad_enabled():
        needed = [ctx.needs_input_grad[1], *ctx.needs_input_grad[2]]
        dx, *made = of_reference(ctx.text, [x, *given], needed, dy)
        return None, dx, made
    tensors = given[: len(program.tensors)]
    dx, *made = torch.ops.bnrewrite.norm_backward(ctx.text, dy, x, y, moments, tensors)
    return None, dx, _placed(program, made)


def _placed(program: Program, made: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients of the free tensors, and of the residual, among those that take none."""
    rest = iter(made)
    placed: list[Tensor | None] = [
        None if i in program.fixed else next(rest) for i in range(len(program.tensors))
    ]
    return [*placed, *rest]


norm_forward: Any = torch.library.triton_op("bnrewrite::norm_forward", _forward, mutates_args=())
norm_backward: Any = torch.library.triton_op("bnrewrite::norm_backward", _backward, mutates_args=())
norm_forward.register_autograd(_differentiate, setup_context=_save)
