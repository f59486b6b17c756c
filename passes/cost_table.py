"""Measured times of lowerings, by what decides them, and the choice that follows from them.

    time = table of the device and stage [family, layout, dtype, mode] [lowering] [class of size]

A table is a file of this package, ``costs_cpu.json`` of the eager stage,
``costs_cpu_inductor.json`` where Inductor runs the graph, that ``python -m benchmarks.costs``
writes; a device without a file has none. A lookup depends on the file and on the graph alone, never
on the machine that it runs on.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

import torch
from torch import fx

from bnrewrite.algebra import Match, Reading
from bnrewrite.algebra.axes import product

from .nodes import current

# The first that is within a tie of the fastest is taken: what keeps less memory and more digits, or
# what a compiler fuses with more than was measured.
LOWERINGS = ("generated", "native", "composite")
FUSING = ("composite", "generated")  # Inductor takes native norms apart
ORDER = {"eager": LOWERINGS, "inductor": FUSING}
TIE = 1.1
MODES = {True: "training", False: "evaluation"}
# Kinds that are another one's operator of PyTorch.
FAMILIES = {"instance_norm": "group_norm", "weight_standardization": "layer_norm"}
GENERAL = "general"  # the family whose times stand for those of families that were not measured
SINGLE = "float32"  # likewise, of dtypes
SHORT = 64  # elements of a row: what is done for a group counts more than what for each of them


@dataclass(frozen=True)
class Work:
    """What decides how long the lowerings of a norm take.

    Attributes:
        family: its kind, or the one whose operator it takes.
        layout: "rows" where the reduced elements lie together, "short rows" where these are few,
            "columns" where a kept axis is the densest, "apart" where kept axes
            lie between reduced ones, and a reduced one is densest.
        dtype: of the normalised tensor, as "float32".
        training: a gradient is wanted.
        elements: of the normalised tensor; None where not even an example is known.
        fused: a compiler would make the normalised tensor and its moments in one loop.
    """

    family: str
    layout: str
    dtype: str
    training: bool
    elements: float | None = None
    fused: bool = False

    @property
    def key(self) -> str:
        """All but the size, as files have it."""
        key = f"{self.family}, {self.layout}, {self.dtype}, {MODES[self.training]}"
        return f"{key}, fused" if self.fused else key


@dataclass(frozen=True)
class Table:
    """The times of one kind of device.

    Attributes:
        sizes: numbers of elements, ascending, one for each class.
        microseconds: by the key of a work, then by lowering: one time per class.
    """

    sizes: tuple[int, ...]
    microseconds: Mapping[str, Mapping[str, tuple[float, ...]]]

    def times(self, work: Work) -> dict[str, float] | None:
        """The time of each lowering that was measured; None where the table has no such work.

        Sizes between two classes are of the nearer one by their ratio, those outside and unknown
        ones of the last. A dtype without an entry has those of float32, a family without one those
        of general formulas.
        """
        places = [replace(work, dtype=d) for d in dict.fromkeys((work.dtype, SINGLE))]
        places += [replace(each, family=GENERAL) for each in places]
        entries = (self.microseconds.get(each.key) for each in places)
        entry = next((each for each in entries if each is not None), None)
        if entry is None:
            return None
        place = self.place(work.elements)
        return {lowering: times[place] for lowering, times in entry.items()}

    def place(self, elements: float | None) -> int:
        """The class of a number of elements, of the largest where it is unknown."""
        if elements is None:
            return len(self.sizes) - 1
        ratios = [abs(math.log(max(elements, 1) / size)) for size in self.sizes]
        return ratios.index(min(ratios))


def read_table(text: str) -> Table:
    """A table from the text of its file."""
    record: dict[str, Any] = json.loads(text)
    entries = {
        key: {lowering: tuple(times) for lowering, times in entry.items()}
        for key, entry in record["microseconds"].items()
    }
    return Table(tuple(record["sizes"]), entries)


def name_of_file(device: str, stage: str = "eager") -> str:
    """The file of a kind of device, "cpu" or "cuda", and a stage, "eager" or "inductor"."""
    return f"costs_{device}.json" if stage == "eager" else f"costs_{device}_{stage}.json"


@functools.cache
def table_of(device: str, stage: str = "eager") -> Table | None:
    """The table of a kind of device and a stage, None where it has not been measured."""
    file = files("bnrewrite.passes") / name_of_file(device, stage)
    return read_table(file.read_text(encoding="utf-8")) if file.is_file() else None


def fastest(
    times: Mapping[str, float], allowed: Collection[str], stage: str = "eager"
) -> str | None:
    """The lowering to take of those that may be taken; None where none of them was measured."""
    known = {each: times[each] for each in ORDER[stage] if each in times and each in allowed}
    limit = TIE * min(known.values(), default=0)
    return next((lowering for lowering, time in known.items() if time <= limit), None)


def work_of(reading: Reading, found: Match, stage: str = "eager") -> Work:
    """What a site has to do, by the shapes at capture; symbolic sizes by their example."""
    value = current(found.linear.source).meta["val"]
    sizes = [_example(size) for size in value.shape]
    return Work(
        family=FAMILIES.get(found.kind, found.kind),
        layout=_layout(found, value),
        dtype=str(value.dtype).removeprefix("torch."),
        training=reading.ring.differentiable(found.node),
        elements=None if None in sizes else math.prod(size for size in sizes if size is not None),
        fused=stage == "inductor" and _is_pointwise(found.linear.source),
    )


def _is_pointwise(node: fx.Node) -> bool:
    """Whether a tensor is made element by element, up to a view of it."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if target.is_view:
        return _is_pointwise(node.all_input_nodes[0])
    return torch.Tag.pointwise in target.tags


def _layout(found: Match, value: torch.Tensor) -> str:
    """How reduced and kept axes alternate in memory, from the outermost to the densest."""
    strides = [_example(stride) for stride in value.stride()]
    if None in strides:
        strides = list(range(value.dim(), 0, -1))  # as if it was contiguous
    roles: list[bool] = []
    dims = zip(strides, found.linear.index, strict=True)
    for _, dim in sorted(dims, key=lambda each: -(each[0] or 0)):
        for axis in dim:
            if not roles or roles[-1] != (axis in found.over):
                roles.append(axis in found.over)
    if not roles or not roles[-1]:
        return "columns"
    if roles.count(True) > 1:
        return "apart"
    length = product(axis.size for axis in found.over)
    return "short rows" if isinstance(length, int) and length < SHORT else "rows"


def _example(size: int | torch.SymInt) -> int | None:
    """A size, or the example that a symbolic one was captured with."""
    return size.node.hint if isinstance(size, torch.SymInt) else size
