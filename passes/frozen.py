"""A norm with stored statistics as ``batch_norm`` in evaluation.

Before:  y = any spelling of (x - m) (v + eps)^(-1/2) w + b, with m and v stored along channels
After:   y = batch_norm(x, w, b, m, v, training=False), where digits allow
Leaves alone: statistics that are differentiated, and scales of another form.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from bnrewrite.algebra import Match, Reading, centre
from bnrewrite.algebra.axes import Axis, Dims, axes_of
from bnrewrite.algebra.calls import dtype_of, shape_of
from bnrewrite.algebra.expression import Atom, Polynomial
from bnrewrite.algebra.frozen import frozen
from bnrewrite.algebra.site import Linear
from bnrewrite.kernels import frozen_batch_norm
from bnrewrite.kernels.frozen import is_small

from .nodes import aten
from .writing import Writing, compute_dtype, flat


def frozen_layout(reading: Reading, found: Match) -> Dims | None:
    """The dimensions of x as ``batch_norm`` wants them, where it computes this formula."""
    ring, linear = reading.ring, found.linear
    if compute_dtype(reading, found) not in (torch.float32, torch.float64):
        return None
    if frozen(ring, linear) is None:
        return None
    return _layout(linear, ring.axes(linear.scale) | ring.axes(linear.shift))


def has_small_means(reading: Reading, found: Match) -> bool:
    """Whether the stored values are known and ``x a + b`` loses no digits with them."""
    parts = frozen(reading.ring, found.linear)
    if parts is None:
        return False
    values = [_value(atom.source) for atom in (parts.mean, parts.variance)]
    if any(value is None or value.numel() != values[0].numel() for value in values):
        return False
    mean, variance = (value.detach().cpu().reshape(-1).double() for value in values)
    return is_small(mean, variance, float(parts.eps))


def _value(source: object) -> Any:
    """The tensor behind a placeholder, where a front end that exports has left it there."""
    return source.meta.get("value") if isinstance(source, fx.Node) else None


def write_frozen(writing: Writing) -> fx.Node:
    """The nodes of the lowering; returns the replacement."""
    parts = frozen(writing.reading.ring, writing.match.linear)
    assert parts is not None, "frozen_layout was not asked"
    channels = (writing.layout[1],)
    weight = writing.vector(parts.weight, channels, 1, writing.dtype)
    bias = writing.vector(parts.bias, channels, 0, writing.dtype)
    reading, found = writing.reading, writing.match
    looks = centre(reading, found) is not None and not has_small_means(reading, found)
    mean, variance = (
        _statistic(writing, atom, channels, as_stored=looks)
        for atom in (parts.mean, parts.variance)
    )
    given = (writing.input(), weight, bias, mean, variance)
    eps = float(parts.eps)
    if looks:
        return writing.finish(writing.emitter.call(frozen_batch_norm, *given, eps))
    y = writing.emitter.call(aten.batch_norm.default, *given, False, 0.0, eps, True)
    return writing.finish(y)


def _layout(linear: Linear, axes: frozenset[Axis]) -> Dims | None:
    """(N, C, ...) with all of ``axes`` in C, by views alone of a tensor that is dense in it."""
    index, x = linear.index, linear.source.meta["val"]
    cut = [i for i, dim in enumerate(index) if set(dim) & axes]
    if not cut or any(not set(index[i]) <= axes for i in cut):
        return None
    if cut == [1] and len(index) == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return index
    if cut == [1] and len(index) <= 5 and x.is_contiguous():
        return index
    if cut != list(range(cut[0], cut[-1] + 1)) or not x.is_contiguous():
        return None
    outer, inner = index[: cut[0]], index[cut[-1] + 1 :]
    layout = (tuple(axes_of(outer)), *flat(index[cut[0] : cut[-1] + 1]))
    return (*layout, *flat(inner)) if axes_of(inner) else layout


def _statistic(writing: Writing, atom: Atom, channels: Dims, *, as_stored: bool) -> fx.Node:
    """A stored tensor as a vector along the channels, or itself where its elements are that."""
    node = atom.source
    assert isinstance(node, fx.Node)
    same = axes_of(atom.index) == axes_of(channels) and dtype_of(node) == writing.dtype
    same = same and not atom.stopped  # it has a gradient, which the operator refuses
    expanded = any(not d and s != 1 for d, s in zip(atom.index, shape_of(node), strict=True))
    if as_stored and same and not expanded and node.meta["val"].is_contiguous():
        return node
    value = Polynomial({((atom.id, 1),): 1})
    vector: fx.Node = writing.vector(value, channels, 2, writing.dtype)
    return vector
