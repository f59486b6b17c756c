"""Statistics that are packed and taken apart, repeated, of a slice, of a power: one change each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from spellings import Formula, Written
from torch import Tensor

from .recipe import EPS, NearMiss, Setting
from .statistics import AXES, SQUARE

ROWS = Setting((4, 4, 4), {"weight": (4,)})
HALF = Setting((4, 4, 4), {"weight": (2,)})
STORED = Setting((4, 4, 4, 4), {}, {"running_mean": (4,), "running_var": (4,)})

Statistics = tuple[Tensor, Tensor]


def split(packed: Tensor) -> Statistics:
    mean, square = torch.split(packed, 4)
    return mean, square


@dataclass(frozen=True)
class Packed:
    """A BatchNorm that packs E[x] and E[x^2] into one vector, and takes it apart again."""

    pack: Callable[[Tensor, Tensor], Tensor] = lambda mean, square: torch.cat([mean, square])
    between: Callable[[Tensor], Tensor] = lambda packed: packed * 4 / 4
    apart: Callable[[Tensor], Statistics] = split

    def __call__(self, m: Written, x: Tensor) -> Tensor:
        packed = self.pack(x.mean(AXES), x.square().mean(AXES))
        mean, square = self.apart(self.between(packed))
        scale = m.weight * torch.rsqrt((square - mean * mean).abs() + EPS)
        shift = m.bias - mean * scale
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


PACKED = {
    "taken apart the other way round": Packed(apart=lambda p: (p[4:], p[:4])),
    "packed the other way round": Packed(pack=lambda mean, square: torch.cat([square, mean])),
    "the mean packed twice": Packed(pack=lambda mean, square: torch.cat([mean, mean + 1])),
    "one channel off": Packed(apart=lambda p: (p[1:5], p[4:])),
    "one channel off at the end": Packed(apart=lambda p: (p[:4], p[3:7])),
    "stacked, and one channel of both taken": Packed(
        pack=lambda mean, square: torch.stack([mean, square, mean, square]),
        apart=lambda p: (p[:, 0], p[:, 1]),
    ),
    "stacked last, and read as rows": Packed(
        pack=lambda mean, square: torch.stack([mean, square], -1).view(2, 4),
        apart=lambda p: (p[0], p[1]),
    ),
    "interleaved": Packed(
        pack=lambda mean, square: torch.stack([mean, square], 1).flatten(),
    ),
    "the packed mean detached": Packed(
        pack=lambda mean, square: torch.cat([mean.detach(), square]),
    ),
    "detached while packed": Packed(between=lambda packed: packed.detach()),
    "multiplied while packed": Packed(between=lambda packed: packed * 1.5),
    "multiplied along the pack": Packed(between=lambda packed: packed * torch.linspace(1, 2, 8)),
    "flipped while packed": Packed(between=lambda packed: packed.flip(0)),
    "rolled while packed": Packed(between=lambda packed: packed.roll(1)),
    "centred while packed": Packed(between=lambda packed: packed - packed.mean()),
    "added to its transpose while packed": Packed(
        pack=lambda mean, square: torch.stack([mean, square, square, mean]),
        between=lambda packed: (packed + packed.t()) / 2,
        apart=lambda packed: (packed[0], packed[1]),
    ),
    "multiplied by its own channels": Packed(
        pack=lambda mean, square: torch.cat([mean, square]),
        between=lambda packed: (packed[:4, None] * packed)[1],
    ),
}


def groups(x: Tensor) -> Tensor:
    """E[x^2] of two groups of neighbouring features."""
    return x.view(4, 4, 2, 2).square().mean(-1)


def grouped(spread: Callable[[Tensor], Tensor]) -> Formula:
    def formula(m: Written, x: Tensor) -> Tensor:
        return x / torch.sqrt(spread(groups(x)) + EPS) * m.weight

    return formula


REPEATED = {
    "repeated as a whole": grouped(lambda power: power.repeat(1, 1, 2)),
    "tiled": grouped(lambda power: power.tile(2)),
    "repeated the other way round": grouped(lambda power: power.flip(-1).repeat_interleave(2, -1)),
    "repeated along the rows": grouped(lambda power: power.repeat_interleave(2, 1).view(4, 4, 4)),
    "repeated by two numbers": grouped(
        lambda power: power.repeat_interleave(torch.tensor([1, 3]), -1)
    ),
}


def part(of: Callable[[Tensor], Tensor]) -> Formula:
    def formula(m: Written, x: Tensor) -> Tensor:
        return x[..., :2] * torch.rsqrt(of(x).square().mean(-1, keepdim=True) + EPS) * m.weight

    return formula


SLICES = {
    "of the next slice": part(lambda x: x[..., 2:]),
    "of a slice one further": part(lambda x: x[..., 1:3]),
    "of every other feature": part(lambda x: x[..., ::2]),
    "of the second chunk": part(lambda x: x.chunk(2, -1)[1]),
    "of the same slice of another axis": part(lambda x: x[:, :2].transpose(1, 2)),
    "of the slice of another tensor": part(lambda x: x.relu()[..., :2]),
    "of all features": part(lambda x: x),
    "of one feature less": part(lambda x: x[..., :1]),
}


def power(raised: Callable[[Tensor], Tensor], moment: Callable[[Tensor], Tensor]) -> Formula:
    def formula(m: Written, x: Tensor) -> Tensor:
        inverse = torch.rsqrt(moment(x).mean(-1, keepdim=True) + EPS)
        return raised(x) * inverse * m.weight

    return formula


POWERS = {
    "the square's moment": power(lambda x: x**3, lambda x: (x**2) ** 2),
    "the fourth power's moment": power(lambda x: x**3, lambda x: x**4),
    "the tensor's own moment": power(lambda x: x**3, lambda x: x**2),
    "the square scaled": power(lambda x: x**2, lambda x: (x**3) ** 2),
    "the magnitude scaled": power(lambda x: x.abs() ** 3, lambda x: (x**3) ** 2),
}


def stored(rounded: Callable[[Tensor], Tensor]) -> Formula:
    def formula(m: Written, x: Tensor) -> Tensor:
        inverse = rounded(torch.rsqrt(m.running_var + EPS))
        return (x - m.running_mean.view(1, -1, 1, 1)) * inverse.view(1, -1, 1, 1)

    return formula


ROUNDED = {
    "rounded to an integer": stored(lambda inverse: inverse.int().float()),
    "made an integer of itself": stored(lambda inverse: (8 * inverse).long() / 8),
}

TABLE = (
    *(NearMiss(f"packed: {name}", each, Packed(), SQUARE) for name, each in PACKED.items()),
    *(
        NearMiss(f"group moments {name}", each, grouped(lambda p: p.repeat_interleave(2, -1)), ROWS)
        for name, each in REPEATED.items()
    ),
    *(
        NearMiss(f"a slice by the moment {name}", each, part(lambda x: x[..., :2]), HALF)
        for name, each in SLICES.items()
    ),
    *(
        NearMiss(f"a power by {name}", each, power(lambda x: x**3, lambda x: (x**3) ** 2), ROWS)
        for name, each in POWERS.items()
    ),
    *(
        NearMiss(f"a stored scale {name}", each, stored(lambda inverse: inverse), STORED)
        for name, each in ROUNDED.items()
    ),
)
