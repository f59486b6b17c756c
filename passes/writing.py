"""What every lowering needs: the norm's input in a layout, its moments, and the way back."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from bnrewrite.algebra import Match, Reading, chain
from bnrewrite.algebra.anchors import REDUCTIONS
from bnrewrite.algebra.axes import Dims, Size, axes_of, product, size_of
from bnrewrite.algebra.calls import CASTS, arguments_of, dtype_of, is_tensor, name_of
from bnrewrite.algebra.expression import Polynomial
from bnrewrite.algebra.site import Moments

from .costs import has_fast_norm, may_choose_norm
from .emitter import Emitter, Reusable, Unit
from .nodes import Sizes, Unwritable, Value, aten, current, split_layout


class Writing:
    """Writes the replacement of one site.

    Args:
        in_place: the stage after runs the graph as it is: new tensors may be updated in place.
        layout: dimensions of the input as the lowering wants them; by default the input's own,
            split where the reduction cuts a dimension.
    """

    def __init__(
        self,
        reading: Reading,
        match: Match,
        reusable: Reusable,
        sizes: Sizes,
        layout: Dims | None = None,
        *,
        in_place: bool = False,
    ) -> None:
        self.in_place = in_place
        self.replaced = match.node
        self.match = match
        self.reading = reading
        self.layout = layout or split_layout(match.linear.index, match.over)
        self.result_dtype = dtype_of(match.node)
        self.dtype = compute_dtype(reading, match)
        self.emitter = Emitter(reading, match.node, self.layout, self.dtype, reusable, dict(sizes))
        self.emitter.copies = in_place
        self.emitter.sizes_of(match.linear.source)
        self._moments: dict[bool, tuple[fx.Node, fx.Node]] = {}
        self._square: dict[bool, fx.Node] = {}
        self._written: dict[str, fx.Node] = {}
        self._input: fx.Node | None = None
        self._give_all()

    @property
    def has_fast_norm(self) -> bool:
        """Whether norms of the input are made by ``vector_norm``."""
        return has_fast_norm(self.reading, self.match, eager=self.in_place)

    def measure(self) -> None:
        """Let the emitter write norms of the input from a ``vector_norm`` or a sum of squares."""
        found, ring = self.match, self.reading.ring
        count = ring.count(found.over).constant
        if count is None or not found.over:
            return
        x = ring.atom(found.linear.source, found.linear.index)
        magnitude = ring.absolute(x)
        n = float(count)
        root, square = (self._norm_of(2), n**-0.5, 1), (self._squares, 1 / n, 1)
        if self.has_fast_norm:
            square = (self._norm_of(2), n**-0.5, 2)
        elif self.in_place and may_choose_norm(self.reading, found):
            root = (self._root_of_squares, n**-0.5, 1)
        units: list[tuple[Polynomial, Unit]] = [
            (ring.root(found.moments.square), root),
            (found.moments.square, square),
            (ring.mean(magnitude, found.over), (self._norm_of(1), 1 / n, 1)),
            (ring.maximum_over(magnitude, found.over), (self._norm_of(math.inf), 1.0, 1)),
        ]
        for value, unit in units:
            self.emitter.units[value.bases().pop()] = unit

    def _norm_of(self, order: float) -> Callable[[], fx.Node]:
        return lambda: self._norm(order)

    def _root_of_squares(self) -> fx.Node:
        if "root" not in self._written:
            self._written["root"] = self.emitter.call(aten.sqrt.default, self._squares())
        return self._written["root"]

    def _norm(self, order: float) -> fx.Node:
        key = f"norm {order}"
        if key not in self._written:
            self._written[key] = self.emitter.call(
                aten.linalg_vector_norm.default, self.input(), order, self.reduced, True
            )
        return self._written[key]

    def _squares(self) -> fx.Node:
        if "squares" not in self._written:
            x = self.input()
            squares = self.emitter.call(aten.mul.Tensor, x, x)
            self._written["squares"] = self.emitter.call(
                aten.sum.dim_IntList, squares, self.reduced, True
            )
        return self._written["squares"]

    def _give_all(self) -> None:
        """Let the emitter write the moments of the site, with and without a gradient."""
        moments, stop = self.match.moments, self.reading.ring.stop
        if self.match.over:
            self._give(moments, stopped=False)
            stopped = Moments(stop(moments.mean), stop(moments.square))
            if stopped != moments:
                self._give(stopped, stopped=True)

    def _give(self, moments: Moments, *, stopped: bool) -> None:
        """Let the emitter write these moments from one ``var_mean``."""
        ((mean, _),) = moments.mean.terms.items()
        ((square, _),) = moments.square.terms.items()
        self.emitter.given[mean[0][0]] = lambda: self.moments(stopped)[1]
        self.emitter.given[square[0][0]] = lambda: self.square(stopped)
        self.emitter.variances.append((moments, lambda: self.moments(stopped)[0]))

    @property
    def reduced(self) -> list[int]:
        """The dimensions of the layout that are reduced."""
        return [i for i, dim in enumerate(self.layout) if set(dim) & self.match.over]

    def input(self) -> fx.Node:
        """The normalised tensor in the layout and in the dtype that the user computes in."""
        if self._input is None:
            node = current(self.match.linear.source)
            self._input = self.emitter.place(self.cast(node, self.dtype), self.match.linear.index)
        return self._input

    @property
    def has_moments(self) -> bool:
        """Whether V and E[x] are written already."""
        return bool(self._moments)

    def moments(self, stopped: bool = False) -> tuple[fx.Node, fx.Node]:
        """V and E[x] in the layout; ``stopped``: without a gradient."""
        if stopped not in self._moments:
            x = self._read(stopped)
            both = self.emitter.call(
                aten.var_mean.correction, x, self.reduced, correction=0, keepdim=True
            )
            first, second = self.emitter.items(both, 2)
            self._moments[stopped] = first, second
        return self._moments[stopped]

    def square(self, stopped: bool = False) -> fx.Node:
        """E[x^2] in the layout."""
        if stopped not in self._square:
            x = self._read(stopped)
            squares = self.emitter.call(aten.mul.Tensor, x, x)
            self._square[stopped] = self.emitter.call(aten.mean.dim, squares, self.reduced, True)
        return self._square[stopped]

    def _read(self, stopped: bool) -> fx.Node:
        x = self.input()
        return self.emitter.call(aten.detach.default, x) if stopped else x

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """A node in a dtype."""
        if dtype_of(node) == dtype:
            return node
        return self.emitter.call(aten.to.dtype, node, dtype)

    def along(self, dims: Dims) -> Emitter:
        """An emitter for tensors that run along some of the axes only."""
        reusable, sizes = self.emitter.reusable, self.emitter.sizes
        emitter = Emitter(self.reading, self.match.node, dims, self.dtype, reusable, sizes)
        emitter.copies = self.in_place
        return emitter

    def vector(self, value: Polynomial, dims: Dims, neutral: int, dtype: torch.dtype) -> Any:
        """A weight or bias of exactly the shape of ``dims``; None where it is neutral."""
        if value.constant == neutral:
            return None
        shape: list[Size] = [product(a.size for a in dim) for dim in dims]
        runs = self.reading.ring.axes(value)
        cut = any(set(dim) & runs and not set(dim) <= runs for dim in dims)
        emitter = self.along(tuple((axis,) for axis in axes_of(dims)) if cut else dims)
        written = emitter.tensor(value)
        extents = [emitter.extent(s) for s in shape]
        if not isinstance(written, fx.Node) or not is_tensor(written):
            device = self.match.linear.source.meta["val"].device
            return emitter.call(aten.full.default, extents, written, dtype=dtype, device=device)
        if cut:  # one entry per group: repeated for each of its channels
            sizes = [emitter.extent(axis.size) for axis in axes_of(dims)]
            expanded = emitter.call(aten.expand.default, written, sizes)
            written = emitter.reshape(expanded, shape)
        elif [size_of(s) for s in written.meta["val"].shape] != shape:
            written = emitter.call(aten.expand.default, written, extents)
        written = self.cast(written, dtype)
        if not written.meta["val"].is_contiguous():  # native backwards read weights as dense
            written = emitter.call(aten.contiguous.default, written)
        return written

    def finish(self, value: Value, dims: Dims | None = None) -> fx.Node:
        """The replacement: the shape, dtype, strides and gradient of what is replaced."""
        if not isinstance(value, fx.Node):
            raise Unwritable("a norm that is a constant")
        linear = self.match.linear
        node = self.emitter.place(value, dims or self.layout, linear.dims)
        node = self.cast(node, self.result_dtype)
        node = self._with_strides(self._expanded(node))
        if linear.detached:
            node = self.emitter.call(aten.detach.default, node)
        before, after = self.replaced.meta["val"], node.meta["val"]
        shapes = [[size_of(s) for s in v.shape] for v in (before, after)]
        if shapes[0] != shapes[1] or before.dtype != after.dtype or before.device != after.device:
            raise Unwritable(
                f"the replacement is {after.dtype} {shapes[1]}, the original "
                f"{before.dtype} {shapes[0]}"
            )
        return node

    def _expanded(self, node: fx.Node) -> fx.Node:
        """As many copies as the user normalises: a norm of copies is copies of the norm."""
        shape = [size_of(s) for s in self.replaced.meta["val"].shape]
        if all(dim or size == 1 for dim, size in zip(self.match.linear.dims, shape, strict=True)):
            return node
        extents = [self.emitter.extent(size) for size in shape]
        return self.emitter.call(aten.expand.default, node, extents)

    def _with_strides(self, node: fx.Node) -> fx.Node:
        """The user's memory layout: what comes after may rely on it."""
        wanted, found = self.replaced.meta["val"], node.meta["val"]
        if _strides(wanted) == _strides(found):
            return node
        order = sorted(range(wanted.dim()), key=lambda d: -hint(wanted.stride(d)))
        if order == sorted(order):
            return self.emitter.call(aten.contiguous.default, node)
        node = self.emitter.call(aten.permute.default, node, order)
        node = self.emitter.call(aten.contiguous.default, node)
        back = [order.index(d) for d in range(wanted.dim())]
        return self.emitter.call(aten.permute.default, node, back)


def compute_dtype(reading: Reading, found: Match) -> torch.dtype:
    """The dtype that the user computes a site in: before a cast at its end, that of its statistics.

    Half-precision code that takes its statistics in float32 is computed in float32.
    """
    node = found.node
    if node in reading.sealed and name_of(node) in CASTS:
        node = arguments_of(node)["self"]
    dtype = dtype_of(node)
    for each in chain(reading, found):
        if name_of(each) in REDUCTIONS and is_tensor(each):
            dtype = torch.promote_types(dtype, dtype_of(each))
    return dtype


def hint(stride: int | torch.SymInt) -> int:
    """A stride as a number, by its example where it is symbolic."""
    return int(stride.node.hint) if isinstance(stride, torch.SymInt) else stride


def _strides(value: torch.Tensor) -> list[Size]:
    pairs = zip(value.stride(), value.shape, strict=True)
    return [size_of(st) for st, s in pairs if size_of(s) != 1]  # no guard on a symbolic size


def flat(dims: Dims) -> Dims:
    """All axes in one dimension."""
    return (tuple(axes_of(dims)),)
