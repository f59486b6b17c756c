"""Regions without a canonical form stay the user's, and the norms around them are rewritten."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from contract import contract_violations
from hand_written import UPDATES, BatchNorm, Layer, RowNorm, Running
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import bnrewrite

pytestmark = pytest.mark.filterwarnings("error::bnrewrite.BnrewriteWarning")

SIZE = 8
Body = Callable[["Two", Tensor], Tensor]


class Two(Layer):
    """Two norms and a linear layer, used as `body` says."""

    def __init__(self, body: Body, norm: Callable[[int], Layer] = RowNorm) -> None:
        super().__init__()
        self.first: Layer = norm(SIZE)
        self.second: Layer = norm(SIZE)
        self.linear = nn.Linear(SIZE, SIZE)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


class Steep(torch.autograd.Function):
    """A sine whose backward is the user's: seven times the gradient, not the cosine."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[0]
        return gradients[0] * 7 * x


class SteepNorm(torch.autograd.Function):
    """A norm whose backward is the user's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        y: Tensor = ctx.saved_tensors[0]
        return gradients[0] * 3 * y


def steep(x: Tensor, function: Any = Steep) -> Tensor:
    y = function.apply(x)
    assert isinstance(y, Tensor)
    return y


def recomputed(function: Callable[[Tensor], Tensor], x: Tensor, **settings: Any) -> Tensor:
    y = checkpoint(function, x, **{"use_reentrant": False, **settings})
    assert isinstance(y, Tensor)
    return y


def a_function(model: Two, x: Tensor) -> Tensor:
    return model.second(steep(model.first(x)))


def a_function_with_a_norm(model: Two, x: Tensor) -> Tensor:
    return model.second(steep(model.first(x), SteepNorm))


def a_shared_norm(model: Two, x: Tensor) -> Tensor:
    return model.first(steep(model.first(x)))


def checkpointing(model: Two, x: Tensor) -> Tensor:
    def inner(y: Tensor) -> Tensor:
        return torch.dropout(model.linear(model.second(y)), 0.4, model.training)

    return model.first(recomputed(inner, model.first(x)))


def checkpointing_at_the_end(model: Two, x: Tensor) -> Tensor:
    return recomputed(lambda y: model.second(model.linear(y)), model.first(x))


def checkpointing_twice(model: Two, x: Tensor) -> Tensor:
    def inner(y: Tensor) -> Tensor:
        return model.second(recomputed(lambda z: model.first(z).sin(), y))

    return model.first(recomputed(inner, model.first(x)))


def reentrant_checkpointing(model: Two, x: Tensor) -> Tensor:
    def inner(y: Tensor) -> Tensor:
        return torch.dropout(model.second(y), 0.4, model.training)

    return model.first(recomputed(inner, model.first(x), use_reentrant=True))


def a_branch(model: Two, x: Tensor) -> Tensor:
    y = model.first(x)
    return model.second(torch.cond(y.sum() > 0, torch.sin, torch.cos, (y,)))


def a_map(model: Two, x: Tensor) -> Tensor:
    return model.second(torch.func.vmap(lambda row: row.sin() / row.norm())(model.first(x)))


def a_gradient(model: Two, x: Tensor) -> Tensor:
    return model.second(torch.func.grad(lambda y: (y**3).sum())(model.first(x)))


def a_directional_derivative(model: Two, x: Tensor) -> Tensor:
    derivative: tuple[Any, ...] = torch.func.jvp(torch.sin, (model.first(x),), (x,))
    return model.second(derivative[0] * derivative[1])


def parts_of_a_tuple(model: Two, x: Tensor) -> Tensor:
    left, right = model.first(torch.cat([x, x])).chunk(2)
    return model.second(steep(left) * right)


def a_size(model: Two, x: Tensor) -> Tensor:
    count = x.shape[0]
    y = steep(model.first(x)).view(count, 2, SIZE // 2)
    return model.second(y.reshape(count, SIZE) / count)


def no_gradients(model: Two, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = model.second(torch.func.vmap(torch.sin)(model.first(x)))
    return model.second(x + y)


def inference(model: Two, x: Tensor) -> Tensor:
    with torch.inference_mode():
        y = model.first(x)
    return model.second(x + y)


def chosen_attention(model: Two, x: Tensor) -> Tensor:
    y = model.first(x)[None]
    with sdpa_kernel(SDPBackend.MATH):
        y = nn.functional.scaled_dot_product_attention(y, y, y)
    return model.second(y[0])


def an_update_of_what_was_kept(model: Two, x: Tensor) -> Tensor:
    y = steep(model.first(x)) * 1
    y += x
    return model.second(y)


KEPT = (
    a_function,
    a_function_with_a_norm,
    a_shared_norm,
    checkpointing,
    checkpointing_at_the_end,
    checkpointing_twice,
    reentrant_checkpointing,
    a_branch,
    a_map,
    a_gradient,
    a_directional_derivative,
    parts_of_a_tuple,
    a_size,
    no_gradients,
    inference,
    chosen_attention,
    an_update_of_what_was_kept,
)


def observed(model: nn.Module, x: Tensor, step: int) -> Iterator[Any]:
    """All that one step of training, or of use, shows."""
    torch.manual_seed(step)
    x = x.clone().requires_grad_()
    y = model(x)
    if y.requires_grad:
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(step)).to(y))
    yield from (y.detach(), x.grad, torch.get_rng_state())
    yield {name: value.clone() for name, value in model.state_dict().items()}
    yield [None if each.grad is None else each.grad.clone() for each in model.parameters()]


def compare(users: nn.Module, backend: str = "eager", grad_enabled: bool = True) -> None:
    """Both run four steps in float64, the last one in eval mode; nobody can tell which is which."""
    torch.manual_seed(0)
    users = users.double()
    for parameter in users.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    model = bnrewrite.optimize(copy.deepcopy(users), backend=backend)
    identities = [id(each) for each in (*model.parameters(), *model.buffers())]
    with torch.set_grad_enabled(grad_enabled):
        for step in range(4):
            x = torch.randn(4, SIZE, dtype=torch.float64)
            for each in (users, model):
                each.train(step < 3)
            pairs = zip(observed(users, x, step), observed(model, x, step), strict=True)
            for theirs, mine in pairs:
                torch.testing.assert_close(mine, theirs)
    assert identities == [id(each) for each in (*model.parameters(), *model.buffers())]


def statuses(model: nn.Module) -> list[tuple[str, str]]:
    report = bnrewrite.explain(model, torch.randn(4, SIZE, requires_grad=True))
    return [(site.module, site.status) for site in report.sites]


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


CHECKPOINTING = (
    checkpointing,
    checkpointing_at_the_end,
    checkpointing_twice,
    reentrant_checkpointing,
)


@pytest.mark.parametrize("at_the_end", [True, False])
@pytest.mark.parametrize("body", CHECKPOINTING)
def test_statistics_in_a_checkpoint_are_updated_as_often_as_the_users(
    body: Body, at_the_end: bool
) -> None:
    compare(Two(body, partial(Running, at_the_end=at_the_end)))
    compare(Two(body, partial(Running, at_the_end=at_the_end)), grad_enabled=False)


def test_a_norm_with_statistics_in_a_checkpoint_stays_and_is_found() -> None:
    model = Two(checkpointing, Running)
    report = bnrewrite.explain(model, torch.randn(4, SIZE, requires_grad=True))
    assert [(site.module, site.status) for site in report.sites] == [
        ("first", "rewritten"),
        ("second", "left"),
        ("first", "rewritten"),
    ]
    assert "runs it again for the backward" in str(report.sites[1].reason)
    found = [each.message for each in report.findings if each.code == "two-updates-per-step"]
    assert len(found) == 1
    assert found[0].startswith("second.mean: ")
    with torch.no_grad():  # it runs once
        assert {status for _, status in statuses(model)} == {"rewritten"}
    assert bnrewrite.explain(model.eval(), torch.randn(4, SIZE)).findings == []
    assert {status for _, status in statuses(model)} == {"rewritten"}


def test_a_policy_of_what_is_saved_is_the_users() -> None:
    products = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    context = partial(create_selective_checkpoint_contexts, products)

    def body(model: Two, x: Tensor) -> Tensor:
        return recomputed(
            lambda y: model.linear(model.second(y)), model.first(x), context_fn=context
        )

    compare(Two(body))
    assert statuses(Two(body)) == [("first", "rewritten"), ("second", "left")]


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


def a_branch_with_a_norm(model: Two, x: Tensor) -> Tensor:
    y = model.first(x)
    return model.second(torch.cond(y.sum() > 0, row_norm, torch.cos, (y,)))


def row_norm(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-5).sqrt()


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
    assert kept.source.startswith("test_opaque.py:") or body is inference  # a mode has no line
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
    assert report.sites[0].status == "rewritten"
    assert len(report.refusals) >= 2
    assert {each.reason for each in report.refusals} == {
        "one of its sizes is read out of a tensor, and known only when the graph runs"
    }


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
