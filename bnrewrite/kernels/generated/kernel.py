"""Compiled kernels for the tensors that come."""

from __future__ import annotations

import ctypes
import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .activations import activation
from .arranged import FLOATING, Order, dtype_of_moments, fits, order_of, order_of_groups
from .build import NoCompiler, library
from .columns import columns_source
from .columns_across import columns_across_source
from .functions import functions_source
from .layout import arrange
from .printing import Source, Unprintable
from .program import parse
from .rows import rows_source
from .rows_across import rows_across_source

logger = logging.getLogger(__name__)

PRINTED = {  # by columns, by means over groups
    (False, False): rows_source,
    (True, False): columns_source,
    (False, True): rows_across_source,
    (True, True): columns_across_source,
}
SMALL = 32768  # elements for which another thread is worth its start


@dataclass(frozen=True, eq=False)
class Kernel:
    """The compiled functions of a program for tensors of one shape, layout and dtypes.

    Attributes:
        forward, backward: of pointers as ``printing.Source`` lists them, extents, loops, threads.
        copies: x has holes or repeats in memory, and is copied first.
        loops: the lengths of the loops.
        extents: of the axes.
        threads: how many are worth their start.
        groups: how many there are.
        saved: moments of each group.
        orders: for each tensor None, or the sizes of its axes and their order in memory.
        kept: the sizes of the kept axes in the order of memory and the way back.
        single: the dtype of the moments.
        result: the dtype of y.
        free: the tensors that take a gradient.
        used: those that a backward reads.
        firm: those on whose values a gradient depends.
        copied: those that may change before the backward, which reads them all the same.
        updates: how many there are.
        residual: a tensor is added before the activation.
    """

    forward: Any
    backward: Any
    copies: bool
    loops: list[int]
    extents: list[int]
    threads: int
    groups: int
    saved: int
    orders: tuple[Order | None, ...]
    kept: Order
    single: torch.dtype
    result: torch.dtype
    free: tuple[int, ...]
    used: tuple[int, ...]
    firm: tuple[int, ...]
    copied: tuple[int, ...]
    updates: int
    residual: bool

    def run(self, function: Any, pointers: Sequence[Tensor | None]) -> None:
        """Call one of the functions."""
        threads = min(torch.get_num_threads(), self.threads)
        given = (ctypes.c_void_p * len(pointers))(
            *(t.data_ptr() if t is not None else None for t in pointers)
        )
        extents = (ctypes.c_double * len(self.extents))(*self.extents)
        loops = (ctypes.c_int64 * len(self.loops))(*self.loops)
        function(given, extents, loops, ctypes.c_int64(threads))


def made_for(text: str, x: Tensor, tensors: Sequence[Tensor]) -> Kernel | None:
    """The kernel of a program for tensors; None where torch's operations stand in for it."""
    program = parse(text)
    given = (x, *tensors)
    if any(t.dtype not in FLOATING for t in given) or not x.numel():
        return None
    if not fits(program, x.shape, [t.shape for t in tensors]):
        return None
    if program.residual and tensors[-1].dtype != x.dtype:
        return None
    strides = torch.empty_like(x).stride()
    arranged = arrange(program, x.shape, strides)
    if arranged is None:
        return None
    layout, lengths = arranged
    result = program.dtype or x.dtype
    tensors = tensors[: len(program.tensors)]
    dtypes = (x.dtype, result, *[t.dtype for t in tensors])
    source = Source(text, layout, tuple(str(d).removeprefix("torch.") for d in dtypes))
    functions = compiled_functions(source)
    if functions is None:
        return None
    functions.firm.restype = ctypes.c_char_p
    firm = [int(number) for number in functions.firm().split()]
    sizes = program.axis_sizes(x.shape)
    groups = [n for loop, n in zip(layout.loops, lengths, strict=True) if not loop.reduced]
    orders = (order_of(own, layout.order(i), sizes) for i, own in enumerate(program.tensors))
    return Kernel(
        forward=functions.forward,
        backward=functions.backward,
        copies=strides != x.stride(),
        loops=lengths,
        extents=list(sizes.values()),
        threads=-(-x.numel() // SMALL),
        groups=math.prod(groups),
        saved=len(source.moments()) * (2 if program.means else 1),
        orders=tuple(orders),
        kept=order_of_groups(program, layout, sizes),
        single=dtype_of_moments(program, x.dtype, [t.dtype for t in tensors]),
        result=result,
        free=tuple(source.free()),
        used=tuple(source.used()),
        firm=tuple(firm),
        copied=tuple(source.copied(firm)),
        updates=len(program.updates),
        residual=program.residual,
    )


@functools.cache
def compiled_functions(source: Source) -> ctypes.CDLL | None:
    """What a source is compiled to, once in a process, whatever the sizes; None for nothing."""
    try:
        return library(source.key(), source.single, functools.partial(_printed, source))
    except Unprintable:
        return None
    except NoCompiler as reason:
        logger.warning("a norm runs without a kernel of its own: %s", reason)
        return None


def _printed(source: Source) -> str:
    """The functions of a source, and one that tells on which tensors its gradients depend."""
    body = PRINTED[bool(source.layout.columns), bool(source.program.means)](source)
    body += f'\nextern "C" const char *firm() {{ return "{" ".join(map(str, source.firm()))}"; }}'
    found = activation(source.program.activation)
    if found is None or found.formula is None:
        return body
    return functions_source(found.formula, source.single) + body
