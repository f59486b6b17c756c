"""PyTorch's own batch norms behind linear maps, in evaluation: folded, or left as they are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from behind_linear_maps import broken_promise
from torch import Tensor, nn

import bnrewrite
from bnrewrite.report import Report

pytestmark = pytest.mark.usefixtures("small")
X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def behind(linear: nn.Module, norm: nn.Module) -> nn.Module:
    """A frozen linear map and its norm, with statistics that are not 0 and 1."""
    torch.manual_seed(1)
    for each in (*norm.parameters(), *norm.buffers()):
        if each.is_floating_point():
            nn.init.uniform_(each, 0.5, 1.5)
    return nn.Sequential(linear, norm, nn.ReLU()).eval().requires_grad_(False)


PAIRS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: behind(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)), (2, 4, 9)),
    "conv2d": (
        lambda: behind(
            nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", bias=False), nn.BatchNorm2d(6)
        ),
        (2, 4, 6, 6),
    ),
    "conv3d": (
        lambda: behind(nn.Conv3d(4, 6, 2), nn.BatchNorm3d(6, affine=False)),
        (2, 4, 5, 4, 3),
    ),
    "conv_transpose2d": (
        lambda: behind(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)),
        (2, 4, 6, 6),
    ),
    "linear": (lambda: behind(nn.Linear(8, 6), nn.BatchNorm1d(6)), (5, 8)),
}


def conv() -> nn.Module:
    return behind(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))


@pytest.mark.parametrize("name", PAIRS)
def test_a_native_norm_is_folded(name: str, computed: list[bool]) -> None:
    build, shape = PAIRS[name]
    users, x = build(), torch.randn(shape)
    model = bnrewrite.optimize(copy.deepcopy(users), backend="eager")
    assert broken_promise(users, model(x), x) is None
    assert computed == [True]
    (site,) = bnrewrite.explain(model, x).sites
    assert (site.kind, site.lowering, site.module, site.eps) == ("affine", "fold", "1", 1e-5)


def test_it_is_trained_and_evaluated_again(computed: list[bool]) -> None:
    users = conv()
    model = bnrewrite.optimize(copy.deepcopy(users), backend="eager")
    for expected in ([True], [True, True]):
        assert broken_promise(users, model(X), X) is None
        assert computed == expected
        for each in (users, model):
            each.train().requires_grad_(True)
            torch.autograd.backward(each(X).square().mean())
            torch.optim.SGD(each.parameters(), lr=0.1).step()
            each.eval().requires_grad_(False).zero_grad()
    torch.testing.assert_close(model.state_dict(), users.state_dict())


class Shared(nn.Module):
    """The result of the convolution is used beside its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = conv()

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner[0](x)  # type: ignore[index]
        return self.inner[1](y) + y  # type: ignore[index,no-any-return]


def sites(model: nn.Module, x: Tensor = X, **options: Any) -> Report:
    optimised = bnrewrite.optimize(model, backend="eager", **options)
    report = bnrewrite.explain(optimised, x)
    assert torch.equal(optimised(x), copy.deepcopy(model)(x))
    return report


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (Shared, {}),
        (lambda: conv().requires_grad_(), {}),
        (lambda: conv().train(), {}),
        (lambda: behind(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)), {}),
        (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)).eval().requires_grad_(False), {}),
        (conv, {"disable": ["fold"]}),
        (conv, {"disable": ["affine"]}),
        (conv, {"only": ["layer_norm"]}),
        (conv, {"kernels": "native"}),
    ],
)
def test_what_is_not_folded_is_no_site(
    build: Callable[[], nn.Module], options: dict[str, Any], computed: list[bool]
) -> None:
    assert not sites(build(), **options).sites
    assert not computed


def test_a_result_that_is_small_beside_its_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bnrewrite.passes.costs.WEIGHTS", 2)
    assert not sites(conv()).sites
    assert sites(conv(), X.repeat(9, 1, 1, 1)).sites


def test_values_that_cannot_be_folded_are_left_to_the_operator(computed: list[bool]) -> None:
    users = conv()
    users[1].running_mean.fill_(1e4)  # type: ignore[index]
    model = bnrewrite.optimize(copy.deepcopy(users), backend="eager")
    assert torch.equal(model(X), users(X))
    assert computed == [False]


def test_a_norm_by_hand_behind_a_native_one(computed: list[bool]) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = conv()

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner[1](self.inner[0](x))  # type: ignore[index]
            mean = y.mean(1, keepdim=True)
            return (y - mean) / (y.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()  # type: ignore[no-any-return]

    users = Twice().eval()
    model = bnrewrite.optimize(copy.deepcopy(users), backend="eager")
    assert broken_promise(users, model(X), X) is None
    assert [site.kind for site in bnrewrite.explain(model, X).sites] == ["layer_norm", "affine"]
    assert computed == [True]
