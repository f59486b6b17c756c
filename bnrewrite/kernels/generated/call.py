"""Runs programs on tensors: by a kernel where there is one, by torch's operations else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..triton import operator_on_gpu, run_on_gpu
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
        return without_values(text, x, tensors)
    if x.is_cuda and are_plain(x, *tensors, device="cuda"):
        made = run_on_gpu(text, x, tensors)
        if made is not None:
            return made
    kernel = kernel_of(text, x, tensors) if are_plain(x, *tensors) else None
    if kernel is None:
        y, updates = reference(text, x, tensors)
        return (y, *updates)
    runtime.add(text, kernel, (x, *tensors))
    if kernel.copies:
        x = x.clone(memory_format=torch.preserve_format)
    if torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in tensors)):
        x, *tensors = (t.clone() if t.is_inference() else t for t in (x, *tensors))  # to be saved
        found: tuple[Tensor, ...] = Recorded.apply(kernel, text, x, *tensors)  # type: ignore[no-untyped-call]
        return found
    y, _, updates = forward(kernel, x, tensors)
    return (y, *updates)


def without_values(text: str, x: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """``y`` and the updates, without values."""
    program = parse(text)
    shape = program.kept_sizes(x.shape)
    single = dtype_of_moments(program, x.dtype, [t.dtype for t in tensors])
    updates = (x.new_empty(shape, dtype=single) for _ in program.updates)
    return (torch.empty_like(x, dtype=program.dtype or x.dtype), *updates)


def kernel_of(text: str, x: Tensor, tensors: Sequence[Tensor]) -> Kernel | None:
    """The kernel of a program for tensors; None where torch's operations stand in for it."""
    key = (text, x.shape, x.stride(), x.dtype, *[(t.shape, t.dtype) for t in tensors])
    try:
        return _kernels[key]
    except KeyError:
        if len(_kernels) >= MOST:
            _kernels.clear()
        found = _kernels[key] = made_for(text, x, tensors)
        return found


def operator_of(text: str, x: Tensor, tensors: Sequence[Tensor]) -> Any:
    """The operator that makes ``[y, moments, *updates]`` of a program; None where it has no kernel.

    Args:
        text: the program.
        x: of its dimensions; fake tensors will do.
        tensors: t0, t1, ... and the residual, where the program adds one.
    """
    if x.is_cuda:
        return operator_on_gpu(text, x, tensors)
    from .operators import norm_forward  # here: two operators take a while to register

    given = [_example(each) for each in (x, *tensors) if _has_example(each)]
    if len(given) <= len(tensors):
        return None
    like, *rest = given
    has = all(made_for(text, each, rest) for each in (like, like.contiguous()))
    return norm_forward._opoverload if has else None


def _has_example(tensor: Tensor) -> bool:
    numbers = (*tensor.shape, *tensor.stride())
    return all(not isinstance(n, torch.SymInt) or n.node.hint is not None for n in numbers)


def _example(tensor: Tensor) -> Tensor:
    """A tensor without numbers, of the example that symbolic sizes were captured with."""
    sizes, strides = (
        [n.node.hint if isinstance(n, torch.SymInt) else n for n in numbers]
        for numbers in (tensor.shape, tensor.stride())
    )
    return torch.empty_strided(sizes, strides, dtype=tensor.dtype, device="meta")
