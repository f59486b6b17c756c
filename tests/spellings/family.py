"""What a row of the spelling table claims: which family it belongs to, and how it is checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .written import Formula, Shape, Written


@dataclass(frozen=True)
class Family:
    """One formula, and the golden graph in which all of its spellings end.

    Attributes:
        name: the heading of the golden graph in golden.txt.
        kinds: the kinds that a report may give it; more than one where one formula has two names
            (a GroupNorm of one group over rows is a LayerNorm).
        native: the same formula by the shortest native code, parameters in their plain shape.
        shape: of the input, unless a spelling says otherwise.
        axes: reduced axes of the normalised tensor, counted from 0; None where the axes of the
            input do not show them (groups) or where spellings have inputs of other ranks.
        eps: as a report gives it; None where the formula has none or has no name.
        parameters: names and plain shapes.
        buffers: names and plain shapes.
        may_stay: the user's code may be the fastest known way, and then stays (contract, C6).
        full_size: elements of the normalised tensor, where the lowering keeps the user's own small
            statistics: the golden graph then has the full-size operations only.
        alone: why a formula that looks like another family's is a family of one spelling.
    """

    name: str
    kinds: tuple[str, ...]
    native: Formula
    shape: Shape
    axes: Shape | None
    eps: float | None
    parameters: Mapping[str, Shape] = field(default_factory=dict)
    buffers: Mapping[str, Shape] = field(default_factory=dict)
    may_stay: bool = False
    full_size: int = 0
    alone: str = ""


@dataclass(frozen=True)
class Spelling:
    """One way to write a family's formula.

    Attributes:
        formula: the code, named for what is special about it.
        family: the formula it spells.
        shape: of the input, where it is not the family's.
        axes: reduced axes, where they are not the family's.
        parameters: shapes that differ from the family's plain ones.
        buffers: shapes that differ from the family's plain ones.
        also: further ways to check it: "float64", "bfloat16", "float16", "backend"
            (torch.compile with the entry point), "inductor".
    """

    formula: Formula
    family: Family
    shape: Shape | None = None
    axes: Shape | None = None
    parameters: Mapping[str, Shape] = field(default_factory=dict)
    buffers: Mapping[str, Shape] = field(default_factory=dict)
    also: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.family.name}: {getattr(self.formula, '__name__', 'formula')}"

    @property
    def input_shape(self) -> Shape:
        return self.shape or self.family.shape

    def build(self) -> Written:
        """The module as its author would have written it."""
        return Written(
            self.formula,
            {**self.family.parameters, **self.parameters},
            {**self.family.buffers, **self.buffers},
        )

    def build_native(self) -> Written:
        """The family's native code, with the same numbers in parameters and buffers."""
        written = self.build()
        native = Written(self.family.native, self.family.parameters, self.family.buffers)
        targets = dict(native.named_parameters()) | dict(native.named_buffers())
        sources = dict(written.named_parameters()) | dict(written.named_buffers())
        with torch.no_grad():
            for name, target in targets.items():
                target.copy_(sources[name].reshape(target.shape))
        return native

    def batches(
        self, count: int, dtype: torch.dtype = torch.float32, grow: int = 0
    ) -> list[Tensor]:
        """Random inputs, off centre, every channel with a scale of its own; the batch may grow."""
        source = torch.Generator().manual_seed(17)
        batches = []
        for step in range(count):
            shape = (self.input_shape[0] + grow * step, *self.input_shape[1:])
            batches.append(random_input(shape, source).to(dtype))
        return batches


def random_input(shape: Shape, source: torch.Generator) -> Tensor:
    """Off centre, and with another scale and centre at every index of every axis."""
    x = torch.randn(shape, generator=source)
    for axis, size in enumerate(shape):
        along = [1] * len(shape)
        along[axis] = size
        x = x * (0.7 + 0.6 * torch.rand(along, generator=source))
        x = x + 0.3 * torch.randn(along, generator=source)
    return x
