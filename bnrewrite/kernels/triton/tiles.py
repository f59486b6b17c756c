"""How a program is cut into tiles: whole groups where they fit on chip, parts of them else.

Measured on no device yet: no kernel spills at these sizes (``tests/test_triton_builds.py``), and
reads are as wide as sectors. ``benchmarks/gpu_norms.py`` is there to measure them.
Comparisons alone decide, so that symbolic sizes keep their range.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..generated.activations import activation
from .means import groups_of, runs, taking, tensors_of_groups, tensors_of_mean
from .source import Tiled

FORWARD, BACKWARD = 16384, 8192  # elements of a tile of whole groups
ROWS = 2048  # elements of a tile of several short groups
SHARED = 2048  # numbers of groups in a tile of means over groups
GROUPS = 128  # of a tile that makes their coefficients, but for parts
PART = 4096  # elements of a tile of a part
SECTOR = 32  # bytes
LINE = 128  # bytes
MOST_PARTS = 4096  # numbers that a program puts together
LANES = 512  # elements for each warp
RESIDENT = 16  # warps of a multiprocessor, where each thread has 128 registers


@dataclass(frozen=True)
class Tile:
    """How a kernel, or a pair of them, is launched.

    Attributes:
        groups, cells, elements: of a tile, powers of two.
        warps: of a program.
        whole: a tile has whole groups, none of which needs the others.
        steps: tiles of elements in a part.
        parts: of each group.
        parts_e: of each cell.
        most_parts: a power of two, not fewer than parts.
        turns: tiles of groups that a program goes through.
        workers: programs for each lane and part.
    """

    groups: int
    cells: int
    elements: int
    warps: int
    whole: bool
    steps: Any
    parts: Any
    parts_e: Any
    most_parts: int
    turns: Any
    workers: Any

    @property
    def sizes(self) -> dict[str, int]:
        """The constants of a kernel."""
        return {"G": self.groups, "C": self.cells, "E": self.elements}


@dataclass(frozen=True)
class MeanTile:
    """How a kernel of means over groups is launched, and with what.

    Attributes:
        name: of the kernel.
        tensors: of the program that it reads.
        means: of a tile, a power of two.
        groups: of each mean, that a tile has; a power of two.
        most_parts: a power of two, not fewer than the parts of a group.
        warps: of a program.
        steps: tiles of groups that a program goes through.
        programs: how many there are.
    """

    name: str
    tensors: tuple[int, ...]
    means: int
    groups: int
    most_parts: int
    warps: int
    steps: Any
    programs: Any

    @property
    def sizes(self) -> dict[str, int]:
        """The constants of a kernel."""
        return {"G": self.means, "E": self.groups}


def tile(
    tiled: Tiled, lengths: Sequence[Any], itemsize: int, processors: int, *, backward: bool
) -> Tile | None:
    """The tile of a program; None where its groups are too large.

    Args:
        tiled: the program.
        lengths: of its loops.
        itemsize: bytes of an element of x.
        processors: multiprocessors of the device.
        backward: not the forward.
    """
    lanes = tiled.lanes if backward else []
    others = [i for i in tiled.groups if i not in lanes]
    count = {
        name: math.prod(lengths[i] for i in loops)
        for name, loops in (
            ("groups", others), ("lanes", lanes), ("cells", tiled.cells),
            ("elements", tiled.elements),
        )
    }  # fmt: skip
    narrow = 2 if tiled.single == "float64" else 1
    behind = activation(tiled.program.activation)
    if backward and behind is not None and behind.formula is not None:
        narrow *= 2  # its slope takes registers
    alone = not tiled.averages
    limit = ((BACKWARD if backward else FORWARD) if alone else PART) // narrow
    cells, elements = power(count["cells"], 2 * limit), power(count["elements"], 2 * limit)
    across = _across(tiled, others, lengths, itemsize)
    least = min(across, SECTOR // itemsize)
    summed = backward and bool(tiled.summed)
    few = count["groups"] * count["lanes"] * 4 < processors
    fits = cells * elements * least <= limit
    if fits and not (few and cells * elements > PART):
        groups = least
        while groups < across and groups * 2 * cells * elements <= limit // 2:
            groups *= 2
        while groups * 2 * cells * elements <= ROWS and groups < count["groups"]:
            groups *= 2
        while groups > least and -(-count["groups"] // groups) * count["lanes"] < 2 * processors:
            groups //= 2
        warps = min(max(groups * cells * elements // LANES, 1), RESIDENT)
        most = processors * RESIDENT // warps if summed else 0
        workers, turns = _turns(count["groups"], groups, count["lanes"], most)
        return Tile(groups, cells, elements, warps, alone, 1, 1, 1, 1, turns, workers)
    return _parts(count, across, processors, summed, PART // narrow)


def _parts(
    count: dict[str, Any], across: int, processors: int, summed: bool, size: int
) -> Tile | None:
    cells = power(count["cells"], size)
    groups = min(across, max(size // cells, 1))
    blocks = -(-count["elements"] * cells * groups // size)
    if groups == across > 1 and blocks * groups > MOST_PARTS:
        groups //= 2  # half a line is two sectors, and the parts are twice as many
    elements = power(count["elements"], max(size // (cells * groups), 1))
    parts_c, blocks = -(-count["cells"] // cells), -(-count["elements"] // elements)
    programs = -(-count["groups"] // groups) * count["lanes"] * parts_c
    wanted = 1
    while (
        wanted < blocks
        and wanted * programs < 4 * processors
        and wanted * 2 * parts_c * groups <= MOST_PARTS
    ):
        wanted *= 2
    steps = -(-blocks // wanted)
    parts_e = -(-blocks // steps)
    most = power(parts_c * wanted, MOST_PARTS)
    if parts_c * wanted > most or most * groups > MOST_PARTS:
        return None
    warps = min(max(groups * cells * elements // LANES, 4), 8)
    most_programs = processors * RESIDENT // warps if summed else 0
    programs = count["lanes"] * parts_c * wanted
    workers, turns = _turns(count["groups"], groups, programs, most_programs)
    return Tile(
        groups, cells, elements, warps, False, steps, parts_c * parts_e, parts_e, most, turns,
        workers,
    )  # fmt: skip


def tiles_of_means(
    tiled: Tiled, lengths: Sequence[Any], most_parts: int, *, backward: bool
) -> list[MeanTile]:
    """The tiles of the means over groups, in the order in which they are made, and of all groups.

    There are none where a group needs no other.

    Args:
        tiled: the program.
        lengths: of its loops.
        most_parts: of each group.
        backward: those of what the means take.
    """
    numbers = taking(tiled) if backward else tiled.averages
    if not tiled.averages:
        return []
    parts = [most_parts, *[1] * len(numbers)]  # the first puts them together
    means = [
        _of_mean(tiled, lengths, k, most, backward) for k, most in zip(numbers, parts, strict=False)
    ]
    return [*means, _of_groups(tiled, lengths, parts[len(numbers)], backward)]


def _of_groups(tiled: Tiled, lengths: Sequence[Any], most_parts: int, backward: bool) -> MeanTile:
    count = math.prod(lengths[i] for i in tiled.groups)
    groups = power(count, max(GROUPS // most_parts, 1))
    return MeanTile(
        name=f"{'backward' if backward else 'forward'}_groups",
        tensors=tuple(tensors_of_groups(tiled, backward=backward)),
        means=groups,
        groups=1,
        most_parts=most_parts,
        warps=min(max(groups * most_parts // 64, 1), RESIDENT),
        steps=1,
        programs=-(-count // groups),
    )


def _of_mean(
    tiled: Tiled, lengths: Sequence[Any], number: int, most_parts: int, backward: bool
) -> MeanTile:
    own, shared = runs(tiled, number), groups_of(tiled, number)
    count, together = (math.prod(lengths[i] for i in loops) for loops in (own, shared))
    dense = bool(own) and own[-1] == tiled.groups[-1]
    widest = min(LINE // 8, max(SHARED // most_parts, 1))
    means = power(lengths[own[-1]], widest) if dense else 1
    groups = power(together, max(SHARED // (means * most_parts), 1))
    return MeanTile(
        name=f"{'backward' if backward else 'forward'}_mean{number}",
        tensors=tuple(tensors_of_mean(tiled, number, backward=backward)),
        means=means,
        groups=groups,
        most_parts=most_parts,
        warps=min(max(means * groups * most_parts // 128, 1), RESIDENT),
        steps=-(-together // groups),
        programs=-(-count // means),
    )


def _turns(count: Any, groups: int, programs: Any, most: int) -> tuple[Any, Any]:
    """How many workers go through the groups, and in how many turns.

    Args:
        count: of groups.
        groups: of a tile.
        programs: of each worker.
        most: how many programs leave sums behind, about; 0 where none do.
    """
    blocks = -(-count // groups)
    if not most:
        return blocks, 1
    workers = 1
    while workers * 2 * programs <= most:
        workers *= 2
    turns = -(-blocks // workers)
    return -(-blocks // turns), turns


def _across(tiled: Tiled, others: Sequence[int], lengths: Sequence[Any], itemsize: int) -> int:
    """Groups that lie side by side in memory, as many as make a line of it."""
    last, wide = len(lengths) - 1, max(LINE // itemsize, 1)
    if last in others:
        return power(lengths[last], wide)
    if last in tiled.cells and last - 1 in others and tiled.elements:
        return power(lengths[last - 1], max(wide // power(lengths[last], wide), 1))
    return 1


def power(value: Any, most: int) -> int:
    """The smallest power of two that is not less, or the largest below a limit."""
    result = 1
    while result < value and result < most:
        result *= 2
    return result
