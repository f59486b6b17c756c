"""Runs programs: compiled for the tensors that come, differentiable, by torch's operations else."""

from __future__ import annotations

import ctypes
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from .build import NoCompiler
from .compiled import compiled
from .layout import Layout, arrange
from .printing import Source, Unprintable
from .program import Program, parse
from .reference import reference

logger = logging.getLogger(__name__)

SMALL = 32768  # elements for which another thread is worth its start
FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PLAIN = (torch.Tensor, torch.nn.Parameter)


@dataclass(frozen=True)
class Kernel:
    """The compiled functions of a program for tensors of one shape, layout and dtypes.

    Attributes:
        forward, backward: as ``printing.Source`` gives their arguments.
        copies: x has holes or repeats in memory, and is copied first.
        loops: the lengths of the loops, as the functions take them.
        elements: of x.
        groups: how many there are.
        saved: moments of each group.
        orders: for each tensor None, or the sizes of its axes and their order in memory.
        kept: the sizes of the kept axes in the order of memory, and the way back.
        dtype: of the moments.
        result: of y.
        free: the tensors that take a gradient.
        used: those that a backward reads.
        updates: how many there are.
    """

    forward: Any
    backward: Any
    copies: bool
    loops: Any
    elements: int
    groups: int
    saved: int
    orders: tuple[tuple[list[int], list[int]] | None, ...]
    kept: tuple[list[int], list[int]]
    dtype: torch.dtype
    result: torch.dtype
    free: tuple[int, ...]
    used: tuple[int, ...]
    updates: int


_kernels: dict[Any, Kernel | None] = {}


def norm(text: str, x: Tensor, *tensors: Tensor) -> Tensor:
    """``y`` of a program, in the layout of x.

    Args:
        text: the program, as ``program.py`` says.
        x: of its dimensions, in any layout.
        tensors: t0, t1, ... with their elements in the order of their axes, and after them the
            residual, where the program adds one.
    """
    return _run(text, x, tensors)[0]


def norm_with_updates(text: str, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """``y`` of a program, and its updates: along the kept axes, in the dtype of the moments."""
    return _run(text, x, tensors)


def _run(text: str, x: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    if type(x) is FakeTensor:
        return _fake(text, x, tensors)
    kernel = _kernel(text, x, tensors)
    if kernel is None:
        y, updates = reference(text, x, tensors)
        return (y, *updates)
    if kernel.copies:
        x = x.clone(memory_format=torch.preserve_format)
    if torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in tensors)):
        found: tuple[Tensor, ...] = _Norm.apply(kernel, text, x, *tensors)  # type: ignore[no-untyped-call]
        return found
    y, _, updates = _forward(kernel, x, tensors)
    return (y, *updates)


def _fake(text: str, x: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Results without values."""
    program = parse(text)
    shape = program.kept_sizes(x.shape)
    wide = any(t.dtype == torch.float64 for t in (x, *tensors[: len(program.tensors)]))
    single = torch.float64 if wide or program.dtype == torch.float64 else torch.float32
    updates = (x.new_empty(shape, dtype=single) for _ in program.updates)
    return (torch.empty_like(x, dtype=program.dtype or x.dtype), *updates)


def _kernel(text: str, x: Tensor, tensors: Sequence[Tensor]) -> Kernel | None:
    if _is_observed() or not all(map(_is_plain, (x, *tensors))):
        return None
    key = (text, x.shape, x.stride(), x.dtype, *[(t.shape, t.dtype) for t in tensors])
    try:
        return _kernels[key]
    except KeyError:
        found = _kernels[key] = _made(text, x, tensors)
        return found


def _is_plain(tensor: Tensor) -> bool:
    """Whether its numbers are where its address says, as they are."""
    return (
        type(tensor) in PLAIN
        and tensor.is_cpu
        and torch._C._has_storage(tensor)
        and not tensor.is_neg()
    )


def _is_observed() -> bool:
    """Whether something must see the operations: a transform, a mode, a trace, forward mode."""
    return (
        forward_ad._current_level >= 0
        or _functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def _made(text: str, x: Tensor, tensors: Sequence[Tensor]) -> Kernel | None:
    program = parse(text)
    given = (x, *tensors)
    if any(t.dtype not in FLOATING for t in given) or not x.numel():
        return None
    if not _fits(program, x, tensors):
        return None
    strides = torch.empty_like(x).stride()
    arranged = arrange(program, x.shape, strides)
    if arranged is None:
        return None
    layout, lengths = arranged
    result = program.dtype or x.dtype
    tensors = tensors[: len(program.tensors)]
    dtypes = tuple(
        str(d).removeprefix("torch.") for d in (x.dtype, result, *[t.dtype for t in tensors])
    )
    source = Source(text, layout, dtypes)
    try:
        functions = compiled(source)
    except Unprintable:
        return None
    except NoCompiler as reason:
        logger.warning("a norm runs without a kernel of its own: %s", reason)
        return None
    sizes = program.axis_sizes(x.shape)
    groups = [n for loop, n in zip(layout.loops, lengths, strict=True) if not loop.reduced]
    return Kernel(
        forward=functions.forward,
        backward=functions.backward,
        copies=strides != x.stride(),
        loops=(ctypes.c_int64 * len(lengths))(*lengths),
        elements=x.numel(),
        groups=math.prod(groups),
        saved=1 if program.about_zero else 2,
        orders=tuple(
            _order(program.tensors[i], layout.order(i), sizes) for i in range(len(tensors))
        ),
        kept=_kept(program, layout, sizes),
        dtype=torch.float64 if source.single == "double" else torch.float32,
        result=result,
        free=tuple(source.free()),
        used=tuple(source.used()),
        updates=len(program.updates),
    )


def _fits(program: Program, x: Tensor, tensors: Sequence[Tensor]) -> bool:
    """Whether every tensor has the elements that a kernel reads."""
    if len(tensors) != len(program.tensors) + program.residual:
        return False
    sizes = program.axis_sizes(x.shape)
    if program.residual and tensors[-1].shape != x.shape:
        return False
    wanted = (math.prod(sizes[axis] for axis in own) for own in program.tensors)
    return all(t.numel() == count for t, count in zip(tensors, wanted, strict=False))


def _order(
    own: tuple[str, ...], wanted: tuple[str, ...], sizes: dict[str, int]
) -> tuple[list[int], list[int]] | None:
    """How a tensor is permuted to the order of memory; None where it is in it."""
    present = [axis for axis in own if axis in wanted]  # others have one element
    if tuple(present) == wanted:
        return None
    return [sizes[axis] for axis in present], [present.index(axis) for axis in wanted]


def _kept(program: Program, layout: Layout, sizes: dict[str, int]) -> tuple[list[int], list[int]]:
    memory = [axis for loop in layout.loops if not loop.reduced for axis in loop.axes]
    single = [axis for axis in program.kept() if axis not in memory]  # of one element
    memory = [*single, *memory]
    return [sizes[axis] for axis in memory], [memory.index(axis) for axis in program.kept()]


def _dense(tensor: Tensor, order: tuple[list[int], list[int]] | None) -> Tensor:
    if order is None:
        return tensor.contiguous()
    sizes, places = order
    return tensor.reshape(sizes).permute(places).contiguous()


def _back(made: Tensor, tensor: Tensor, order: tuple[list[int], list[int]] | None) -> Tensor:
    """A gradient in the shape of its tensor."""
    if order is None:
        return made
    places = order[1]
    return made.permute([places.index(dim) for dim in range(len(places))]).reshape(tensor.shape)


def _threads(kernel: Kernel) -> int:
    return min(torch.get_num_threads(), -(-kernel.elements // SMALL))


def _at(tensor: Tensor | None) -> ctypes.c_void_p | None:
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


def _forward(
    kernel: Kernel, x: Tensor, given: Sequence[Tensor]
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    tensors, residual = _parted(kernel, x, given)
    y = torch.empty_like(x, dtype=kernel.result)
    both = x.new_empty((kernel.saved + kernel.updates, kernel.groups), dtype=kernel.dtype)
    moments, new = both[: kernel.saved], both[kernel.saved :]
    dense = [_dense(t, order) for t, order in zip(tensors, kernel.orders, strict=True)]
    kernel.forward(
        _at(x), _at(residual), _at(y), _at(moments), _at(new),
        *[_at(t) for t in dense], kernel.loops, ctypes.c_int64(_threads(kernel)),
    )  # fmt: skip
    updates: tuple[Tensor, ...] = ()
    if kernel.updates:
        sizes, places = kernel.kept
        updates = tuple(u.clone().view(sizes).permute(places) for u in new)
    return y, moments, updates


def _parted(
    kernel: Kernel, x: Tensor, given: Sequence[Tensor]
) -> tuple[Sequence[Tensor], Tensor | None]:
    """The tensors of the program, and the residual in the layout of x."""
    count = len(kernel.orders)
    if len(given) == count:
        return given, None
    residual = given[count]
    if residual.stride() != x.stride():
        residual = torch.empty_like(x).copy_(residual)
    return given[:count], residual


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernel: Kernel, text: str, x: Tensor, *given: Tensor
    ) -> tuple[Tensor, ...]:
        y, moments, updates = _forward(kernel, x, given)
        kept: list[Tensor | None] = [None] * len(kernel.orders)
        for i in kernel.used:  # a buffer may change before the backward; a copy does not
            kept[i] = given[i] if i in kernel.free else given[i].clone()
        residual = given[len(kept) :]
        ctx.save_for_backward(x, moments, *([y] if residual else []), *kept, *residual)
        ctx.kernel, ctx.text = kernel, text
        ctx.mark_non_differentiable(*updates)
        return (y, *updates)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        kernel, needed = ctx.kernel, ctx.needs_input_grad[2:]
        x, moments, *given = ctx.saved_tensors
        y = given.pop(0) if len(given) > len(kernel.orders) else None
        dy = cotangents[0]
        if torch.is_grad_enabled() or _is_observed() or not _is_plain(dy):
            return (None, None, *_of_reference(ctx.text, [x, *given], needed, dy))
        if dy.stride() != x.stride():
            dy = torch.empty_like(x, dtype=dy.dtype).copy_(dy)
        tensors = given[: len(kernel.orders)]
        dx = torch.empty_like(x) if needed[0] else None
        dresidual = torch.empty_like(x) if y is not None else None
        dense = [
            None if t is None else _dense(t, order)
            for t, order in zip(tensors, kernel.orders, strict=True)
        ]
        made = [torch.empty_like(dense[i]) for i in kernel.free]
        kernel.backward(
            _at(dy), _at(x), _at(y), _at(moments), _at(dx), _at(dresidual),
            *[_at(t) for t in (*dense, *made)], kernel.loops, ctypes.c_int64(_threads(kernel)),
        )  # fmt: skip
        found: list[Tensor | None] = [dx, *[None] * len(tensors)]
        for i, gradient in zip(kernel.free, made, strict=True):
            if needed[1 + i]:
                found[1 + i] = _back(gradient, tensors[i], kernel.orders[i])
        return (None, None, *found, *([dresidual] if y is not None else []))


def _of_reference(
    text: str, given: Sequence[Tensor | None], needed: Sequence[bool], cotangent: Tensor
) -> list[Tensor | None]:
    """Gradients that can be differentiated any number of times."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # by other names: x may be made of the same weight, which is no way that counts here
        given = [None if t is None else t.view_as(t) for t in given]
        x, *tensors = given
        assert x is not None
        filled = [x.new_zeros(()) if t is None else t for t in tensors]  # of updates alone
        y = reference(text, x, filled, updates=False)[0]
    pairs = zip(given, needed, strict=True)
    wanted = [tensor for tensor, need in pairs if need and tensor is not None]
    made = iter(torch.autograd.grad(y, wanted, cotangent, create_graph=again, allow_unused=True))
    return [next(made) if need else None for need in needed]
