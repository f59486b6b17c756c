"""Concatenations: a part of what was put together is that part.

    part_i(cat(a_1, a_2, ...)) = a_i            f(cat(a_1, a_2, ...)) = cat(f(a_1), f(a_2), ...)

for an elementwise f, and for views that keep the joined dimension whole. Statistics are packed into
one tensor to be reduced across processes, and taken apart again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import fx

from .axes import Axis, Dim, Dims, Opaque, align, axes_of
from .calls import arguments_of, dtype_of, name_of, narrows
from .expression import Polynomial
from .parts import SEVERAL, TAKES_APART, parts_of

if TYPE_CHECKING:
    from .meaning import Meaning, Reading

JOINS = ("cat", "concat", "concatenate", "stack")

Rule = Callable[["Reading", fx.Node, dict[str, Any]], Any]


@dataclass(frozen=True)
class Piece:
    """One part: its axes along the joined dimension, its extent there, and its formula."""

    own: Dim
    size: int
    value: Polynomial


@dataclass(frozen=True)
class Joined:
    """Pieces that lie one after the other along one dimension.

    Attributes:
        dims: the dimensions, with ``marker`` alone in the joined one.
        marker: stands for the joined dimension; no formula runs along it.
        pieces: in their order.
    """

    dims: Dims
    marker: Axis
    pieces: tuple[Piece, ...]

    @property
    def at(self) -> int:
        """The joined dimension."""
        return self.dims.index((self.marker,))

    def own_axes(self) -> frozenset[Axis]:
        """The axes of all pieces along the joined dimension."""
        return frozenset(axis for piece in self.pieces for axis in piece.own)


def read_joined(
    reading: Reading, node: fx.Node, rule: Rule | None, *, stopped: bool
) -> Meaning | tuple[Meaning | Joined | None, ...] | None:
    """What a node is of the pieces of a concatenation; packs and keeps them on ``reading``.

    ``rule`` is the meaning of the node's operation, ``stopped`` says that it records no gradient.
    """
    name = name_of(node)
    result: Any = None
    if name in JOINS:
        result = _join(reading, node)
    elif name in TAKES_APART:
        source = arguments_of(node)["self"]
        parts = _taken_apart(node, reading.joined[source]) if source in reading.joined else None
        result = tuple(parts) if parts and name in SEVERAL else parts and parts[0]
    elif name == "getitem":
        whole, position = node.args
        several = reading.outputs.get(whole)  # type: ignore[arg-type]
        result = several[position] if several and name_of(whole) in SEVERAL else None  # type: ignore[arg-type,index]
    elif _is_piecewise(name, rule) and any(n in reading.joined for n in node.all_input_nodes):
        assert rule is not None
        result = _through(reading, node, rule)
    if stopped and result is not None:
        several = result if isinstance(result, tuple) else (result,)
        halted = tuple(_stopped(reading, each) for each in several)
        result = halted if isinstance(result, tuple) else halted[0]
    if isinstance(result, Joined):
        reading.joined[node] = result
        return None
    return result  # type: ignore[no-any-return]


def _is_piecewise(name: str, rule: Rule | None) -> bool:
    """Whether an operation treats each element by itself, or only moves them."""
    from .reductions import REDUCTIONS

    return rule is not None and name not in REDUCTIONS


def _stopped(reading: Reading, value: Meaning | Joined | None) -> Meaning | Joined | None:
    if value is None:
        return None
    stop = reading.ring.stop
    if isinstance(value, Joined):
        return replace(value, pieces=tuple(replace(p, value=stop(p.value)) for p in value.pieces))
    return replace(value, value=stop(value.value))


def _join(reading: Reading, node: fx.Node) -> Joined | None:
    """The pieces of a ``cat`` or ``stack`` that packs statistics."""
    from .meaning import Meaning

    a = arguments_of(node)
    tensors, stacks = a["tensors"], name_of(node) == "stack"
    meanings = [reading.meanings.get(t) for t in tensors]
    known = [m for m in meanings if m is not None]
    rank = len(node.meta["val"].shape)
    if len(known) != len(tensors) or not any(reading.ring.moments(m.value) for m in known):
        return None
    if any(narrows(dtype_of(t), dtype_of(node)) for t in tensors):
        return None
    if any(len(m.dims) != rank - stacks for m in known):
        return None
    at = a["dim"] % rank
    sizes = [1 if stacks else t.meta["val"].shape[at] for t in tensors]
    if not all(isinstance(size, int) for size in sizes):
        return None
    owns, rests = [], []
    for meaning in known:
        dims = list(meaning.dims)
        own = () if stacks else dims.pop(at)
        fresh = tuple(Axis(axis.size) for axis in own)
        moves: dict[Axis, Dim] = {old: (new,) for old, new in zip(own, fresh, strict=True)}
        owns.append(fresh)
        rests.append(Meaning(tuple(dims), reading.ring.substitute(meaning.value, moves)))
    common, values = reading.broadcast(*rests)
    marker = Axis(sum(sizes))
    pieces = tuple(Piece(*each) for each in zip(owns, sizes, values, strict=True))
    return Joined((*common[:at], (marker,), *common[at:]), marker, pieces)


def _taken_apart(node: fx.Node, joined: Joined) -> list[Meaning | Joined | None] | None:
    """What each part is that a slice, a split or an index takes of a concatenation."""
    from .meaning import Meaning

    parts, at = parts_of(node), joined.at
    if parts is None or any(part.dim != at for part in parts):
        return None
    result: list[Meaning | Joined | None] = []
    for part in parts:
        found: list[Piece] = []
        position = 0
        for piece in joined.pieces:
            first, last = max(part.start, position), min(part.stop, position + piece.size)
            if first < last:
                whole = last - first == piece.size
                found.append(Piece(piece.own, last - first, piece.value) if whole or not piece.own
                             else Piece((), 0, piece.value))  # fmt: skip
            position += piece.size
        if any(piece.size == 0 for piece in found):
            result.append(None)
        elif len(found) == 1:
            own = () if part.dropped else (found[0].own,)
            dims = (*joined.dims[:at], *own, *joined.dims[at + 1 :])
            result.append(Meaning(dims, found[0].value))
        else:
            marker = Axis(part.stop - part.start)
            dims = (*joined.dims[:at], (marker,), *joined.dims[at + 1 :])
            result.append(Joined(dims, marker, tuple(found)))
    return result


def _through(reading: Reading, node: fx.Node, rule: Rule) -> Joined | None:
    """The pieces of an elementwise function, or of a view, of concatenations."""
    operands = {n: reading.joined[n] for n in node.all_input_nodes if n in reading.joined}
    first, *others = operands.values()
    if any([p.size for p in o.pieces] != [p.size for p in first.pieces] for o in others):
        return None
    own_axes = frozenset(axis for o in operands.values() for axis in o.own_axes())
    meanings = [reading.meanings.get(n) for n in node.all_input_nodes if n not in operands]
    around = [o.dims for o in operands.values()] + [m.dims for m in meanings if m is not None]
    if any(own_axes & set(axes_of(dims)) for dims in around):
        return None
    marker, dims, pieces = first.marker, None, []
    try:
        for i in range(len(first.pieces)):
            own = max((o.pieces[i].own for o in operands.values()), key=len)
            reading.piece = {n: _piece(reading, o, i, own, marker) for n, o in operands.items()}
            found = rule(reading, node, arguments_of(node))
            if (marker,) not in found.dims or marker in reading.ring.axes(found.value):
                return None
            if dims is None:
                dims = found.dims
            elif dims != found.dims:
                return None
            pieces.append(Piece(own, first.pieces[i].size, found.value))
    except Opaque:
        return None
    finally:
        reading.piece = {}
        reading.sealed.pop(node, None)
    return Joined(dims, marker, tuple(pieces)) if dims else None


def _piece(reading: Reading, joined: Joined, i: int, own: Dim, marker: Axis) -> Meaning:
    """One piece, with the marker of the first operand in the joined dimension."""
    from .meaning import Meaning

    piece = joined.pieces[i]
    moves: dict[Axis, Dim] = {}
    if piece.own and piece.own != own:
        left, moves = align(own, piece.own)
        if left:
            raise Opaque("two concatenations whose parts are cut differently")
    dims = tuple((marker,) if dim == (joined.marker,) else dim for dim in joined.dims)
    return Meaning(dims, reading.ring.substitute(piece.value, moves))
