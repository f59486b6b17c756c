"""Buffers: same object, right value, no history, however the user's code updates them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from contract import contract_violations
from hand_written import UPDATES, BatchNorm, Net
from torch import Tensor, nn

import bnrewrite


@pytest.fixture(autouse=True)
def repeatable() -> None:
    torch.manual_seed(0)


def batches(*sizes: int) -> list[Tensor]:
    return [torch.randn(size, 3, 8, 8) for size in sizes]


WITH_A_TRACED_BACKWARD = ("rebind", "in place", "lerp")  # aot_eager differentiates the graph itself


@pytest.mark.parametrize(
    ("update", "backend"),
    [(each, "eager") for each in UPDATES]
    + [(each, "aot_eager") for each in WITH_A_TRACED_BACKWARD],
)
def test_every_way_to_update_keeps_the_contract(update: str, backend: str) -> None:
    torch.manual_seed(0)
    violations = contract_violations(
        Net(update=update),
        lambda model: bnrewrite.optimize(model, backend=backend),
        batches(4, 4, 5, 6, 4),
    )
    assert violations == []


def _identity(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {name: (id(buffer), buffer.data_ptr()) for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("update", UPDATES)
def test_a_buffer_keeps_its_object_and_its_memory(update: str) -> None:
    model = bnrewrite.optimize(Net(update=update), backend="eager")
    before = _identity(model)
    for x in batches(4, 4, 5):
        torch.autograd.backward(model(x).sum())
    assert _identity(model) == before
    assert all(buffer.grad_fn is None for buffer in model.buffers())


def test_history_left_by_earlier_steps_is_cut_off() -> None:
    model = Net()
    model(torch.randn(2, 3, 8, 8))
    assert model.norm.running_mean.grad_fn is not None
    bnrewrite.optimize(model, backend="eager")
    torch.autograd.backward(model(torch.randn(2, 3, 8, 8)).sum())
    torch.autograd.backward(model(torch.randn(2, 3, 8, 8)).sum())
    assert model.norm.running_mean.grad_fn is None


class RunningNorm(BatchNorm):
    """Normalises with the statistics that it has just updated; raises at the second step."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((0, 2, 3))
        variance = x.var((0, 2, 3), unbiased=False)
        self.running_mean = 0.9 * self.running_mean + 0.1 * mean
        self.running_var = 0.9 * self.running_var + 0.1 * variance
        y = (x - self.running_mean[:, None, None]) / torch.sqrt(
            self.running_var[:, None, None] + 1e-5
        )
        return y * self.weight[:, None, None] + self.bias[:, None, None]


def test_a_norm_by_updated_statistics_trains_where_the_users_raises() -> None:
    users = RunningNorm(4)
    optimised = bnrewrite.optimize(copy.deepcopy(users), backend="eager")
    xs = [torch.randn(2, 4, 5, 5, requires_grad=True) for _ in range(3)]
    torch.autograd.backward(users(xs[0]).square().sum())
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.backward(users(xs[1]).square().sum())
    for x in xs:
        torch.autograd.backward(optimised(x).square().sum())
    assert optimised.running_mean.grad_fn is None


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("norm", [BatchNorm, RunningNorm])
def test_two_forwards_before_a_backward(norm: type[BatchNorm], backend: str) -> None:
    users = norm(4, "rebind detached").double()
    model = bnrewrite.optimize(copy.deepcopy(users), backend=backend)
    first, second = torch.randn(2, 2, 4, 5, 5, dtype=torch.double)
    for each in (users, model):
        a = each(first)
        saved = {name: value.clone() for name, value in each.named_buffers()}
        b = each(second)
        each.load_state_dict(saved, strict=False)
        torch.autograd.backward(a.square().mean() + b.pow(3).mean())
    torch.testing.assert_close(model.weight.grad, users.weight.grad)
    torch.testing.assert_close(model.running_mean, users.running_mean.detach())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_eval_forwards_around_a_load_state_dict_keep_their_backward(backend: str) -> None:
    users = BatchNorm(4, "rebind detached").double().eval()
    model = bnrewrite.optimize(copy.deepcopy(users), backend=backend)
    x = torch.randn(2, 4, 5, 5, dtype=torch.double)
    for each in (users, model):
        torch.autograd.backward(each(x).square().sum())
    torch.testing.assert_close(model.weight.grad, users.weight.grad)


class Returns(BatchNorm):
    """What it rebinds is also given away."""

    def __init__(self, how: str) -> None:
        super().__init__(4)
        self.how = how
        self.kept: list[Tensor] = []
        self.last = torch.zeros(4)

    def forward(self, x: Tensor) -> Any:
        mean = x.mean((0, 2, 3))
        old = self.running_mean
        new = (0.9 * self.running_mean + 0.1 * mean).detach()
        self.running_mean = new
        if self.how == "new value":
            return x - mean[:, None, None], new
        if self.how == "old value":
            return x - mean[:, None, None], old
        if self.how == "view of the old value":
            return x - mean[:, None, None], old.view(2, 2)
        if self.how == "list":
            self.kept.append(new)
        elif self.how == "attribute":
            self.last = new
        elif self.how == "swap":
            self.running_var = old
        elif self.how == "graph break":
            torch._dynamo.graph_break()
            self.running_mean = self.running_mean * 2
            return x + new[:, None, None]
        elif self.how == "twice":
            self.running_mean = self.running_mean * 2
        return x - mean[:, None, None]


@pytest.mark.parametrize(
    "how",
    [
        "new value",
        "old value",
        "view of the old value",
        "list",
        "attribute",
        "swap",
        "graph break",
        "twice",
    ],
)
def test_a_rebound_value_that_goes_elsewhere_stays_right(how: str) -> None:
    users = Returns(how)
    model = bnrewrite.optimize(copy.deepcopy(users), backend="eager")
    given: list[tuple[object, object]] = []
    for _ in range(3):
        x = torch.randn(2, 4, 5, 5)
        given.append((model(x), users(x)))
        given.append((list(model.kept), list(users.kept)))
        given.append((model.last, users.last))
        torch.testing.assert_close(dict(model.state_dict()), dict(users.state_dict()))
    for mine, theirs in given:  # later steps have not changed what earlier ones gave away
        torch.testing.assert_close(mine, theirs)


class Recurrent(nn.Module):
    """A state that is differentiated through time."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.weight = nn.Parameter(torch.rand(4, 4))
        self.state: Tensor
        self.register_buffer("state", torch.zeros(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        new = torch.tanh(x + self.state @ self.weight)
        if self.how == "rebind":
            self.state = new
        x = self.state * 2 if self.how == "rebind" else new * 2
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        return (x - mean) / torch.sqrt(variance + 1e-5)


def test_a_recurrent_state_keeps_its_history() -> None:
    users = Recurrent("rebind").double()
    model = bnrewrite.optimize(copy.deepcopy(users), backend="eager")
    xs = [torch.randn(2, 4, dtype=torch.double) for _ in range(3)]
    for each in (users, model):
        torch.autograd.backward([each(x).pow(3).sum() for x in xs])
    torch.testing.assert_close(model.weight.grad, users.weight.grad)


class ChangesShape(nn.Module):
    """Its buffers become tensors of another shape and another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.a: Tensor
        self.b: Tensor
        self.register_buffer("a", torch.zeros(4))
        self.register_buffer("b", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.a = (self.a + x.mean(0))[None] if self.a.dim() == 1 else self.a + x.mean(0)
        self.b = self.b.double() + x.mean(0)
        return x - x.mean(-1, keepdim=True)


def test_a_rebinding_that_changes_shape_or_dtype_stays_a_rebinding() -> None:
    users = ChangesShape()
    model = bnrewrite.optimize(copy.deepcopy(users), backend="eager")
    for _ in range(3):
        x = torch.randn(3, 4)
        torch.testing.assert_close(model(x), users(x))
        assert model.a.shape == users.a.shape
        assert model.b.dtype == users.b.dtype
        torch.testing.assert_close(dict(model.state_dict()), dict(users.state_dict()))


class PlainAttribute(nn.Module):
    """Keeps its running mean where no state_dict finds it."""

    def __init__(self) -> None:
        super().__init__()
        self.running_mean = torch.zeros(4)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(0)
        self.running_mean = (0.9 * self.running_mean + 0.1 * mean).detach()
        return (x - mean) / torch.sqrt(x.var(0, unbiased=False) + 1e-5)


def test_a_plain_attribute_is_still_rebound() -> None:
    users = PlainAttribute()
    model = bnrewrite.optimize(copy.deepcopy(users), backend="eager")
    before = model.running_mean
    for _ in range(3):
        x = torch.randn(8, 4)
        torch.testing.assert_close(model(x), users(x))
    assert model.running_mean is not before
    torch.testing.assert_close(model.running_mean, users.running_mean)


def test_a_cumulative_average_needs_one_graph() -> None:
    torch._dynamo.utils.counters.clear()
    model = bnrewrite.optimize(Net(update="cumulative average"), backend="eager")
    for x in batches(4, 4, 4, 4, 4, 4):
        model(x)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) == 0


class UpdatesItsInput(nn.Module):
    """Halves what it was given, in place, and normalises it."""

    def forward(self, y: Tensor) -> Tensor:
        y.div_(2.0)
        return y / y.pow(2).sum(-1, keepdim=True).sqrt()


@pytest.mark.parametrize("requires_grad", [False, True])
def test_an_input_updated_in_place(requires_grad: bool) -> None:
    users, model = UpdatesItsInput(), bnrewrite.optimize(UpdatesItsInput(), backend="eager")
    seen = []
    for each in (users, model):
        torch.manual_seed(1)
        x = torch.randn(3, 4, requires_grad=requires_grad)
        y = x * 1
        out = each(y)
        if requires_grad:
            torch.autograd.backward(out.pow(3).sum() + y.pow(2).mul(torch.arange(4)).sum())
        seen.append((out.detach(), y.detach(), x.grad))
    torch.testing.assert_close(seen[1], seen[0])


class UpdatesItsParameter(nn.Module):
    """Clamps its weight without gradients and then uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.clamp_(-0.5, 0.5)
        mean = x.mean(-1, keepdim=True)
        return (x - mean) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5) * self.weight


@pytest.mark.filterwarnings("ignore::bnrewrite.BnrewriteWarning")
def test_a_parameter_updated_in_place_still_gets_its_gradient() -> None:
    users = UpdatesItsParameter().double()
    model = bnrewrite.optimize(copy.deepcopy(users), backend="eager")
    for _ in range(2):
        x = torch.randn(3, 4, dtype=torch.double)
        for each in (users, model):
            torch.autograd.backward(each(x).pow(3).sum())
    torch.testing.assert_close(model.weight.grad, users.weight.grad)
    torch.testing.assert_close(model.weight, users.weight)
