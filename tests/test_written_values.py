"""Parameters and results that the forward writes in place where autograd is off."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hand_written import Layer, RowNorm
from kept_regions import (
    SIZE,
    Body,
    Two,
    compare,
    statuses,
    steep,
)
from torch import Tensor, nn

import bnrewrite

pytestmark = pytest.mark.filterwarnings("error::bnrewrite.BnrewriteWarning")


class Forced(Layer):
    """A layer that normalises its weight in place before it is used, as EDM2's do."""

    def __init__(self, body: Callable[[Forced], None] | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(SIZE, SIZE))
        self.norm = RowNorm(SIZE)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.body is not None:
            self.body(self)
        return self.norm(x @ self.normalized().t())

    def normalized(self) -> Tensor:
        length: Tensor = torch.linalg.vector_norm(self.weight, dim=1, keepdim=True)
        return self.weight / (length + 1e-4)


def under_no_grad(layer: Forced) -> None:
    with torch.no_grad():
        layer.weight.copy_(layer.normalized())


def through_its_data(layer: Forced) -> None:
    layer.weight.data.copy_(layer.normalized())


def through_a_view(layer: Forced) -> None:
    with torch.no_grad():
        layer.weight[0].mul_(0.5)


@pytest.mark.parametrize("body", [under_no_grad, through_its_data, through_a_view])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_parameter_written_in_the_forward(body: Callable[[Forced], None], backend: str) -> None:
    compare(nn.Sequential(Forced(body), Forced(body)), backend)


def test_norms_of_a_parameter_written_in_the_forward_are_rewritten() -> None:
    found = statuses(nn.Sequential(Forced(under_no_grad), Forced(under_no_grad)))
    written, read, norm = ("{}", "rewritten"), ("{}", "rewritten"), ("{}.norm", "rewritten")
    expected = [(name.format(i), status) for i in "01" for name, status in (written, read, norm)]
    assert found == expected


def updated_behind(model: Two, x: Tensor) -> Tensor:
    y = model.first(x)
    with torch.no_grad():
        y.mul_(2)
    return model.second(y)


def its_data_updated_behind(model: Two, x: Tensor) -> Tensor:
    y = model.first(x)
    y.data.add_(1)
    return model.second(steep(y))


def its_view_updated_behind(model: Two, x: Tensor) -> Tensor:
    y = model.first(x)
    rows = y.view(-1)
    with torch.no_grad():
        rows.mul_(2)
    return model.second(y)


@pytest.mark.parametrize("body", [updated_behind, its_data_updated_behind, its_view_updated_behind])
def test_a_norm_whose_result_is_updated_where_autograd_is_off_stays(body: Body) -> None:
    compare(Two(body))
    report = bnrewrite.explain(Two(body), torch.randn(4, SIZE, requires_grad=True))
    assert [site.status for site in report.sites] == ["left", "rewritten"]
    assert report.sites[0].reason == (
        "its result is updated in place by code that is kept as it is"
    )
