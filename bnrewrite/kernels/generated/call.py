"""Runs programs on tensors: by a kernel where there is one, by torch's operations else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..triton import run_on_gpu
from . import runtime
from .arranged import dtype_of_moments
from .kernel import Kernel, made_for
from .program import parse
from .record import Recorded, are_plain, forward
from .reference import reference

MOST = 4096  # shapes whose kernels are remembered

_kernels: dict[Any, Kernel | None] = {}


def norm(text: str, x: Tensor, *tensors: Tensor) -> Tensor:
    """``y`` of a program, in the layout of x.

    Args:
        text: the program, as ``program.py`` says.
        x: of its dimensions, in any layout.
        tensors: t0, t1, ... with their elements in the order of their axes, and after them the
            residual, where the program adds one.
    """
    made = runtime.call(text, x, tensors) or _run(text, x, tensors)
    return made[0]


def norm_with_updates(text: str, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """``y`` of a program, and its updates: along the kept axes, in the dtype of the moments."""
    return runtime.call(text, x, tensors) or _run(text, x, tensors)


def _run(text: str, x: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    if type(x) is FakeTensor:
        return _fake(text, x, tensors)
    if x.is_cuda and are_plain(x, *tensors, device="cuda"):
        made = run_on_gpu(text, x, tensors)
        if made is not None:
            return made
    kernel = _kernel(text, x, tensors) if are_plain(x, *tensors) else None
    if kernel is None:
        y, updates = reference(text, x, tensors)
        return (y, *updates)
    if kernel.copies:
        x = x.clone(memory_format=torch.preserve_format)
    if torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in tensors)):
        x, *tensors = (t.clone() if t.is_inference() else t for t in (x, *tensors))  # to be saved
        found: tuple[Tensor, ...] = Recorded.apply(kernel, text, x, *tensors)  # type: ignore[no-untyped-call]
        return found
    y, _, updates = forward(kernel, x, tensors)
    return (y, *updates)


def _fake(text: str, x: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Results without values."""
    program = parse(text)
    shape = program.kept_sizes(x.shape)
    single = dtype_of_moments(program, x.dtype, [t.dtype for t in tensors])
    updates = (x.new_empty(shape, dtype=single) for _ in program.updates)
    return (torch.empty_like(x, dtype=program.dtype or x.dtype), *updates)


def _kernel(text: str, x: Tensor, tensors: Sequence[Tensor]) -> Kernel | None:
    key = (text, x.shape, x.stride(), x.dtype, *[(t.shape, t.dtype) for t in tensors])
    try:
        return _kernels[key]
    except KeyError:
        if len(_kernels) >= MOST:
            _kernels.clear()
        found = _kernels[key] = made_for(text, x, tensors)
        if found is not None:
            runtime.add(text, found, (x, *tensors))
        return found
