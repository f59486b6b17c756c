"""Running statistics: the new values of buffers, from the moments that the norm computes anyway.

With M and V of a site,  rm' = (1 - m) rm + m M,  rv' = (1 - m) rv + m V n / (n - 1).

Where a model's buffers follow exactly these, ``batch_norm`` updates them (as copies: a backward
must not see the live buffer change). Any other update of the same moments is written beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from bnrewrite.algebra import Meaning, Reading
from bnrewrite.algebra.axes import Dim, Dims, Opaque, align, axes_of, product
from bnrewrite.algebra.calls import dtype_of, is_tensor, shape_of
from bnrewrite.algebra.expression import (
    ONE,
    Number,
    Polynomial,
    Reduction,
    added,
    factor_of,
    number,
    scaled,
)
from bnrewrite.algebra.match import Match

from .nodes import Unwritable, aten
from .writing import Writing


@dataclass(frozen=True)
class Update:
    """A value that the norm's moments make beside the norm: the new value of a buffer, mostly.

    Attributes:
        buffer: the placeholder that takes the value; None for a value that the graph returns.
        node: the user's new value.
        value: its formula in the axes of the site, gradients left aside.
        dims: the dimensions of the buffer in those axes.
    """

    buffer: fx.Node | None
    node: fx.Node
    value: Polynomial
    dims: Dims


@dataclass
class BatchState:
    """The buffers of one batch norm."""

    updates: list[Update]
    replaced: dict[fx.Node, fx.Node] = field(default_factory=dict)
    _native: tuple[Update, Update, Number | fx.Node] | None = None

    def before(self, writing: Writing, channels: Dims) -> tuple[Any, Any, Any]:
        """The buffers that ``batch_norm`` writes to, and its momentum."""
        emitter = writing.emitter
        self._native = _native_pair(writing, self.updates)
        if self._native is not None:
            mean, variance, momentum = self._native
            copies = [
                emitter.call(aten.clone.default, u.buffer, memory_format=torch.contiguous_format)
                for u in (mean, variance)
            ]
            flat = [emitter.reshape(c, [product(a.size for a in channels[0])]) for c in copies]
            self.replaced[mean.node], self.replaced[variance.node] = copies
            return flat[0], flat[1], momentum
        if not self.updates:
            return None, None, 0.0
        extent = emitter.extent(product(a.size for a in channels[0]))
        source = writing.match.linear.source.meta["val"]
        mean_, variance_ = (
            emitter.call(aten.zeros.default, [extent], dtype=writing.dtype, device=source.device)
            for _ in range(2)
        )
        return mean_, variance_, 1.0

    def after(self, writing: Writing, channels: Dims, mean: Any, variance: Any) -> None:
        """The other updates, from the moments of this batch: n / (n - 1) V and M."""
        if self._native is not None or not self.updates:
            return
        found, ring = writing.match, writing.reading.ring
        count = ring.count(found.over)
        bessel = ring.divide(added(count, number(1), -1), count)
        write_updates(writing, self, mean, variance, channels, bessel)


def write_updates(
    writing: Writing,
    state: BatchState,
    mean: fx.Node,
    variance: fx.Node,
    dims: Dims,
    correction: Polynomial = ONE,
) -> None:
    """New values of buffers.

    Args:
        writing: of the site.
        state: its updates, which are written.
        mean: M along ``dims``.
        variance: a multiple of V, along these too.
        dims: of the two.
        correction: times which it is V.
    """
    found = writing.match
    ((mean_base, _),) = found.moments.mean.terms.items()
    ((square_base, _),) = found.moments.square.terms.items()
    for update in state.updates:
        emitter = writing.along(update.dims)
        emitter.reusable = None  # the user's own update is what this one replaces
        first, second = (
            emitter.place(emitter.call(aten.detach.default, node), dims)
            for node in (mean, variance)
        )
        spread = emitter.times(second, emitter.tensor(correction))
        emitter.given[mean_base[0][0]] = lambda m=first: m  # type: ignore[misc]
        emitter.given[square_base[0][0]] = lambda e=emitter, m=first, v=spread: e.plus(  # type: ignore[misc]
            v, e.power(m, 2)
        )
        emitter.variances.append((found.moments, lambda v=spread: v))  # type: ignore[misc]
        value = emitter.tensor(update.value)
        if not isinstance(value, fx.Node):
            raise Unwritable("a buffer that becomes a constant")
        value = emitter.reshape(value, list(shape_of(update.node)))
        state.replaced[update.node] = writing.cast(value, dtype_of(update.node))


def updates_of(
    reading: Reading, found: Match, candidates: list[tuple[fx.Node | None, fx.Node]]
) -> list[Update]:
    """The buffers whose new value is made of this site's moments.

    Args:
        reading: the meanings of the graph.
        found: the site.
        candidates: (buffer, new value) and (None, returned value), made of moments of its tensor.
    """
    updates = []
    for buffer, node in candidates:
        meaning = meaning_of(reading, node)
        if meaning is None:
            continue
        update = _in_site_axes(reading, found, buffer, node, meaning)
        if update is not None and _only_these_moments(reading, found, update.value):
            updates.append(update)
    return updates


def meaning_of(reading: Reading, node: fx.Node) -> Meaning | None:
    """What a new value of a buffer means, if it is made of tensors that have a formula."""
    meaning = reading.formula(node)
    return None if meaning is None or reading.ring.raw(meaning.value) & reading.anchors else meaning


def _in_site_axes(
    reading: Reading, found: Match, buffer: fx.Node | None, node: fx.Node, meaning: Meaning
) -> Update | None:
    """A buffer's formula with its axes renamed to the site's kept axes, in order."""
    kept: Dim = tuple(a for a in axes_of(found.linear.index) if a not in found.over)
    own: Dim = tuple(axes_of(meaning.dims))
    try:
        left, right = align(kept, own)
    except Opaque:
        return None
    if left:
        return None
    value = reading.ring.attached(reading.ring.substitute(meaning.value, right))
    dims = tuple(tuple(p for a in d for p in right.get(a, (a,))) for d in meaning.dims)
    return Update(buffer, node, value, dims)


def _only_these_moments(reading: Reading, found: Match, value: Polynomial) -> bool:
    """Whether every statistic in a value is E[x] or V of this site."""
    ring = reading.ring
    ((mean, _),) = found.moments.mean.terms.items()
    ((square, _),) = found.moments.square.terms.items()
    lead = factor_of(value, square[0][0])
    if lead.terms:
        value = added(value, ring.multiply(lead, found.moments.variance(ring)), -1)
    for base in value.bases():
        item = ring.bases[base]
        if isinstance(item, Reduction) and base != mean[0][0]:
            return False
        if not isinstance(item, Reduction) and item.moments:
            return False
    return True


def _native_pair(
    writing: Writing, updates: list[Update]
) -> tuple[Update, Update, Number | fx.Node] | None:
    """(running mean, running variance, momentum), where they are exactly ``batch_norm``'s."""
    if len(updates) != 2 or any(
        u.buffer is None or dtype_of(u.buffer) != writing.dtype for u in updates
    ):
        return None
    found, ring = writing.match, writing.reading.ring
    count = ring.count(found.over)
    moments = (
        found.moments.mean,
        ring.multiply(
            found.moments.variance(ring), ring.divide(count, added(count, number(1), -1))
        ),
    )
    for mean, variance in (updates, updates[::-1]):
        first = _momentum(writing, mean, moments[0])
        second = _momentum(writing, variance, moments[1])
        if first is not None and second is not None and _equal(first, second):
            if not isinstance(first, fx.Node) and not 0 <= float(first) <= 1:
                return None
            return mean, variance, first
    return None


def _momentum(writing: Writing, update: Update, statistic: Polynomial) -> Number | fx.Node | None:
    """The m for which the new value is (1 - m) buffer + m statistic."""
    ring = writing.reading.ring
    old = ring.atom(update.buffer, update.dims)
    lead = min(statistic.terms)
    factor = Polynomial(
        {
            tuple(i for i in m if i not in lead): c
            for m, c in update.value.terms.items()
            if set(lead) <= set(m)
        }
    )
    factor = scaled(factor, 1 / statistic.terms[lead] if factor.terms else 1)
    expected = added(
        ring.multiply(added(number(1), factor, -1), old), ring.multiply(factor, statistic)
    )
    if not _close(expected, update.value):
        return None
    if factor.constant is not None:
        return float(factor.constant)
    if ring.axes(factor) or any(is_tensor(s) for s in ring.raw(factor)):
        return None
    written = writing.emitter.tensor(factor)
    return written if isinstance(written, fx.Node) else None


def _close(left: Polynomial, right: Polynomial) -> bool:
    """Equality of updates: (1 - 0.1) is 0.9 up to the last bit."""
    if left.terms.keys() != right.terms.keys():
        return False
    return all(
        math.isclose(float(left.terms[m]), float(right.terms[m]), rel_tol=1e-12) for m in left.terms
    )


def _equal(left: Number | fx.Node, right: Number | fx.Node) -> bool:
    if isinstance(left, fx.Node) or isinstance(right, fx.Node):
        return left is right
    return math.isclose(float(left), float(right), rel_tol=1e-12)
