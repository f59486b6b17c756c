"""Regions without a canonical form stay the user's, and the norms around them are rewritten."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from contract import contract_violations
from hand_written import UPDATES, BatchNorm, Layer, RowNorm, Running
from kept_regions import (
    KEPT,
    SIZE,
    Body,
    Two,
    a_branch_with_a_norm,
    a_function,
    a_function_with_a_norm,
    a_gradient,
    a_map,
    a_shared_norm,
    a_size,
    checkpointing,
    checkpointing_at_the_end,
    compare,
    inference,
    observed,
    parts_of_a_tuple,
    row_norm,
    statuses,
)
from torch import Tensor, nn

import bnrewrite

pytestmark = pytest.mark.filterwarnings("error::bnrewrite.BnrewriteWarning")


@pytest.mark.parametrize("grad_enabled", [True, False])
@pytest.mark.parametrize("body", KEPT)
def test_what_is_kept_is_the_users(body: Body, grad_enabled: bool) -> None:
    compare(Two(body), grad_enabled=grad_enabled)


@pytest.mark.parametrize("body", KEPT)
def test_what_is_kept_reaches_a_compiler(body: Body) -> None:
    compare(Two(body), backend="aot_eager")


@pytest.mark.parametrize("body", KEPT)
def test_norms_beside_what_is_kept_are_rewritten(body: Body) -> None:
    found = statuses(Two(body))
    beside = [status for module, status in found if module]
    assert len(beside) >= 1 + (body is not a_gradient)
    assert set(beside) == {"rewritten"}


BETWEEN = (a_function, a_shared_norm, parts_of_a_tuple)


@pytest.mark.parametrize(
    ("body", "update"),
    [each for each in product(BETWEEN, UPDATES) if each != (a_shared_norm, "in place")],
)
def test_statistics_of_norms_beside_what_is_kept(body: Body, update: str) -> None:
    users = Two(body, lambda size: BatchNorm(size, update))
    batches = [torch.randn(6, SIZE) for _ in range(3)]
    optimise = partial(bnrewrite.optimize, backend="eager")
    assert contract_violations(users, optimise, batches) == []


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("body", [a_function, checkpointing, a_map])
def test_autocast_around_what_is_kept(body: Body, inside: bool) -> None:
    torch.manual_seed(0)

    def cast(model: Two, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            return body(model, model.linear(x))

    users = Two(cast).eval()
    model = bnrewrite.optimize(copy.deepcopy(users), backend="eager")
    x = torch.randn(4, SIZE)
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        theirs, mine = users(x), model(x)
    assert mine.dtype == theirs.dtype
    torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)


def test_sizes_that_change() -> None:
    users = Two(a_size).double()
    model = bnrewrite.optimize(copy.deepcopy(users), backend="eager", dynamic=True)
    for count in (4, 5, 7):
        x = torch.randn(count, SIZE, dtype=torch.float64)
        torch.testing.assert_close(model(x), users(x))


def test_sites_beside_what_is_kept_are_numbered_through() -> None:
    model = bnrewrite.optimize(Two(a_function), only=1)
    report = bnrewrite.explain(model, torch.randn(4, SIZE, requires_grad=True))
    assert [site.status for site in report.sites] == ["left", "rewritten"]
    assert report.sites[0].reason == "site 0 (layer_norm) is not in only=['1']"
    model = bnrewrite.optimize(Two(a_function), only=0)
    report = bnrewrite.explain(model, torch.randn(4, SIZE, requires_grad=True))
    assert report.sites[1].reason == "site 1 (layer_norm) is not in only=['0']"


@pytest.mark.parametrize(
    ("body", "what", "reason", "inside"),
    [
        (a_function, "autograd.Function", "an autograd.Function has a backward of its own", 0),
        (a_function_with_a_norm, "autograd.Function", "has a backward of its own", 1),
        (a_branch_with_a_norm, "cond", "cond holds a graph of its own", 1),
        (a_map, "vmap", "a function transform changes how the code in it is computed", 0),
        (inference, "inference_mode", "inference_mode changes how the process computes", 0),
    ],
)
def test_the_report_names_what_is_kept(body: Body, what: str, reason: str, inside: int) -> None:
    report = bnrewrite.explain(Two(body), torch.randn(4, SIZE, requires_grad=True))
    (kept,) = report.kept
    assert kept.what == what
    assert reason in kept.reason
    assert kept.source.startswith("kept_regions.py:") or body is inference  # a mode has no line
    assert [site.status for site in report.sites] == ["rewritten", *["left"] * inside, "rewritten"]
    assert bnrewrite.explain(Two(checkpointing), torch.randn(4, SIZE)).kept == []


@pytest.mark.parametrize("body", [a_function, checkpointing_at_the_end, a_map])
def test_copies_of_a_model_with_kept_parts(body: Body) -> None:
    users = Two(body, lambda size: Running(size, at_the_end=True)).double()
    model = bnrewrite.optimize(copy.deepcopy(users), backend="eager")
    x = torch.randn(4, SIZE, dtype=torch.float64)
    for each in (users, model):
        list(observed(each, x, 0))
        each.zero_grad()
    assert list(model.state_dict()) == list(users.state_dict())
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    theirs = list(observed(users, x, 1))
    for other in (model, *others):
        for mine, expected in zip(observed(other, x, 1), theirs, strict=True):
            torch.testing.assert_close(mine, expected)


def test_sizes_that_only_a_run_can_tell() -> None:
    def body(model: Two, x: Tensor) -> Tensor:
        counts: list[int] = torch.tensor([2, 2]).tolist()
        y = torch.cat([row_norm(each.t()).t() for each in torch.split(model.first(x), counts)])
        return model.second(y)

    compare(Two(body))
    report = bnrewrite.explain(Two(body), torch.randn(4, SIZE, requires_grad=True))
    assert [site.status for site in report.sites] == ["rewritten"] * 4


def test_an_operator_asks_for_a_size_that_only_a_run_can_tell() -> None:
    def body(model: Two, x: Tensor) -> Tensor:
        counts: list[int] = torch.tensor([2, 2]).tolist()
        parts = torch.split(model.first(x), counts)
        return model.second(torch.cat([batch_norm(each) for each in parts]))

    def batch_norm(x: Tensor) -> Tensor:
        mean, variance = x.mean(0, keepdim=True), x.var(0, keepdim=True, unbiased=False)
        return (x - mean) / (variance + 1e-5).sqrt()

    compare(Two(body))
    model = bnrewrite.optimize(Two(body), backend="eager", kernels="native")
    report = bnrewrite.explain(model, torch.randn(4, SIZE, requires_grad=True))
    assert [each.reason for each in report.refusals] == [
        "one of its sizes is read out of a tensor, and known only when the graph runs"
    ] * 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_layer_is_called_as_it_is() -> None:
    class Mixed(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.norms = [BatchNorm(SIZE, "lerp")]  # registered nowhere
            self.first, self.second = BatchNorm(SIZE, "lerp"), RowNorm(SIZE)
            self.scripted: Any = torch.jit.script(nn.Linear(SIZE, SIZE))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.scripted(self.first(self.norms[0](x)))
            return self.second(y)

    users = Mixed()
    report = bnrewrite.explain(users, torch.randn(4, SIZE))
    assert [site.status for site in report.sites] == ["rewritten"] * 3
    x = torch.randn(4, SIZE)
    theirs = copy.deepcopy(users)(x)
    torch.testing.assert_close(bnrewrite.optimize(users, backend="eager")(x), theirs)
