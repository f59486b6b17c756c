"""The same formulas on a GPU: kernels printed for Triton from the texts of ``kernels.generated``.

What a text means, how it is differentiated, what its loops are and what is right is said there, in
``program.py``, ``gradients.py``, ``layout.py`` and ``reference.py``; here it is printed, cut into
tiles and launched.
Triton comes with PyTorch for CUDA and is imported when the first kernel is.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import Tensor

__all__ = ["operator_on_gpu", "run_on_gpu", "why_no_triton"]


@cache
def why_no_triton() -> str | None:
    """Why nothing can be compiled for a GPU here; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


def run_on_gpu(text: str, x: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
    """``y`` of a program, and its updates; None where torch's operations stand in for a kernel.

    Args:
        text: the program.
        x: of its dimensions, in any layout, on a GPU (or anywhere under Triton's interpreter).
        tensors: t0, t1, ... and the residual, where the program adds one.
    """
    if why_no_triton() is not None or any(each.device != x.device for each in tensors):
        return None
    from .record import call, found  # here: Triton is imported when it is needed

    dense, launch = found(text, x, tensors)
    return None if launch is None else call(launch, text, dense, tensors)


def operator_on_gpu(text: str, x: Tensor, tensors: Sequence[Tensor]) -> Any:
    """The operator that makes ``[y, moments, *updates]`` of a program; None where it has no kernel.

    Args:
        text: the program.
        x: of its dimensions; fake tensors will do.
        tensors: t0, t1, ... and the residual, where the program adds one.
    """
    from .operators import norm_forward
    from .record import found

    _, launch = found(text, x, tensors)
    return None if launch is None else norm_forward._opoverload
