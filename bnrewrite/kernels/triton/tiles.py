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
from .source import Tiled

FORWARD, BACKWARD = 16384, 8192  # elements of a tile of whole groups
ROWS = 2048  # elements of a tile of several short groups
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
        whole: a tile has whole groups.
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
    limit = (BACKWARD if backward else FORWARD) // narrow
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
        return Tile(groups, cells, elements, warps, True, 1, 1, 1, 1, turns, workers)
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
