"""The operators ``bnrewrite::norm_forward`` and ``bnrewrite::norm_backward``.

They are registered with ``torch.library`` as operators made of Triton kernels: eager code launches
these, fake tensors run the Python around them, and ``torch.compile`` sees through to each kernel.
What is differentiated twice runs by torch's operations. The eager stage calls kernels without them:
an operator that is written in Python adds 100 us to the 90 us of a forward and a backward, launches
not counted (``record.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..generated.program import parse
from ..generated.saving import no_kernel, register
from .launch import Launch, run_forward
from .record import device_of, found, gradients


def forward(text: str, x: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """``y``, the moments of each group, and the updates of a program.

    Behind the moments lie, where a group needs others, the means over groups and the coefficients.

    Args:
        text: the program, as ``program.py`` of ``kernels.generated`` says.
        x: of its dimensions, in any layout.
        tensors: t0, t1, ... and the residual, where the program adds one.

    Raises:
        ValueError: the program has no kernel for these.
    """
    x, launch = _launch(text, x, tensors)
    with device_of(x):
        y, moments, updates = run_forward(launch, x, tensors)
    return [y, moments, *updates]


def backward(
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
    with device_of(x):
        return gradients(launch, dy, x, y, moments, tensors)


def _launch(text: str, x: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, Launch]:
    dense, launch = found(text, x, tensors)
    if launch is None:
        raise no_kernel(text, x, tensors)
    return dense, launch


norm_forward: Any = torch.library.triton_op("bnrewrite::norm_forward", forward, mutates_args=())
norm_backward: Any = torch.library.triton_op("bnrewrite::norm_backward", backward, mutates_args=())
register(norm_forward, torch.ops.bnrewrite.norm_backward)
