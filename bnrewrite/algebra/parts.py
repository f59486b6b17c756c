"""Parts of a dimension: which piece of a tensor a slice, a split or an index is."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import fx

from .calls import arguments_of, is_tensor, name_of

SEVERAL = frozenset((
    "split", "split_with_sizes", "chunk", "tensor_split", "unbind", "unsafe_split", "unsafe_chunk",
    "unsafe_split_with_sizes",
))  # fmt: skip
TAKES_APART = SEVERAL | {"slice", "select", "narrow"}


@dataclass(frozen=True)
class Part:
    """``start <= index < stop`` along one dimension, counted from 0; ``dropped``: without it."""

    dim: int
    start: int
    stop: int
    dropped: bool = False


def parts_of(node: fx.Node) -> list[Part] | None:
    """The pieces that a call of ``TAKES_APART`` gives; None where extents are not numbers."""
    a = arguments_of(node)
    source = a.get("self")
    if not is_tensor(source):
        return None
    shape = source.meta["val"].shape
    dim = a.get("dim", 0)
    if not isinstance(dim, int) or not shape:
        return None
    dim %= len(shape)
    extent = shape[dim]
    if not isinstance(extent, int):
        return None
    name = name_of(node)
    if name == "unbind":
        return [Part(dim, i, i + 1, True) for i in range(extent)]
    if name == "select":
        index = a["index"]
        return [Part(dim, index % extent, index % extent + 1, True)] if _is_int(index) else None
    if name == "narrow":
        start, length = a["start"], a["length"]
        if not (_is_int(start) and _is_int(length)):
            return None
        return [Part(dim, start % extent, start % extent + length)] if length else None
    if name == "slice":
        if a["step"] != 1 or any(isinstance(a[k], fx.Node) for k in ("start", "end")):
            return None
        start, stop, _ = slice(a["start"], a["end"]).indices(extent)
        return [Part(dim, start, stop)] if start < stop else None
    result, at = [], 0
    for value in node.meta["val"]:
        size = value.shape[dim]
        if not _is_int(size):
            return None
        result.append(Part(dim, at, at + size))
        at += size
    return result


def part_of(node: fx.Node) -> tuple[fx.Node, Part] | None:
    """The tensor and the piece of it that a node is, in whatever words."""
    if node.target is operator.getitem:
        whole, position = node.args
        if not isinstance(whole, fx.Node) or name_of(whole) not in SEVERAL:
            return None
        parts = parts_of(whole)
        source = arguments_of(whole)["self"]
        return (source, parts[position]) if parts and isinstance(position, int) else None
    if name_of(node) not in TAKES_APART - SEVERAL:
        return None
    parts = parts_of(node)
    return (arguments_of(node)["self"], parts[0]) if parts else None


def _is_int(value: object) -> bool:
    return isinstance(value, int)
