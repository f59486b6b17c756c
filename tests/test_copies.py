"""A norm of copies is copies of the norm: what was repeated before it is normalised once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from contract import contract_violations
from torch import Tensor, nn

from bnrewrite import explain, optimize


def layer(x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()


class Latents(nn.Module):
    """What a model learns for every example: copied for each of the batch, then normalised."""

    def __init__(self, copied: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(4, 6) * 2 + 1)
        self.weight = nn.Parameter(torch.rand(6) + 0.5)
        self.copied = copied

    def forward(self, x: Tensor) -> Tensor:
        queries = layer(self.copied(self.latents, x.shape[0])) * self.weight
        return torch.bmm(queries, x)


COPIES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "expanded": lambda t, n: t.expand(n, -1, -1),
    "repeated": lambda t, n: t.unsqueeze(0).repeat(n, 1, 1),
    "reshaped": lambda t, n: t.repeat(n, 1, 1).view(n, 2, 2, 6).flatten(1, 2),
}


@pytest.mark.parametrize("kernels", ["auto", "composite", "generated"])
@pytest.mark.parametrize("way", COPIES)
def test_what_was_copied_is_normalised_once(way: str, kernels: str) -> None:
    torch.manual_seed(0)
    model, batches = Latents(COPIES[way]), [torch.randn(3, 6, 5) for _ in range(4)]

    def optimised(m: nn.Module) -> nn.Module:
        return optimize(m, backend="eager", kernels=kernels)

    assert contract_violations(model, optimised, batches) == []
    (site,) = explain(model, batches[0]).sites
    assert (site.status, site.eps) == ("rewritten", 1e-5)


def test_a_batch_that_grows() -> None:
    torch.manual_seed(0)
    model = Latents(COPIES["repeated"])
    batches = [torch.randn(3 + n, 6, 5) for n in range(4)]
    assert contract_violations(model, lambda m: optimize(m, dynamic=True), batches) == []


def test_copies_are_as_dense_as_the_users() -> None:
    def copied(t: Tensor) -> Tensor:
        return layer(t.expand(3, -1, -1))

    assert optimize(copied, backend="eager")(torch.randn(4, 6)).stride() == (24, 6, 1)


class Demodulated(nn.Module):
    """A convolution's weight for each example, of length one for each channel that goes out."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 5, 4, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        weight = (0.3 * self.weight).repeat(n, 1, 1, 1, 1)
        lengths = torch.rsqrt(weight.pow(2).sum([2, 3, 4]) + 1e-8)
        weight = weight * lengths.view(n, 5, 1, 1, 1)
        x = x.reshape(1, n * 4, *x.shape[2:])
        y = nn.functional.conv2d(x, weight.view(n * 5, 4, 3, 3), groups=n)
        return y.view(n, 5, *y.shape[2:])


def test_a_weight_for_each_example() -> None:
    torch.manual_seed(0)
    model, batches = Demodulated(), [torch.randn(2, 4, 6, 6) for _ in range(4)]
    assert contract_violations(model, lambda m: optimize(m, backend="eager"), batches) == []
    (site,) = explain(model, batches[0]).sites
    assert (site.kind, site.status) == ("lp_normalize", "rewritten")


def over_the_copies(x: Tensor) -> Tensor:
    y = x.expand(3, -1, -1)
    return (y - y.mean(0)) / (y.var(0, unbiased=False) + 1e-2).sqrt() + layer(x)


def copies_of_a_part(x: Tensor) -> Tensor:
    y = x[:2].repeat(2, 1)  # as many rows as x has, and not its rows
    return layer(x) * 0.5 + (x - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True) + 1e-2).sqrt()


def copies_next_to_each_other(x: Tensor) -> Tensor:
    y = x.repeat(1, 2).view(8, 6)  # the rows of the copies: 0, 0, 1, 1, ...
    return layer(y) + x.repeat(2, 1)  # 0, 1, ..., 0, 1, ...


@pytest.mark.parametrize("kernels", ["auto", "generated"])
@pytest.mark.parametrize("formula", [over_the_copies, copies_of_a_part, copies_next_to_each_other])
def test_copies_that_are_something_else(formula: Callable[[Tensor], Tensor], kernels: str) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return formula(x)

    torch.manual_seed(0)
    batches = [torch.randn(4, 6) * 2 + 1 for _ in range(4)]

    def optimised(m: nn.Module) -> nn.Module:
        return optimize(m, backend="eager", kernels=kernels)

    assert contract_violations(Model(), optimised, batches) == []
