"""What a report calls a site: its kind, its eps, and what only looks like a norm."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnrewrite import Site, explain

EPS = 1e-6


def sites(formula: Callable[[Tensor], Tensor], *shape: int) -> list[Site]:
    """The sites of a formula when gradients are recorded."""
    torch.manual_seed(0)
    return explain(formula, torch.randn(*shape, requires_grad=True)).sites


def centred(x: Tensor, dim: int) -> Tensor:
    return x - x.mean(dim, keepdim=True)


def over(x: Tensor, dim: int, correction: int, eps: float = EPS) -> Tensor:
    return centred(x, dim) / (x.var(dim, correction=correction, keepdim=True) + eps).sqrt()


NAMES: dict[str, tuple[Callable[[Tensor], Tensor], str, float | None]] = {
    "a sum of squares": (
        lambda x: x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPS), "lp_normalize", EPS,
    ),
    "a sum of squares, times a number": (
        lambda x: x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPS) * 0.25,
        "lp_normalize", EPS,
    ),
    "a mean of squares, times a number": (
        lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * 8**-0.5,
        "rms_norm", EPS,
    ),
    "a mean that was a sum": (
        lambda x: 3 * x / torch.sqrt(x.square().sum(-1, keepdim=True) / 8 + EPS), "rms_norm", EPS,
    ),
    "no eps in a root": (
        lambda x: x * x.square().mean(-1, keepdim=True).rsqrt(), "rms_norm", None,
    ),
    "no eps in a norm": (lambda x: x / x.norm(dim=-1, keepdim=True), "lp_normalize", None),
    "no eps in a sum of magnitudes": (
        lambda x: x / x.abs().sum(-1, keepdim=True), "lp_normalize", None,
    ),
    "no eps in a variance": (lambda x: over(x, -1, 0, eps=0), "layer_norm", None),
    "the unbiased variance's eps": (lambda x: over(x, -1, 1), "layer_norm", EPS),
    "a batch norm of the transposed tensor": (lambda x: over(x.t(), 0, 0), "batch_norm", EPS),
    "a layer norm of rows": (lambda x: over(x, -1, 0), "layer_norm", EPS),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_kind_and_the_eps_are_those_of_the_code(name: str) -> None:
    formula, kind, eps = NAMES[name]
    (site,) = sites(formula, 16, 8)
    assert (site.kind, site.status) == (kind, "rewritten")
    assert site.eps == (None if eps is None else pytest.approx(eps))


@pytest.mark.parametrize("correction", [0, 1])
def test_an_instance_norm_by_a_view_is_one_whatever_its_variance(correction: int) -> None:
    (site,) = sites(lambda x: over(x.flatten(2), -1, correction).view_as(x), 4, 6, 5, 3)
    assert site.kind == "instance_norm"
    assert site.eps == pytest.approx(EPS)


def test_what_another_half_is_divided_by_is_listed_and_left() -> None:
    def halves(x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=-1)
        spread = torch.sqrt(right.var(-1, keepdim=True) + EPS)
        return torch.cat([centred(left, -1) / spread, right], -1)

    (site,) = sites(halves, 16, 8)
    assert site.status == "left"
    assert site.reason == "it divides by a statistic of another tensor than the one it centres"


def test_what_is_scaled_by_another_tensors_length_is_no_lookalike() -> None:
    assert sites(lambda x: x[..., :4] / x[..., 4:].norm(dim=-1, keepdim=True), 16, 8) == []


def test_a_native_normalize_is_no_find_however_often() -> None:
    assert (
        sites(lambda x: F.normalize(x, dim=-1) @ F.normalize(x.sigmoid(), dim=-1).t(), 4, 8) == []
    )


def test_statistics_from_before_a_graph_break_are_general() -> None:
    class Given(nn.Module):
        def forward(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
            return (x - mean) / torch.sqrt(var + EPS)

    x, mean, var = torch.randn(16, 8), torch.zeros(8), torch.ones(8)
    (stored,) = explain(Given(), x, mean, var).sites
    (computed,) = explain(Given(), x, mean.requires_grad_(), var.requires_grad_()).sites
    assert (stored.kind, computed.kind) == ("affine", "general")
