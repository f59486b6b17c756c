"""The module that every row of the tables is: parameters, buffers, one formula as its forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]
Formula = Callable[["Written", Tensor], Any]

COUNTERS = ("num_batches_tracked",)


class Written(nn.Module):
    """A norm written by hand: `formula(module, x)` is its forward.

    Parameters and buffers are random, and different along every axis, so that a wrong broadcast, a
    weight in the place of a bias or a forgotten statistic changes the numbers.
    """

    weight: Tensor
    bias: Tensor
    filters: Tensor
    threshold: Tensor
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        formula: Formula,
        parameters: Mapping[str, Shape] | None = None,
        buffers: Mapping[str, Shape] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.formula = formula
        source = torch.Generator().manual_seed(seed)
        for name, shape in (parameters or {}).items():
            self.register_parameter(name, nn.Parameter(_start(name, shape, source)))
        for name, shape in (buffers or {}).items():
            self.register_buffer(name, _start(name, shape, source))

    def forward(self, x: Tensor) -> Any:
        return self.formula(self, x)


def _start(name: str, shape: Shape, source: torch.Generator) -> Tensor:
    if name in COUNTERS:
        return torch.zeros(shape, dtype=torch.int64)
    if name == "weight":  # away from zero, where b / w would make every error large
        return 0.5 + torch.rand(shape, generator=source)
    normal = torch.randn(shape, generator=source)
    if name == "running_var":
        return 0.5 + normal.abs()
    return normal
