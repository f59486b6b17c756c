"""What the table of costs is filled with: one norm of each family in each layout, by size."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

from benchmarks import hand_written
from bnrewrite.passes.cost_table import Work

DTYPES = {
    "eager": ("float32", "bfloat16", "float64", "float16"),
    "inductor": ("float32", "bfloat16"),
}
EXPONENTS = {
    ("cpu", "eager"): (6, 9, 12, 15, 18, 21),
    ("cpu", "inductor"): (12, 15, 18, 21, 24),
    ("cuda", "eager"): (9, 12, 15, 18, 21, 24, 27),
}
GROUPS = 4
FEATURES = 4  # exponent of those of short rows


class DeviationRows(hand_written.LayerNorm):
    """Division by the standard deviation plus eps, which no operator has."""

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        deviation = x.std(-1, keepdim=True, unbiased=False)
        return self.weight * centred / (deviation + self.eps) + self.bias


class DeviationChannels(hand_written.Channels):
    """The same over the batch; unbiased, it would be another kernel for each size."""

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean((0, 2, 3), keepdim=True)
        deviation = x.std((0, 2, 3), keepdim=True, unbiased=False)
        return centred / (deviation + 1e-5) * self.weight + self.bias


class Behind(nn.Module):
    """A norm of a sum, which is returned too: a compiler makes it where it takes its moments."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """In front of a block with a shortcut around it."""
        y = x + residual
        return self.norm(y), y


@dataclass(frozen=True)
class Kind:
    """A norm of a family, made from the number of channels, and where its tensors lie."""

    family: str
    layout: str
    norm: Callable[[int], nn.Module]
    image: bool = True
    channels_last: bool = False

    def shape(self, exponent: int) -> tuple[int, ...]:
        """A usual shape of 2^exponent elements."""
        if not self.image:
            features = min(exponent // 3 + 3, exponent - 2)
            if self.layout == "short rows":
                features = FEATURES
            return 2 ** (exponent - features), 2**features
        side, channels = exponent // 3 - 1, exponent // 6 + 2
        return 2 ** (exponent - 2 * side - channels), 2**channels, 2**side, 2**side


KINDS = (
    Kind("batch_norm", "apart", hand_written.BatchNorm),
    Kind("batch_norm", "columns", hand_written.BatchNorm, channels_last=True),
    Kind("layer_norm", "rows", hand_written.LayerNorm, image=False),
    Kind("layer_norm", "columns", hand_written.ChannelNorm),
    Kind("rms_norm", "rows", hand_written.RMSNorm, image=False),
    Kind("group_norm", "rows", lambda channels: hand_written.GroupNorm(GROUPS, channels)),
    Kind(
        "group_norm", "apart",
        lambda channels: hand_written.GroupNorm(GROUPS, channels), channels_last=True,
    ),
    Kind("group_norm", "columns", hand_written.InstanceNorm, channels_last=True),
    Kind("lp_normalize", "rows", lambda channels: hand_written.L2Normalize(-1), image=False),
    Kind("lp_normalize", "columns", lambda channels: hand_written.L2Normalize(1)),
    Kind("layer_norm", "short rows", hand_written.LayerNorm, image=False),
    Kind("rms_norm", "short rows", hand_written.RMSNorm, image=False),
    Kind("lp_normalize", "short rows", lambda _: hand_written.L2Normalize(-1), image=False),
    Kind("general", "short rows", DeviationRows, image=False),
    Kind("general", "rows", DeviationRows, image=False),
    Kind("general", "columns", DeviationChannels, channels_last=True),
    Kind("general", "apart", DeviationChannels),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A cell of the table."""

    kind: Kind
    dtype: str
    training: bool
    exponent: int
    fused: bool = False

    @property
    def work(self) -> Work:
        """What the table calls it."""
        kind, size = self.kind, 2**self.exponent
        return Work(kind.family, kind.layout, self.dtype, self.training, size, self.fused)

    def __str__(self) -> str:
        shape = "x".join(map(str, self.kind.shape(self.exponent)))
        return f"{self.work.key}, {shape}"

    def tensors(self, device: str) -> list[Tensor]:
        """What the model is called with."""
        return [self.tensor(device) for _ in range(1 + self.fused)]

    def tensor(self, device: str) -> Tensor:
        """A random tensor of the case's shape, layout and dtype."""
        x = torch.randn(self.kind.shape(self.exponent), device=device).to(
            getattr(torch, self.dtype)
        )
        return x.contiguous(memory_format=torch.channels_last) if self.kind.channels_last else x

    def model(self, device: str) -> nn.Module:
        """The norm, with statistics of the tensor also where no gradient is wanted.

        Behind a sum, where a compiler would fuse the two.
        """
        shape = self.kind.shape(self.exponent)
        made = self.kind.norm(shape[1]).to(device, getattr(torch, self.dtype))
        for parameter in made.parameters():
            parameter.data.normal_()
        return (Behind(made) if self.fused else made).train()


def cases(device: str, stage: str, only: str | None = None) -> Iterator[Case]:
    """All cells of a table whose text contains `only`."""
    for kind, dtype, training, fused, exponent in product(
        KINDS,
        DTYPES[stage],
        (True, False),
        (False, True) if stage == "inductor" else (False,),
        EXPONENTS[device, stage],
    ):
        case = Case(kind, dtype, training, exponent, fused)
        if only is None or only in str(case):
            yield case
