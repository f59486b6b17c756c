"""A named norm as PyTorch's own operation.

Before:  y = any spelling of a norm of the catalogue
After:   y = aten.batch_norm / layer_norm / group_norm / rms_norm of x, seen in that op's layout
Leaves alone: axes that the native op can only reach through a copy (see ``plan``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from bnrewrite.algebra.axes import Dims, axes_of, product
from bnrewrite.algebra.calls import dtype_of
from bnrewrite.algebra.expression import Polynomial
from bnrewrite.algebra.match import Match

from .emitter import Unwritable, aten
from .state import BatchState
from .writing import Writing, flat


def has_native(found: Match) -> bool:
    """Whether a site has a native op in a layout that needs no copy."""
    return found.kind in _WRITERS and found.root_eps is not None and _layout(found) is not None


def write_native(writing: Writing, state: BatchState) -> fx.Node:
    """The nodes of the native lowering; returns the replacement."""
    return _WRITERS[writing.match.kind](writing, state)


def _layout(found: Match) -> Dims | None:
    """The dimensions as the native op wants them, or None."""
    index, over = found.linear.index, found.over
    kind = found.kind
    if kind == "batch_norm":
        return _batch_layout(index, over)
    if kind in ("group_norm", "instance_norm"):
        return index if _is_grouped(index, over) else None
    return _trailing_layout(index, over)


def _batch_layout(index: Dims, over: frozenset[Any]) -> Dims | None:
    """(reduced..., channels..., reduced...) as two to five dimensions with channels second."""
    kept = [i for i, d in enumerate(index) if d and not set(d) & over]
    if kept != list(range(kept[0], kept[-1] + 1)):
        return None
    if kept == [1] and len(index) <= 5:
        return index
    outer, channels, inner = index[: kept[0]], index[kept[0] : kept[-1] + 1], index[kept[-1] + 1 :]
    layout = (*flat(outer), *flat(channels))
    return (*layout, *flat(inner)) if axes_of(inner) else layout


def _is_grouped(index: Dims, over: frozenset[Any]) -> bool:
    """(kept, kept + reduced, reduced...): the layout of ``group_norm``."""
    if len(index) < 2 or set(index[0]) & over:
        return False
    channels = [axis in over for axis in index[1]]
    return channels == sorted(channels) and all(set(d) <= over for d in index[2:])


def _trailing_layout(index: Dims, over: frozenset[Any]) -> Dims | None:
    """(kept..., reduced...): the layout of ``layer_norm`` and ``rms_norm``."""
    split: list[tuple[Any, ...]] = []
    for dim in index:
        inside = [axis in over for axis in dim]
        split += [dim] if all(inside) or not any(inside) else [(axis,) for axis in dim]
    first = next(i for i, d in enumerate(split) if set(d) & over)
    if any(d and not set(d) <= over for d in split[first:]):
        return None
    return tuple(split)


def layout_of(found: Match) -> Dims:
    """The layout of a site that ``has_native``."""
    layout = _layout(found)
    assert layout is not None, "has_native was not asked"
    return layout


def _inputs(writing: Writing, dims: Dims) -> tuple[fx.Node, Any, Any]:
    """x, weight and bias in one dtype: the result's, or the one that the user computes in."""
    found = writing.match
    source = found.linear.source
    ring = writing.reading.ring
    stored = (ring.raw(found.weight) | ring.raw(found.bias)) - {source}
    dtypes = {dtype_of(n) for n in stored if isinstance(n, fx.Node)} | {dtype_of(source)}
    if dtypes == {writing.result_dtype}:
        writing.dtype = writing.result_dtype
    weight = writing.vector(found.weight, dims, 1, writing.dtype)
    bias = writing.vector(found.bias, dims, 0, writing.dtype)
    return writing.input(), weight, bias


def _eps(writing: Writing) -> Any:
    assert writing.match.root_eps is not None
    return writing.emitter.tensor(writing.match.root_eps)


def _batch(writing: Writing, state: BatchState) -> fx.Node:
    found = writing.match
    channels = flat(tuple(tuple(a for a in d if a not in found.over) for d in writing.layout))
    x, weight, bias = _inputs(writing, channels)
    mean, variance, momentum = state.before(writing, channels)
    y = writing.emitter.call(
        aten.batch_norm.default,
        x,
        weight,
        bias,
        mean,
        variance,
        True,
        momentum,
        _eps(writing),
        True,
    )
    state.after(writing, channels, mean, variance)
    return writing.finish(y)


def _group(writing: Writing, state: BatchState) -> fx.Node:
    found = writing.match
    channels = writing.layout[1]
    x, weight, bias = _inputs(writing, (channels,))
    groups = writing.emitter.extent(product(a.size for a in channels if a not in found.over))
    y = writing.emitter.call(aten.group_norm.default, x, groups, weight, bias, _eps(writing), True)
    return writing.finish(y)


def _layer(writing: Writing, state: BatchState) -> fx.Node:
    dims = writing.layout[writing.reduced[0] :]
    x, weight, bias = _inputs(writing, dims)
    shape = [writing.emitter.extent(product(a.size for a in d)) for d in dims]
    y = writing.emitter.call(aten.layer_norm.default, x, shape, weight, bias, _eps(writing), True)
    return writing.finish(y)


def _rms(writing: Writing, state: BatchState) -> fx.Node:
    found, ring = writing.match, writing.reading.ring
    dims = writing.layout[writing.reduced[0] :]
    inside = ring.axes(found.weight) <= found.over and found.weight.constant is None
    x, weight, _ = _inputs(writing, dims if inside else writing.layout)
    shape = [writing.emitter.extent(product(a.size for a in d)) for d in dims]
    y = writing.emitter.call(
        aten.rms_norm.default, x, shape, weight if inside else None, _eps(writing)
    )
    emitter = writing.emitter
    factor = Polynomial({(): 1}) if inside else found.weight
    return writing.finish(
        emitter.plus(emitter.times(y, emitter.tensor(factor)), emitter.tensor(found.bias))
    )


_WRITERS: dict[str, Callable[[Writing, BatchState], fx.Node]] = {
    "batch_norm": _batch, "group_norm": _group, "instance_norm": _group,
    "layer_norm": _layer, "weight_standardization": _layer, "rms_norm": _rms,
}  # fmt: skip

__all__ = ["Unwritable", "has_native", "layout_of", "write_native"]
