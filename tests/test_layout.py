"""Channels become dense behind a norm over them, where a depthwise convolution profits."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from contract import contract_violations
from torch import Tensor, nn

import bnrewrite
from benchmarks.hand_written import ChannelNorm, LayerNorm

Follows = Callable[[Tensor], Tensor]
NOTE = "its result lies channels last, for the depthwise convolution behind it"


class Blocks(nn.Module):
    """Two blocks as ConvNeXt's, with a norm in front; what follows them is given."""

    def __init__(
        self, last: Follows, groups: int = 8, norm: Callable[[int], nn.Module] = ChannelNorm
    ) -> None:
        super().__init__()
        self.norm = norm(8)
        self.first = nn.Conv2d(8, 8, 3, padding=1, groups=groups)
        self.second = nn.Conv2d(8, 8, 3, padding=1, groups=groups)
        self.norms = nn.ModuleList([ChannelNorm(8), ChannelNorm(8)])
        self.wide, self.narrow = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        for convolution, norm in zip((self.first, self.second), self.norms, strict=True):
            x = x + self.narrow(torch.sin(self.wide(norm(convolution(x)))))
        return self.last(x)


class Doubled(torch.autograd.Function):
    """No operation of PyTorch."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return x * 2

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient * 2


def pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def is_converted(model: nn.Module, x: Tensor) -> bool:
    report = bnrewrite.explain(model, x)
    assert len(report.sites) == 3
    return any(NOTE in site.notes for site in report.sites)


def optimise(model: nn.Module) -> nn.Module:
    return bnrewrite.optimize(model, backend="eager")


IMAGES = torch.randn(3, 8, 12, 10, generator=torch.Generator().manual_seed(2))
FOLLOWS: dict[str, Follows] = {
    "pooled": pooled,
    "a view": lambda x: x.view(3, -1),
    "its parts": lambda x: torch.cat(x.chunk(2, 1), 1).sum(1),
}
STAYING: dict[str, Follows] = {
    "the image itself": lambda x: x,
    "its pixels": lambda x: x.permute(0, 2, 3, 1).reshape(3, -1, 8),
    "strides that are asked for": lambda x: pooled(x.as_strided((3, 8, 12, 10), (960, 120, 10, 1))),
    "random numbers": lambda x: pooled(nn.functional.dropout(x, 0.3)),
    "no operation of PyTorch": lambda x: pooled(Doubled.apply(x)),  # type: ignore[no-untyped-call]
}


@pytest.mark.parametrize("name", FOLLOWS)
def test_channels_become_dense(name: str) -> None:
    model = Blocks(FOLLOWS[name])
    assert is_converted(model, IMAGES)
    batches = [IMAGES, IMAGES.flip(0) + 1, IMAGES * 2]
    assert contract_violations(model, optimise, batches) == []
    assert optimise(copy.deepcopy(model))(IMAGES).stride() == model(IMAGES).stride()


@pytest.mark.parametrize("name", STAYING)
def test_what_may_see_how_a_tensor_lies(name: str) -> None:
    model = Blocks(STAYING[name])
    assert not is_converted(model, IMAGES)
    assert contract_violations(model, optimise, [IMAGES, IMAGES + 1, IMAGES]) == []
    results = []
    for each in (model, optimise(copy.deepcopy(model))):
        torch.manual_seed(3)  # random numbers are drawn in the order of memory
        results.append(each(IMAGES))
    torch.testing.assert_close(*results)
    assert results[0].stride() == results[1].stride()


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (Blocks(pooled, groups=1), IMAGES),
        (Blocks(pooled), IMAGES.contiguous(memory_format=torch.channels_last)),
        (Blocks(pooled, norm=lambda _: LayerNorm(10)), IMAGES),
        (Blocks(pooled).double(), IMAGES.double()),
    ],
    ids=["no depthwise convolution", "dense already", "a norm over rows", "float64"],
)
def test_where_nothing_is_won(model: nn.Module, x: Tensor) -> None:
    found = [NOTE in site.notes for site in bnrewrite.explain(model, x).sites]
    assert not found[0]
    assert not any(found) or not isinstance(model.norm, ChannelNorm)


def test_it_is_switched_off() -> None:
    assert not is_converted(bnrewrite.optimize(Blocks(pooled), disable="layout"), IMAGES)
