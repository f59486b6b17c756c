"""Updates in place whose functional form is not the user's code as it stands.

Autograd does not see what is written through `x.data`; and the functional forms that PyTorch has of
updates through strides and windows have another gradient, or another value.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hand_written import Layer
from torch import Tensor, nn

import bnrewrite

pytestmark = pytest.mark.filterwarnings("error::bnrewrite.BnrewriteWarning")

SIZE = 8


class Kept(Layer):
    """Keeps two statistics of a batch as `body` says, and normalises."""

    def __init__(self, body: Callable[[Kept, Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(SIZE) + 0.5)
        self.m: Tensor
        self.v: Tensor
        self.register_buffer("m", torch.zeros(1, SIZE))
        self.register_buffer("v", torch.ones(1, SIZE))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x, x.mean(0, keepdim=True), x.var(0, keepdim=True)) * self.weight


def norm(x: Tensor, m: Tensor, v: Tensor) -> Tensor:
    return (x - m) / torch.sqrt(v + 1e-5)


def copied(model: Kept, x: Tensor, m: Tensor, v: Tensor) -> Tensor:
    model.m.data.copy_(m)
    model.v.detach().copy_(v)
    return norm(x, model.m, model.v)


def averaged(model: Kept, x: Tensor, m: Tensor, v: Tensor) -> Tensor:
    model.m.data.mul_(0.9).add_(0.1 * m)
    model.v.data.lerp_(v, 0.1)
    return norm(x, model.m, model.v)


def averaged_beside(model: Kept, x: Tensor, m: Tensor, v: Tensor) -> Tensor:
    model.m.data.mul_(0.9).add_(0.1 * m)
    model.v.data.lerp_(v, 0.1)
    return norm(x, m, v)


def assigned(model: Kept, x: Tensor, m: Tensor, v: Tensor) -> Tensor:
    model.m.data, model.v.data = m, v
    return norm(x, model.m, model.v)


def through_views(model: Kept, x: Tensor, m: Tensor, v: Tensor) -> Tensor:
    model.m.view(-1).data.copy_(m[0])
    model.v.data[0] = v[0]
    return norm(x, model.m, model.v) + norm(x, m, v)


def one_of_several_views(model: Kept, x: Tensor, m: Tensor, v: Tensor) -> Tensor:
    left, right = model.m.chunk(2, dim=1)
    left.data.copy_(m[:, :4])
    right.detach().copy_(m[:, 4:])
    return norm(x, model.m, v)


def read_before(model: Kept, x: Tensor, m: Tensor, v: Tensor) -> Tensor:
    old = model.m.data
    old.copy_(0.9 * old + 0.1 * m)
    return norm(x, model.m, v)


def read_through_the_alias(model: Kept, x: Tensor, m: Tensor, v: Tensor) -> Tensor:
    a, b = model.m.data, model.v.detach()
    a.copy_(m)
    b.copy_(v)
    return norm(x, a, model.v) + norm(x, model.m, b)


def a_row_of_a_result(model: Kept, x: Tensor, m: Tensor, v: Tensor) -> Tensor:
    y = x * model.weight
    y.data[0].mul_(2)
    return norm(y, y.mean(0), y.var(0))


def a_row_without_gradients(model: Kept, x: Tensor, m: Tensor, v: Tensor) -> Tensor:
    y = x * model.weight
    with torch.no_grad():
        y[0].mul_(2)
    return norm(y, y.mean(0), y.var(0))


def a_diagonal(model: Kept, x: Tensor, m: Tensor, v: Tensor) -> Tensor:
    y = norm(x, m, v)
    y.fill_diagonal_(1)
    return y * y


def strides(model: Kept, x: Tensor, m: Tensor, v: Tensor) -> Tensor:
    y = norm(x, m, v)
    y.as_strided((4,), (9,)).mul_(3)
    return y * y


def windows(model: Kept, x: Tensor, m: Tensor, v: Tensor) -> Tensor:
    y = norm(x, m, v)
    y.unfold(0, 2, 3)[..., 0].mul_(0.5)
    return y * y


DETACHED = (
    copied,
    averaged,
    averaged_beside,
    assigned,
    through_views,
    one_of_several_views,
    read_before,
    read_through_the_alias,
    a_row_of_a_result,
    a_row_without_gradients,
)
INEXACT = (a_diagonal, strides, windows)
Body = Callable[[Kept, Tensor, Tensor, Tensor], Tensor]


@pytest.mark.parametrize("body", [*DETACHED, *INEXACT])
def test_values_gradients_and_buffers_are_the_users(body: Body) -> None:
    torch.manual_seed(0)
    users = Kept(body).double()
    model = bnrewrite.optimize(copy.deepcopy(users), backend="eager")
    for _ in range(3):
        x = torch.randn(11, SIZE, dtype=torch.float64)
        cotangent, results = torch.randn_like(x), []
        for each in (users, model):
            given = x.clone().requires_grad_()
            y = each(given)
            gradients = torch.autograd.grad(y, [given, each.weight], cotangent)
            results.append([y.detach(), *gradients, each.m.clone(), each.v.clone()])
        torch.testing.assert_close(results[1], results[0])
        assert not model.m.requires_grad


@pytest.mark.parametrize("body", [averaged_beside, assigned, read_before])
def test_what_is_written_is_detached_and_the_norm_is_rewritten(body: Body) -> None:
    report = bnrewrite.explain(Kept(body), torch.randn(11, SIZE, requires_grad=True))
    assert "rewritten" in [site.status for site in report.sites]
    assert report.kept == []


@pytest.mark.parametrize(
    ("body", "what", "reason"),
    [
        (read_through_the_alias, "copy_", "written through a detached alias that is read with"),
        (a_row_of_a_result, "mul_", "a value with autograd history is updated where autograd is"),
        (a_diagonal, "fill_diagonal_", "updated in place through a view by strides or windows"),
        (strides, "mul_", "updated in place through a view by strides or windows"),
        (windows, "mul_", "updated in place through a view by strides or windows"),
    ],
)
def test_an_update_without_a_functional_form_is_kept(body: Body, what: str, reason: str) -> None:
    report = bnrewrite.explain(Kept(body), torch.randn(11, SIZE, requires_grad=True))
    assert what in [each.what for each in report.kept]
    assert any(reason in each.reason for each in report.kept)
    assert all(each.source.startswith("test_detached.py:") for each in report.kept)
