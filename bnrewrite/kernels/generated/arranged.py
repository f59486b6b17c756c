"""Tensors of a program in the order in which its loops run over memory, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .layout import Layout
from .program import Program

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

Order = tuple[list[Any], list[int]]  # sizes of axes, and where each goes


def fits(program: Program, shape: Sequence[Any], shapes: Sequence[Sequence[Any]]) -> bool:
    """Whether every tensor has the elements that a kernel reads.

    Args:
        program: what runs.
        shape: of x.
        shapes: of the tensors, and of the residual.
    """
    if len(shapes) != len(program.tensors) + program.residual:
        return False
    if program.residual and tuple(shapes[-1]) != tuple(shape):
        return False
    sizes = program.axis_sizes(shape)
    wanted = (math.prod(sizes[axis] for axis in own) for own in program.tensors)
    return all(math.prod(each) == count for each, count in zip(shapes, wanted, strict=False))


def dtype_of_moments(
    program: Program, dtype: torch.dtype, dtypes: Sequence[torch.dtype]
) -> torch.dtype:
    """What is computed in, of the dtypes of x and of the tensors."""
    every = (dtype, program.dtype, *dtypes[: len(program.tensors)])
    return torch.float64 if torch.float64 in every else torch.float32


def order_of(own: tuple[str, ...], wanted: tuple[str, ...], sizes: dict[str, Any]) -> Order | None:
    """How a tensor is permuted to the order of memory; None where it is in it."""
    present = [axis for axis in own if axis in wanted]  # others have one element
    if tuple(present) == wanted:
        return None
    return [sizes[axis] for axis in present], [present.index(axis) for axis in wanted]


def order_of_groups(program: Program, layout: Layout, sizes: dict[str, Any]) -> Order:
    """The sizes of the kept axes in the order of memory, and the way back."""
    memory = [axis for loop in layout.loops if not loop.reduced for axis in loop.axes]
    single = [axis for axis in program.kept() if axis not in memory]  # of one element
    memory = [*single, *memory]
    return [sizes[axis] for axis in memory], [memory.index(axis) for axis in program.kept()]


def like(tensor: Tensor, x: Tensor) -> Tensor:
    """A tensor in the layout of x."""
    if tensor.stride() == x.stride():
        return tensor
    return torch.empty_like(x, dtype=tensor.dtype).copy_(tensor)


def dense(tensor: Tensor, order: Order | None) -> Tensor:
    """A tensor in the order of memory."""
    if order is None:
        return tensor.contiguous()
    sizes, places = order
    return tensor.reshape(sizes).permute(places).contiguous()


def back(made: Tensor, tensor: Tensor, order: Order | None) -> Tensor:
    """A gradient in the order of memory in the shape of its tensor."""
    if order is None:
        return made
    places = order[1]
    return made.permute([places.index(dim) for dim in range(len(places))]).reshape(tensor.shape)
