"""Axes: the index letters of a formula, and how shapes are built from them.

A dimension of a tensor is a tuple of axes in row-major order: ``()`` where the value does not vary
along it, ``(c,)`` for a plain dimension, ``(g, c)`` after a ``view`` that merged two. Reshapes only
split and regroup axes; broadcasting renames one operand's axes to the other's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import sympy
import torch

Size: TypeAlias = "int | sympy.Expr"
Dim = tuple["Axis", ...]
Dims = tuple[Dim, ...]

_serial = itertools.count()


class Opaque(Exception):
    """The operation is outside the algebra; its result is a new atom."""


class Axis:
    """One index letter, with its extent. Identity is equality."""

    __slots__ = ("serial", "size")

    def __init__(self, size: Size) -> None:
        self.size = size
        self.serial = next(_serial)

    def __repr__(self) -> str:
        return f"i{self.serial}:{self.size}"


def size_of(extent: int | torch.SymInt) -> Size:
    """The extent of a dimension as an exact number or a symbolic expression."""
    if isinstance(extent, torch.SymInt):
        expression = extent.node.expr
        return int(expression) if expression.is_number else expression
    return int(extent)


def product(sizes: Iterable[Size]) -> Size:
    """The number of elements that axes of these sizes index."""
    total: Size = 1
    for size in sizes:
        total = total * size
    return total


def fresh_dims(shape: Sequence[Size]) -> Dims:
    """One new axis per dimension that has more than one element."""
    return tuple(() if size == 1 else (Axis(size),) for size in shape)


def split(size: Size, outer: Size) -> Size:
    """The inner extent when an axis of ``size`` is split with ``outer`` as its outer part."""
    if isinstance(size, int) and isinstance(outer, int):
        if outer and size % outer == 0:
            return size // outer
        raise Opaque(f"an axis of {size} does not split into {outer} parts")
    inner = sympy.simplify(sympy.sympify(size) / outer)
    if inner.is_integer and sympy.fraction(inner)[1] == 1:
        return int(inner) if inner.is_number else inner
    raise Opaque(f"an axis of {size} does not split into {outer} parts")


def fits(size: Size, into: Size) -> bool:
    """Whether an axis of ``into`` can have an outer part of ``size``."""
    try:
        split(into, size)
    except Opaque:
        return False
    return True


def align(left: Dim, right: Dim) -> tuple[dict[Axis, Dim], dict[Axis, Dim]]:
    """Substitutions that make two dimensions of the same extent the same tuple of axes.

    The left axes are kept where they can be; an axis is split where the other side is finer.
    """
    if left == right:
        return {}, {}
    parts_left: dict[Axis, list[Axis]] = {axis: [] for axis in left}
    parts_right: dict[Axis, list[Axis]] = {axis: [] for axis in right}
    todo_left = [(axis, axis) for axis in reversed(left)]
    todo_right = [(axis, axis) for axis in reversed(right)]
    while todo_left and todo_right:
        origin_left, a = todo_left.pop()
        origin_right, b = todo_right.pop()
        if a.size == b.size:
            parts_left[origin_left].append(a)
            parts_right[origin_right].append(a)
        elif fits(b.size, a.size):
            outer, inner = Axis(b.size), Axis(split(a.size, b.size))
            parts_left[origin_left].append(outer)
            parts_right[origin_right].append(outer)
            todo_left.append((origin_left, inner))
        else:
            outer, inner = Axis(a.size), Axis(split(b.size, a.size))
            parts_left[origin_left].append(outer)
            parts_right[origin_right].append(outer)
            todo_right.append((origin_right, inner))
    if todo_left or todo_right:
        raise Opaque("two dimensions of different extent are combined")
    return _moved(parts_left), _moved(parts_right)


def regroup(dims: Dims, shape: Sequence[Size]) -> tuple[Dims, dict[Axis, Dim]]:
    """The dimensions of a tensor after ``reshape(shape)``, and the axes that had to be split.

    Args:
        dims: the dimensions before, every dimension of more than one element with its axes.
        shape: the extents after.
    """
    flat = [axis for dim in dims for axis in dim]
    parts: dict[Axis, list[Axis]] = {axis: [] for axis in flat}
    todo = [(axis, axis) for axis in reversed(flat)]
    result: list[Dim] = []
    for extent in shape:
        rest: Size = extent
        taken: list[Axis] = []
        while rest != 1:
            if not todo:
                raise Opaque("a reshape that changes the number of elements")
            origin, axis = todo.pop()
            if not fits(axis.size, rest):
                outer, inner = Axis(rest), Axis(split(axis.size, rest))
                todo.append((origin, inner))
                axis = outer
            parts[origin].append(axis)
            taken.append(axis)
            rest = split(rest, axis.size)
        result.append(tuple(taken))
    if todo:
        raise Opaque("a reshape that changes the number of elements")
    return tuple(result), _moved(parts)


def substitute(dims: Dims, moves: dict[Axis, Dim]) -> Dims:
    """The dimensions with every moved axis replaced by its parts."""
    if not moves:
        return dims
    return tuple(tuple(p for axis in dim for p in moves.get(axis, (axis,))) for dim in dims)


def axes_of(dims: Dims) -> list[Axis]:
    """All axes in row-major order."""
    return [axis for dim in dims for axis in dim]


def _moved(parts: dict[Axis, list[Axis]]) -> dict[Axis, Dim]:
    return {axis: tuple(new) for axis, new in parts.items() if new != [axis]}
