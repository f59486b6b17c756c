"""What measurement says of lowerings: which of two equal ones is the faster, where and why.

Measured on a CPU with one thread, float32, without gradients (milliseconds):

    8x512x768 over the last axis      ``vector_norm`` 0.34, x*x and ``sum`` 0.74
    32x64x56x56 over the channels     ``vector_norm`` 0.85 in channels_last, 14.7 in NCHW;
                                      x*x and ``sum`` 1.7
    RMS norm of 8x512x768             ``rms_norm`` 1.86, by ``vector_norm`` 1.09
             of 4x128x256                          0.042                   0.036
             of 2x8x64                             0.008                   0.011

``vector_norm`` adds up one number after the other. Its relative error is 1.5 times that of ``sum``
at 4,096 numbers, 100 times at a million.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from bnrewrite.algebra import Match, Reading
from bnrewrite.algebra.anchors import elements
from bnrewrite.algebra.axes import Axis, Dims
from bnrewrite.kernels import FLOATING

from .cost_table import fastest, table_of, work_of
from .nodes import current

LONGEST_NORM = 4096
SMALLEST_KERNEL = 1024  # elements; below, what surrounds a kernel costs more than it saves
SMALLEST_RMS = 16384  # elements; below, the number of operations counts
# A float32 number of the weight takes 0.22 ns to compare, one of the result 0.15 ns to transform
# (one core, docs/decisions/0015-fold.md); comparing four vectors takes as long as 30,000 of these.
SMALLEST_FOLD = 65536  # elements of the result
WEIGHTS = 8  # as many elements of the result as of the weight


def may_generate(found: Match) -> bool:
    """Whether a site's tensor is one that kernels are printed for."""
    x = found.linear.source.meta["val"]
    return bool(found.over) and x.device.type in ("cpu", "cuda") and x.dtype in FLOATING


def choice(
    reading: Reading, found: Match, *, native: bool, kernel: bool, stage: str = "eager"
) -> str | None:
    """The lowering that the table of the device and of a stage, eager or Inductor's, says to take.

    Args:
        reading: of the graph.
        found: the site.
        native: an operator of PyTorch may be taken.
        kernel: a kernel may be taken, if it is not too small.
        stage: what runs the graph.

    Returns:
        Without measured times "generated", where a kernel may be taken on a CPU and is called as it
        is; else None. Also None where composite is the fastest of what was measured, and an
        operator that may be taken was not. For None an operator of PyTorch comes before moments and
        a multiply-add.
    """
    device = found.linear.source.meta["val"].device.type
    table, work = table_of(device, stage), work_of(reading, found, stage)
    times = None if table is None else table.times(work)
    small = work.elements is not None and work.elements < SMALLEST_KERNEL
    kernel = kernel and not small
    if times is None:
        return "generated" if kernel and device == "cpu" and stage == "eager" else None
    may = {"generated": kernel, "native": native, "composite": True}
    chosen = fastest(times, [lowering for lowering in may if may[lowering]], stage)
    if chosen == "composite" and native and "native" not in times:
        return None
    return chosen


def may_choose_norm(reading: Reading, found: Match) -> bool:
    """Whether a root of a sum of squares and ``vector_norm`` are the same to the user here.

    Their gradients differ at zero, and their errors where they are long.
    """
    count = reading.ring.count(found.over).constant
    x = found.linear.source.meta["val"]
    return (
        not reading.ring.differentiable(found.linear.source)
        and count is not None
        and 1 < count <= LONGEST_NORM
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
    )


def has_fast_norm(reading: Reading, found: Match, *, eager: bool) -> bool:
    """Whether ``vector_norm`` beats a sum of squares: it reads memory in order.

    It is for the eager stage alone, which runs what is written; others are given the plain formula.
    """
    if not eager or found.kind not in ("lp_normalize", "rms_norm"):
        return False
    if not may_choose_norm(reading, found):
        return False
    if found.kind == "rms_norm" and elements(found.linear.source) < SMALLEST_RMS:
        return False
    return _is_dense(found.linear.source, found.linear.index, found.over)


def fewest(weight: fx.Node) -> int:
    """The elements of a result from which on looking at the stored tensors pays."""
    return int(max(SMALLEST_FOLD, WEIGHTS * elements(weight)))


def _is_dense(source: fx.Node, index: Dims, over: frozenset[Axis]) -> bool:
    """Whether the reduced elements lie next to each other in memory."""
    value = current(source).meta["val"]
    inside = [[axis in over for axis in dim] for dim in index]
    if any(cut != sorted(cut) for cut in inside):
        return False
    sizes = [
        (stride, math.prod(a.size for a in dim if a in over))
        for stride, dim in zip(value.stride(), index, strict=True)
        if set(dim) & over
    ]
    if any(not isinstance(n, int) or not isinstance(stride, int) for stride, n in sizes):
        return False
    expected = 1
    for stride, size in sorted(sizes):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True
