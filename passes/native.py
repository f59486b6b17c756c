"""A named norm as PyTorch's own operation.

Before:  y = any spelling of a norm with a name
After:   y = aten.batch_norm / layer_norm / group_norm / rms_norm of x, seen in that op's layout
Leaves alone: norms that the native op would have to see through two copies and gain nothing.

Axes in another order are permuted: measured on a CPU (16x96x56x56 float32, two threads), a layer
norm over the channels takes 60 ms forward and backward with both copies, as moments and a
multiply-add 190 ms, written by hand 270 ms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from bnrewrite.algebra.axes import Dims, axes_of, product
from bnrewrite.algebra.calls import dtype_of, is_tensor
from bnrewrite.algebra.expression import ONE, ZERO, Polynomial
from bnrewrite.algebra.match import Match
from bnrewrite.algebra.meaning import Reading
from bnrewrite.kernels import batch_norm, group_norm, has_dense_channels, layer_norm

from .frozen import frozen_layout, write_frozen
from .nodes import Value, aten
from .state import BatchState
from .writing import Writing, flat


def has_native(reading: Reading, found: Match) -> bool:
    """Whether a site has a native op in a layout that needs no copy."""
    if found.kind == "affine":
        return frozen_layout(reading, found) is not None
    if found.kind == "batch_norm" and found.root_eps == ZERO:
        return False  # ATen's makes 0 of a constant channel, where 0 / 0 is NaN
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
        return _grouped_layout(index, over)
    return _trailing_layout(index, over, permute=kind != "rms_norm")


def _batch_layout(index: Dims, over: frozenset[Any]) -> Dims | None:
    """(reduced..., channels..., reduced...) as two to five dimensions with channels second."""
    kept = [i for i, d in enumerate(index) if d and not set(d) & over]
    if kept == [1] and len(index) <= 5:
        return index
    if kept != list(range(kept[0], kept[-1] + 1)):
        return None
    outer, channels, inner = index[: kept[0]], index[kept[0] : kept[-1] + 1], index[kept[-1] + 1 :]
    if not axes_of(outer):
        outer, inner = inner, ()
    layout = (*flat(outer), *flat(channels))
    return (*layout, *flat(inner)) if axes_of(inner) else layout


def _grouped_layout(index: Dims, over: frozenset[Any]) -> Dims | None:
    """(kept, kept + reduced, reduced...): the layout of ``group_norm``, permuted where needed."""
    if len(index) < 2 or set(index[0]) & over:
        return None
    rest = list(index[1:])
    channels = [d for d in rest if not set(d) <= over]
    if len(channels) > 1:
        return None
    channel = channels[0] if channels else rest[0]
    inside = [axis in over for axis in channel]
    if inside != sorted(inside):
        return None
    rest.remove(channel)
    return (index[0], channel, *(d for d in rest if d))


def _trailing_layout(index: Dims, over: frozenset[Any], *, permute: bool) -> Dims | None:
    """(kept..., reduced...): the layout of ``layer_norm`` and ``rms_norm``."""
    split: list[tuple[Any, ...]] = []
    for dim in index:
        inside = [axis in over for axis in dim]
        split += [dim] if all(inside) or not any(inside) else [(axis,) for axis in dim]
    reduced = [d for d in split if set(d) & over]
    first = next(i for i, d in enumerate(split) if set(d) & over)
    if all(set(d) <= over for d in split[first:]):
        return tuple(split)
    return (*(d for d in split if not set(d) & over), *reduced) if permute else None


def layout_of(reading: Reading, found: Match) -> Dims:
    """The layout of a site that ``has_native``."""
    layout = frozen_layout(reading, found) if found.kind == "affine" else _layout(found)
    assert layout is not None, "has_native was not asked"
    return layout


def _inputs(writing: Writing, dims: Dims) -> tuple[fx.Node, Any, Any]:
    """x, weight and bias in one dtype: the result's, or the one that the user computes in."""
    found = writing.match
    source = found.linear.source
    ring = writing.reading.ring
    stored = (ring.raw(found.weight) | ring.raw(found.bias)) - {source}
    dtypes = {dtype_of(n) for n in stored if is_tensor(n)} | {dtype_of(source)}
    plain = all(_is_plain(v) for v in (found.weight, found.bias))
    if dtypes == {writing.result_dtype} and plain and found.kind != "batch_norm":
        writing.dtype = writing.result_dtype
    if found.kind == "batch_norm" and writing.dtype != torch.float64:
        writing.dtype = torch.float32
    weight = writing.vector(found.weight, dims, 1, writing.dtype)
    bias = writing.vector(found.bias, dims, 0, writing.dtype)
    if weight is None and bias is not None:  # second derivatives are not made for a bias alone
        weight = writing.emitter.call(aten.ones_like.default, bias)
    return writing.input(), weight, bias


def _is_plain(value: Polynomial) -> bool:
    """A parameter as it is, or a number: nothing is computed, so nothing is rounded."""
    return value.constant is not None or (
        len(value.terms) == 1
        and value.terms.get(next(iter(value.terms))) == 1
        and len(next(iter(value.terms))) == 1
    )


def _eps(writing: Writing) -> Any:
    assert writing.match.root_eps is not None
    return writing.emitter.tensor(writing.match.root_eps)


def _batch(writing: Writing, state: BatchState) -> fx.Node:
    found = writing.match
    channels = flat(tuple(tuple(a for a in d if a not in found.over) for d in writing.layout))
    x, weight, bias = _inputs(writing, channels)
    mean, variance, momentum = state.before(writing, channels)
    given = (x, weight, bias, mean, variance)
    if writing.in_place:
        y = writing.emitter.call(batch_norm, *given, momentum, _eps(writing))
    else:
        native = aten.batch_norm.default
        y = writing.emitter.call(native, *given, True, momentum, _eps(writing), True)
    if not (x.meta["val"].is_contiguous() or has_dense_channels(x.meta["val"])):
        y.meta["val"] = y.meta["val"].contiguous()  # what it is, and its fake is not
    state.after(writing, channels, mean, variance)
    return writing.finish(y)


def _group(writing: Writing, state: BatchState) -> fx.Node:
    found = writing.match
    channels = writing.layout[1]
    x, weight, bias = _inputs(writing, (channels,))
    groups = writing.emitter.extent(product(a.size for a in channels if a not in found.over))
    given = (x, groups, weight, bias, _eps(writing))
    if writing.in_place and has_dense_channels(x.meta["val"]):
        return writing.finish(writing.emitter.call(group_norm, *given))
    return writing.finish(writing.emitter.call(aten.group_norm.default, *given, True))


def _layer(writing: Writing, state: BatchState) -> fx.Node:
    found, ring = writing.match, writing.reading.ring
    dims = writing.layout[writing.reduced[0] :]
    inside = ring.axes(found.weight) | ring.axes(found.bias) <= found.over
    x, weight, bias = _inputs(writing, dims) if inside else (writing.input(), None, None)
    shape = [writing.emitter.extent(product(a.size for a in d)) for d in dims]
    given = (x, shape, weight, bias, _eps(writing))
    if writing.in_place:
        y = writing.emitter.call(layer_norm, *given)
    else:
        y = writing.emitter.call(aten.layer_norm.default, *given, True)
    return writing.finish(y) if inside else writing.finish(_after(writing, y, found.weight))


def _rms(writing: Writing, state: BatchState) -> fx.Node:
    found, ring = writing.match, writing.reading.ring
    dims = writing.layout[writing.reduced[0] :]
    inside = ring.axes(found.weight) <= found.over and found.weight.constant is None
    x, weight, _ = _inputs(writing, dims) if inside else (writing.input(), None, None)
    shape = [writing.emitter.extent(product(a.size for a in d)) for d in dims]
    y = writing.emitter.call(aten.rms_norm.default, x, shape, weight, _eps(writing))
    return writing.finish(_after(writing, y, ONE if inside else found.weight))


def _affine(writing: Writing, state: BatchState) -> fx.Node:
    return write_frozen(writing)


def _after(writing: Writing, y: fx.Node, weight: Polynomial) -> Value:
    """An affine along axes that the native op's own does not have."""
    emitter = writing.emitter
    scaled = emitter.times(y, emitter.tensor(weight))
    return emitter.plus(scaled, emitter.tensor(writing.match.bias))


_WRITERS: dict[str, Callable[[Writing, BatchState], fx.Node]] = {
    "affine": _affine, "batch_norm": _batch, "group_norm": _group, "instance_norm": _group,
    "layer_norm": _layer, "weight_standardization": _layer, "rms_norm": _rms,
}  # fmt: skip
