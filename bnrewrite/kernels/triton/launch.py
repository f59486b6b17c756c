"""Runs the kernels of a program on tensors: memory, grids, and sums of what programs leave.

Nothing here looks at a value or waits for the device: what is launched depends on shapes alone, so
a CUDA graph may hold it, and a tracer may follow it with symbolic sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.library import wrap_triton

from ..generated.arranged import (
    FLOATING,
    Order,
    back,
    dense,
    dtype_of_moments,
    fits,
    like,
    order_of,
    order_of_groups,
)
from ..generated.check import check_program
from ..generated.layout import arrange
from ..generated.program import parse
from ..generated.record import PLAIN
from .compiled import kernel
from .forward import given
from .means import runs
from .source import Tiled
from .tiles import MeanTile, Tile, tile, tiles_of_means

LARGEST = 2**31 - 1  # the elements that 32 bits count
FORWARD = {True: ("forward",), False: ("forward_moments", "forward_apply")}
BACKWARD = {True: ("backward",), False: ("backward_sums", "backward_apply")}
MOST = 4096  # kinds of tensors that are remembered
PROCESSORS = 132  # of a device that is not there: a fake tensor's


@dataclass(frozen=True)
class Launch:
    """How a program runs on tensors of one kind.

    Attributes:
        tiled: what its kernels are printed from.
        lengths: of its loops.
        sizes: of its axes.
        forward, backward: the tiles.
        means: those of the means over groups, of the forward and of the backward.
        single: the dtype that is computed in.
        moments: that of the moments.
        result: the dtype of y.
        kernels: by their names.
    """

    tiled: Tiled
    lengths: tuple[Any, ...]
    sizes: dict[str, Any]
    forward: Tile
    backward: Tile
    means: tuple[list[MeanTile], list[MeanTile]]
    single: torch.dtype
    moments: torch.dtype
    result: torch.dtype
    kernels: dict[str, Any]

    @property
    def groups(self) -> Any:
        """How many groups there are."""
        return math.prod(self.lengths[i] for i in self.tiled.groups)

    def order(self, number: int) -> Order | None:
        """How a tensor of the program is permuted to the order of the loops."""
        tiled = self.tiled
        return order_of(tiled.program.tensors[number], tiled.layout.order(number), self.sizes)

    def ordered(self, number: int, tensor: Tensor) -> Tensor:
        """A tensor of the program in the order of the loops."""
        return dense(tensor, self.order(number))

    def along(self, loops: Sequence[int]) -> list[Any]:
        """The lengths of some loops."""
        return [self.lengths[i] for i in loops]

    @property
    def saved(self) -> Any:
        """How many numbers a backward has of the forward: moments, and what is behind them."""
        tiled = self.tiled
        behind = self.averages(len(tiled.averages)) if tiled.averages else 0
        coefficients = len(tiled.source.names()) if tiled.averages else 0
        return (tiled.moments + coefficients) * self.groups + behind

    def averages(self, count: int) -> Any:
        """How many numbers the first means over groups have."""
        return sum(math.prod(self.along(runs(self.tiled, k))) for k in range(count))

    def run(
        self, name: str, programs: Any, tile: Tile | MeanTile, *arguments: Any, parts: bool
    ) -> None:
        """Launch a kernel."""
        made = self.kernels[name]
        if _is_interpreted(made) and any(isinstance(each, FakeTensor) for each in arguments):
            return  # an interpreter has no numbers to work on
        extents = [self.sizes[str(symbol)[1:]] for symbol in self.tiled.extents]
        constants = tile.sizes | ({"P": tile.most_parts} if parts else {})
        watched = torch._C._len_torch_dispatch_stack() > 0 or type(arguments[0]) not in PLAIN
        target = wrap_triton(made) if watched else made  # what can be traced takes 1 ms more
        target[(programs,)](*arguments, *self.lengths, *extents, **constants, num_warps=tile.warps)


def _is_interpreted(made: Any) -> bool:
    return type(made).__name__ == "InterpretedFunction"


def launch_of(text: str, x: Tensor, tensors: Sequence[Tensor]) -> Launch | None:
    """How a program runs on tensors; None where torch's operations stand in for it.

    Args:
        text: the program.
        x: dense in memory.
        tensors: of the program, and the residual.

    Raises:
        Unprintable: the formula has no kernel.
    """
    dtypes = tuple(t.dtype for t in tensors)
    shapes = tuple(tuple(t.shape) for t in tensors)
    key = (text, tuple(x.shape), x.stride(), x.dtype, dtypes, shapes, x.device)
    if all(isinstance(n, int) for shape in (key[1], key[2], *shapes) for n in shape):
        return _remembered(*key)
    return _launch_of(*key)


def _launch_of(
    text: str, shape: Any, strides: Any, dtype: Any, dtypes: Any, shapes: Any, device: Any
) -> Launch | None:
    program = parse(text)
    if any(each not in FLOATING for each in (dtype, *dtypes)) or math.prod(shape) == 0:
        return None
    if check_program(text) is not None:
        return None
    if not fits(program, shape, shapes):
        return None
    arranged = arrange(program, shape, strides)
    if arranged is None:
        return None
    layout, lengths = arranged
    count = math.prod(shape)
    single = dtype_of_moments(program, dtype, dtypes)
    tiled = Tiled(
        text=text,
        layout=type(layout)(layout.loops, 0),
        fixed=frozenset(i for i, n in enumerate(lengths) if i and isinstance(n, int)),
        single=str(single).removeprefix("torch."),
        wide=not isinstance(count, int) or count > LARGEST,
    )
    itemsize = dtype.itemsize
    processors = _processors(device)
    tiles = [tile(tiled, lengths, itemsize, processors, backward=b) for b in (False, True)]
    before, after = tiles
    if before is None or after is None:
        return None
    means = (
        tiles_of_means(tiled, lengths, before.most_parts, backward=False),
        tiles_of_means(tiled, lengths, after.most_parts, backward=True),
    )
    names = [*FORWARD[before.whole], *BACKWARD[after.whole]]
    names += [each.name for some in means for each in some]
    return Launch(
        tiled=tiled,
        lengths=tuple(lengths),
        sizes=program.axis_sizes(shape),
        forward=before,
        backward=after,
        means=means,
        single=single,
        moments=getattr(torch, tiled.of_parts),
        result=program.dtype or dtype,
        kernels={  # printed now, so that what cannot be is known before anything runs
            name: kernel(tiled, name) for name in names
        },
    )


_remembered = lru_cache(MOST)(_launch_of)


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda" or not torch.cuda.is_available():
        return PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def run_forward(
    launch: Launch, x: Tensor, tensors: Sequence[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """``y``, the moments with the means over groups behind them, and the updates."""
    cut, program = launch.forward, launch.tiled.program
    count = len(program.tensors)
    residual = [like(tensors[count], x)] if program.residual else []
    y = torch.empty_like(x, dtype=launch.result)
    moments = x.new_empty(launch.saved, dtype=launch.moments)
    updates = [x.new_empty(launch.groups, dtype=launch.single) for _ in program.updates]
    ordered = [launch.ordered(i, t) for i, t in enumerate(tensors[:count])]
    pointers = [x, *residual, y, moments, *updates]
    assert len(pointers) + count == len(given(program))
    blocks = -(-launch.groups // cut.groups)
    if cut.whole:
        launch.run("forward", blocks, cut, *pointers, *ordered, parts=False)
    else:
        parts = (cut.steps, cut.parts, cut.parts_e)
        shape = (launch.tiled.moments, cut.parts, launch.groups)
        partial = list(x.new_empty(shape, dtype=launch.moments).unbind())
        launch.run("forward_moments", blocks * cut.parts, cut, x, *partial, *parts, parts=False)
        pointers += [*partial, *ordered]
        if program.means:
            _average(launch, partial, moments, updates, ordered)
            pointers = [x, *residual, y, moments]
        launch.run("forward_apply", blocks * cut.parts, cut, *pointers, *parts, parts=True)
    sizes, places = order_of_groups(program, launch.tiled.layout, launch.sizes)
    return y, moments, [update.view(sizes).permute(places) for update in updates]


def run_backward(
    launch: Launch,
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    moments: Tensor,
    tensors: Sequence[Tensor],
) -> tuple[Tensor, Tensor | None, dict[int, Tensor]]:
    """The gradients of x, of the residual, and of the free tensors.

    Args:
        launch: made for these.
        dy: the cotangent of y.
        x: dense in memory.
        y: where the activation is behind a residual.
        moments: of the forward.
        tensors: of the program.
    """
    tiled, cut, program = launch.tiled, launch.backward, launch.tiled.program
    dx = torch.empty_like(x)
    dresidual = torch.empty_like(x) if program.residual else None
    firm = [] if program.means else [launch.ordered(i, tensors[i]) for i in tiled.read]
    before = [like(dy, x), x, *([] if y is None else [y]), moments]
    extra = [] if dresidual is None else [dresidual]
    own = [_of_groups(launch, x, i, tensors[i]) for i in tiled.gradients.groups]
    lanes = math.prod(launch.along(tiled.lanes))
    inside = [*tiled.lanes, *tiled.cells]
    leftovers = (cut.workers * cut.parts_e, *launch.along(inside))
    cells = [x.new_empty(leftovers, dtype=launch.single) for _ in tiled.summed]
    if cut.whole:
        launch.run(
            "backward", cut.workers * lanes, cut, *before, dx, *extra, *own, *cells, *firm,
            cut.turns, parts=False,
        )  # fmt: skip
    else:
        parts = (cut.steps, cut.parts, cut.parts_e)
        shape = (len(tiled.gradients.sums), cut.parts, launch.groups)
        sums = x.new_empty(shape, dtype=launch.moments)
        launch.run(
            "backward_sums", cut.workers * lanes * cut.parts, cut, *before, *extra, *cells, sums,
            *firm, cut.turns, *parts, parts=False,
        )  # fmt: skip
        blocks = -(-launch.groups // cut.groups)
        known = [dx, *own, sums, *firm]
        if program.means:
            known = [dx, _turn(launch, moments, sums, own, tensors)]
        launch.run("backward_apply", blocks * cut.parts, cut, *before, *known, *parts, parts=True)
    made = dict(zip(tiled.gradients.groups, own, strict=True))
    found = {i: _gathered(launch, i, v, tiled.groups, tensors[i]) for i, v in made.items()}
    for i, value in zip(tiled.summed, cells, strict=True):
        found[i] = _gathered(launch, i, value.sum(0), inside, tensors[i])
    return dx, dresidual, found


def _average(
    launch: Launch,
    partial: Sequence[Tensor],
    moments: Tensor,
    updates: Sequence[Tensor],
    ordered: Sequence[Tensor],
) -> None:
    """Put the moments of parts together, and make the means over groups and what follows of them.

    Args:
        launch: made for these.
        partial: moments of parts.
        moments: where they, the means, and the coefficients go.
        updates: where these go.
        ordered: the tensors of the program.
    """
    cut = launch.forward
    before, numbers = [*partial], [cut.parts, cut.steps * cut.elements]
    *means, last = launch.means[0]
    for each in means:
        known = [*before, moments, *(ordered[i] for i in each.tensors), each.steps, *numbers]
        launch.run(each.name, each.programs, each, *known, parts=True)
        before, numbers = [], []
    known = [moments, *updates, *(ordered[i] for i in last.tensors)]
    launch.run(last.name, last.programs, last, *known, parts=True)


def _turn(
    launch: Launch,
    moments: Tensor,
    sums: Tensor,
    own: Sequence[Tensor],
    tensors: Sequence[Tensor],
) -> Tensor:
    """What the means over groups take, over the number of their groups, and what dx takes of each.

    Args:
        launch: made for these.
        moments: with the means behind them.
        sums: of parts.
        own: where that goes what tensors take of each group.
        tensors: of the program.
    """
    *means, last = launch.means[1]
    slopes = sums.new_empty(launch.averages(len(launch.tiled.averages)) + 2 * launch.groups)
    totals = sums.new_empty((sums.shape[0], launch.groups)) if means else sums
    before, numbers = [sums], [launch.backward.parts]
    for each in means:
        read = [launch.ordered(i, tensors[i]) for i in each.tensors]
        known = [moments, *before, totals, slopes, *read, each.steps, *numbers]
        launch.run(each.name, each.programs, each, *known, parts=True)
        before, numbers = [], []
    read = [launch.ordered(i, tensors[i]) for i in last.tensors]
    known = [moments, totals, slopes, *own, *read, launch.backward.parts]
    launch.run(last.name, last.programs, last, *known, parts=True)
    return slopes


def _of_groups(launch: Launch, x: Tensor, number: int, tensor: Tensor) -> Tensor:
    """Memory for what a tensor takes of each group; where that is all, in its own dtype."""
    whole = launch.tiled.source.runs(number) == launch.tiled.groups
    return x.new_empty(launch.groups, dtype=tensor.dtype if whole else launch.single)


def _gathered(
    launch: Launch, number: int, made: Tensor, loops: Sequence[int], tensor: Tensor
) -> Tensor:
    """What a tensor takes along some loops as its gradient: added up, in its shape and dtype."""
    tiled = launch.tiled
    own = tiled.source.runs(number)
    away = [place for place, loop in enumerate(loops) if loop not in own]
    made = made.reshape(launch.along(loops))
    if away:
        made = made.sum(away)
    made = made.reshape([launch.sizes[axis] for axis in tiled.layout.order(number)])
    return back(made, tensor, launch.order(number)).reshape(tensor.shape).to(tensor.dtype)
