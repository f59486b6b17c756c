"""Norm modules that are not equal to one of torch.nn, or are more than one, and why they stay."""

from __future__ import annotations

from collections.abc import Callable

import torch
from convertible import Bare
from hand_written import Layer, RowNorm
from torch import Tensor, nn

import bnrewrite

# changes of `Tracking`
UNEQUAL = {
    "activation": "relu follows the norm",
    "dropout": "dropout follows the norm",
    "before": "add follows the norm",
    "eps": "eps is 1e-05 in training, 0.001 in evaluation",
    "biased": "its running variance is not corrected by n / (n - 1)",
    "by batch": "its running variance is not corrected by n / (n - 1)",
    "uneven": "old and new value of a running statistic do not weigh 1 together",
    "batch in evaluation": "evaluation does not use the statistics that training updates",
    "detached": "its formula has no name",
    "one more": "its weight is not a parameter as it is",
    "double": "its result is torch.float64 where the input is torch.float32",
}


class OtherNames(Layer):
    """A LayerNorm whose parameters have other names."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred * (x.var(-1, False, keepdim=True) + 1e-5).rsqrt() * self.gamma


class Counting(RowNorm):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Frozen(RowNorm):
    def train(self, mode: bool = True) -> Frozen:
        return super().train(False)


class Asked(RowNorm):
    def sizes(self) -> int:
        return self.weight.numel()


class Choosing(RowNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.size(0) > 3 else x


class WithChild(RowNorm):
    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.after = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.after(super().forward(x))
        return y


class WithGradients(RowNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if torch.is_grad_enabled() else x


class SetsAutocast(RowNorm):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


class NoGradients(RowNorm):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Transposed(RowNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(0, 1))


class Unbiased(RowNorm):
    def forward(self, x: Tensor) -> Tensor:
        deviation = torch.sqrt(x.var(-1, keepdim=True) + 1e-5)
        return (x - x.mean(-1, keepdim=True)) / deviation * self.weight + self.bias


class Unused(Bare):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


class Plain(RowNorm):
    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.offset = torch.rand(size)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.offset


class Last(Layer):
    """A batch norm whose channels come last."""

    def forward(self, x: Tensor) -> Tensor:
        variance = x.var((0, 1), correction=0)
        return (x - x.mean((0, 1))) / torch.sqrt(variance + 1e-5)


class Lengths(Layer):
    def forward(self, x: Tensor) -> Tensor:
        length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x / length.clamp_min(1e-6)


def hooked() -> nn.Module:
    norm = RowNorm(4)
    norm.register_forward_hook(lambda *given: -given[-1])
    return norm


def parametrized() -> nn.Module:
    norm = RowNorm(4)
    nn.utils.parametrize.register_parametrization(norm, "weight", nn.Softplus())
    return norm


STAYING: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "hooks": (hooked, "it has hooks"),
    "parametrizations": (parametrized, "it has parametrizations"),
    "submodules": (lambda: WithChild(4), "it has submodules (after)"),
    "a method": (lambda: Frozen(4), "its class has a train of its own"),
    "another method": (lambda: Asked(4), "its class has sizes, which others may use"),
    "an attribute": (lambda: Counting(4), "its forward sets calls beside its buffers"),
    "a plain tensor": (lambda: Plain(4), "it uses offset"),
    "other names": (OtherNames, "its gamma is weight in the native module"),
    "a choice": (lambda: Choosing(4), "its code asks for sizes"),
    "unused": (Unused, "its weight is not what the native module uses it for"),
    "channels": (Last, "its channels are not the second dimension"),
    "no class": (Lengths, "torch.nn has no module for a lp_normalize"),
    "gradients": (
        lambda: WithGradients(4),
        "it computes something else where no gradients are recorded",
    ),
    "autocast": (lambda: SetsAutocast(4), "its forward sets autocast"),
    "no gradients": (lambda: NoGradients(4), "no gradient flows through it"),
    "other order": (
        lambda: Transposed(4),
        "its result has its dimensions in another order than the input",
    ),
    "correction": (lambda: Unbiased(4), "its weight is not a parameter as it is"),
    "compiled": (lambda: bnrewrite.optimize(RowNorm(4)), "it is compiled or optimised by itself"),
}
