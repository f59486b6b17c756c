"""How a program runs over a tensor in memory: its axes as loops, from the outermost to the densest.

Axes that lie next to each other, are both reduced or both kept, and along which the same tensors
and means over groups run, are one loop. The densest loop decides the form:

    rows      it is reduced: each group is made of dense rows
    columns   it is kept, or so short that the columns of several groups are read at once
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .program import Program

SHORT = 64  # elements of a dense row; shorter ones are read as columns where rows lie outside
SHARE = 3  # of a row's elements that so many rows have to be: each column has moments to merge


@dataclass(frozen=True)
class Loop:
    """Some axes of a tensor, dense together."""

    axes: tuple[str, ...]
    reduced: bool
    tensors: frozenset[int]  # which run along it
    means: frozenset[int] = frozenset()  # over groups: which do


@dataclass(frozen=True)
class Layout:
    """The loops of a program over one arrangement in memory; what a source depends on.

    Attributes:
        loops: from the outermost to the densest.
        columns: how many of the last ones are columns; 0 for rows.
    """

    loops: tuple[Loop, ...]
    columns: int

    @property
    def kept(self) -> list[int]:
        """The loops over groups outside of the columns."""
        last = len(self.loops) - self.columns
        return [i for i in range(last) if not self.loops[i].reduced]

    def apart(self, means: int) -> int:
        """How many of the outermost of these loops all means over groups run along."""
        count = 0
        while count < len(self.kept) and len(self.loops[self.kept[count]].means) == means:
            count += 1
        return count

    @property
    def reduced(self) -> list[int]:
        """The reduced loops outside of the columns."""
        last = len(self.loops) - self.columns
        return [i for i in range(last) if self.loops[i].reduced]

    @property
    def dense(self) -> list[int]:
        """The loops of the columns, or of a row."""
        last = len(self.loops)
        return list(range(last - max(self.columns, 1), last))

    def order(self, number: int) -> tuple[str, ...]:
        """The axes of a tensor in the order of memory."""
        return tuple(a for loop in self.loops if number in loop.tensors for a in loop.axes)


def arrange(
    program: Program, shape: Sequence[int], strides: Sequence[int]
) -> tuple[Layout, list[int]] | None:
    """The loops of a tensor, and their lengths; None where it is not dense in memory."""
    axes: list[tuple[int, str, int]] = []
    for dim, extent, stride in zip(program.dims, shape, strides, strict=True):
        if not dim and extent != 1:
            return None
        known = math.prod(program.sizes.get(a, 1) for a in dim)
        inner = 1
        for axis in reversed(dim):
            size = program.sizes.get(axis) or extent // known
            axes.append((stride * inner, axis, size))
            inner *= size
    kept = sorted((a for a in axes if a[2] != 1), key=lambda a: -a[0])
    expected = 1
    for stride, _, size in reversed(kept):
        if stride != expected:
            return None
        expected *= size
    loops: list[Loop] = []
    lengths: list[int] = []
    for _, axis, size in kept:
        runs = frozenset(i for i, own in enumerate(program.tensors) if axis in own)
        means = frozenset(i for i, mean in enumerate(program.means) if axis in mean.axes)
        loop = Loop((axis,), axis in program.over, runs, means)
        if loops and replace(loops[-1], axes=loop.axes) == loop:
            loops[-1] = replace(loop, axes=(*loops[-1].axes, axis))
            lengths[-1] *= size
        else:
            loops.append(loop)
            lengths.append(size)
    if not any(loop.reduced for loop in loops):
        loops.append(Loop((), True, frozenset()))
        lengths.append(1)
    return Layout(tuple(loops), _columns(loops, lengths)), lengths


def _columns(loops: list[Loop], lengths: list[int]) -> int:
    reduced = [i for i, loop in enumerate(loops) if loop.reduced]
    last = len(loops) - 1
    if not loops[last].reduced:
        return last - reduced[-1]
    if lengths[last] >= SHORT or len(reduced) < 2 or reduced[-2] == last - 1:
        return 0
    if math.prod(lengths[i] for i in reduced[:-1]) * SHARE <= lengths[last]:
        return 0
    along_rows = {number for i in reduced[:-1] for number in loops[i].tensors}
    along_columns = {number for loop in loops[reduced[-2] + 1 :] for number in loop.tensors}
    return 0 if along_rows & along_columns else last - reduced[-2]
