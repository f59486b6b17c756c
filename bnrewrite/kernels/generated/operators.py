"""The operators ``bnrewrite::norm_forward_cpu`` and ``bnrewrite::norm_backward_cpu``.

They are registered with ``torch.library``, for compilers: these trace them, call them as they are,
and place what stands around them. The eager stage calls kernels without them (``call.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import runtime
from .arranged import dtype_of_moments, like
from .call import kernel_of, without_values
from .kernel import Kernel
from .layout import Layout
from .printing import Source
from .program import parse
from .record import backward as run_backward
from .record import forward as run_forward
from .saving import no_kernel, register

FLEXIBLE = torch.Tag.flexible_layout  # a kernel is printed for the layout in which x comes


@torch.library.custom_op(
    "bnrewrite::norm_forward_cpu", mutates_args=(), device_types="cpu", tags=FLEXIBLE
)
def norm_forward(text: str, x: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """``y``, the moments of each group, and the updates of a program.

    Args:
        text: the program, as ``program.py`` says.
        x: of its dimensions, in any layout.
        tensors: t0, t1, ... and the residual, where the program adds one.
    """
    found = runtime.forward(text, x, tensors)
    if found is not None:
        return found
    kernel, dense = _found(text, x, tensors)
    y, moments, updates = run_forward(kernel, dense, tensors)
    moments = _ordered(kernel, moments)
    return [like(y, torch.empty_like(x)), moments, *(update.contiguous() for update in updates)]


@torch.library.custom_op(
    "bnrewrite::norm_backward_cpu", mutates_args=(), device_types="cpu", tags=FLEXIBLE
)
def norm_backward(
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
    made = runtime.backward(text, dy, x, y, moments, tensors)
    if made is not None:
        return made
    kernel, dense = _found(text, x, [*tensors, *([x] if parse(text).residual else [])])
    moments = _ordered(kernel, moments, back=True)
    y = None if y is None else like(y, dense)
    dx, made, dresidual = run_backward(kernel, dy, dense, y, moments, tensors)
    assert dx is not None
    large = [dx] if dresidual is None else [dx, dresidual]
    dx, *rest = (like(each, torch.empty_like(x)) for each in large)
    return [dx, *(each.contiguous() for each in made), *rest]


def _found(text: str, x: Tensor, tensors: Sequence[Tensor]) -> tuple[Kernel, Tensor]:
    """The kernel for these tensors, and x in the layout that it takes."""
    kernel = kernel_of(text, x, tensors)
    if kernel is None:  # a compiler gave it another layout than the one that was asked about
        x = x.contiguous()
        kernel = kernel_of(text, x, tensors)
    if kernel is None:
        raise no_kernel(text, x, tensors)
    runtime.add(text, kernel, (x, *tensors))
    return kernel, x.clone(memory_format=torch.preserve_format) if kernel.copies else x


@norm_forward.register_fake
def _(text: str, x: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    program = parse(text)
    saved = len(Source(text, Layout((), 0), ()).moments()) * (2 if program.means else 1)
    single = dtype_of_moments(program, x.dtype, [t.dtype for t in tensors])
    moments = x.new_empty((saved, math.prod(program.kept_sizes(x.shape))), dtype=single)
    y, *updates = without_values(text, x, tensors)
    return [y, moments, *updates]


@norm_backward.register_fake
def _(
    text: str,
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    moments: Tensor,
    tensors: Sequence[Tensor],
) -> list[Tensor]:
    program = parse(text)
    free = [t for i, t in enumerate(tensors) if i not in program.fixed]
    made = [t.new_empty(t.shape) for t in free]
    return [torch.empty_like(x), *made, *([torch.empty_like(x)] if program.residual else [])]


def _ordered(kernel: Kernel, moments: Tensor, *, back: bool = False) -> Tensor:
    """Moments in the order of the program's axes, from that in memory, or back: x may move."""
    sizes, places = kernel.kept
    if places == sorted(places):
        return moments.contiguous()
    if back:
        sizes, places = [sizes[i] for i in places], [places.index(i) for i in range(len(places))]
    split = moments.reshape(-1, *sizes).permute(0, *(1 + i for i in places))
    return split.reshape(moments.shape).contiguous()


register(norm_forward, norm_backward)
