"""Models whose norms become kernels of their own: the contract, transforms, copies, threads."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract import check_threads, contract_violations
from torch import Tensor, nn
from torch.autograd import forward_ad

from bnrewrite import explain, optimize
from bnrewrite.kernels.generated import kernel, runtime

pytestmark = pytest.mark.usefixtures("repeatable")
KEEP: dict[str, Any] = {"dim": -1, "keepdim": True}


def generated(model: Any) -> Any:
    return optimize(model, backend="eager", kernels="generated")


class Running(nn.Module):
    """A batch norm as a forum has it: it normalises with what it has just stored."""

    mean: Tensor
    variance: Tensor

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(1, channels, 1, 1) + 0.5)
        self.bias = nn.Parameter(torch.randn(1, channels, 1, 1))
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("variance", torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            mean = x.mean((0, 2, 3), keepdim=True)
            variance = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
            self.mean = (0.9 * self.mean + 0.1 * mean).detach()
            self.variance = (0.9 * self.variance + 0.1 * variance).detach()
        return (x - self.mean) / torch.sqrt(self.variance + 1e-5) * self.weight + self.bias


class Batch(Running):
    """With the moments of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        if self.training:
            count = x.numel() / x.size(1)
            with torch.no_grad():
                self.mean.mul_(0.9).add_(0.1 * mean.view(1, -1, 1, 1))
                stored = 0.1 * variance * count / (count - 1)
                self.variance.mul_(0.9).add_(stored.view(1, -1, 1, 1))
        else:
            mean, variance = self.mean.flatten(), self.variance.flatten()
        y = (x - mean[:, None, None]) / torch.sqrt(variance[:, None, None] + 1e-5)
        return y * self.weight + self.bias


class Groups(Running):
    """Three groups of channels."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = x.reshape(n, 3, c // 3, h, w)
        y = y - y.mean((2, 3, 4), keepdim=True)
        y = y / (y.pow(2).mean((2, 3, 4), keepdim=True) + 1e-5).sqrt()
        return y.reshape(n, c, h, w) * self.weight + self.bias


class Rows(nn.Module):
    """A layer norm by the deviation, then a mean-square norm in single precision."""

    def __init__(self, size: int = 24) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)
        self.bias = nn.Parameter(torch.randn(size))

    def forward(self, x: Tensor) -> Tensor:
        x = self.weight * (x - x.mean(**KEEP)) / (x.std(**KEEP) + 1e-3) + self.bias
        wide = x if x.dtype == torch.float64 else x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(**KEEP) + 1e-6)
        return self.weight * wide.to(x.dtype)


def images(*shape: int) -> Tensor:
    return torch.randn(*(shape or (3, 6, 5, 7))) * 2 + 0.5


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "running": (Running, images),
    "batch": (Batch, images),
    "batch, channels last": (Batch, lambda: images().to(memory_format=torch.channels_last)),
    "groups": (Groups, images),
    "groups, channels last": (Groups, lambda: images().to(memory_format=torch.channels_last)),
    "rows": (Rows, lambda: torch.randn(3, 4, 24)),
    "rows of a transposed tensor": (Rows, lambda: torch.randn(24, 4, 3).permute(2, 1, 0)),
    "rows in half precision": (
        lambda: Rows().bfloat16(),
        lambda: torch.randn(3, 4, 24, dtype=torch.bfloat16),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_contract(name: str) -> None:
    build, draw = MODELS[name]
    model = build()
    assert contract_violations(model, generated, [draw() for _ in range(4)]) == []
    sites = explain(generated(copy.deepcopy(model)), draw()).sites
    assert {site.lowering for site in sites} == {"generated"}


@pytest.mark.parametrize("name", ["running", "batch", "groups", "rows"])
def test_transforms_of_functions(name: str) -> None:
    """They see operations: no kernel hides from them what it computes."""
    build, draw = MODELS[name]
    users = build().eval() if name in ("running", "batch") else build()
    model, x = generated(copy.deepcopy(users)), draw()
    model(x)
    tangent = torch.randn_like(x)
    weights: dict[str, Tensor] = dict(users.named_parameters())

    def square(module: nn.Module) -> Callable[[dict[str, Tensor]], Tensor]:
        return lambda given: (torch.func.functional_call(module, given, (x,)) ** 2).sum()

    def close(of: Callable[[nn.Module], Any]) -> None:
        torch.testing.assert_close(of(model), of(users), rtol=1e-4, atol=1e-4)

    close(lambda m: torch.vmap(m)(torch.stack([x, 2 * x])))
    close(lambda m: torch.func.jvp(m, (x,), (tangent,)))
    close(lambda m: torch.func.grad(lambda given: (m(given) ** 2).sum())(x))
    close(lambda m: torch.func.grad(square(m))(weights))


def test_forward_mode() -> None:
    users, x, tangent = Rows(), torch.randn(3, 4, 24), torch.randn(3, 4, 24)
    model = generated(copy.deepcopy(users))
    found = []
    for each in (model, users):
        with forward_ad.dual_level():
            dual = each(forward_ad.make_dual(x, tangent))  # type: ignore[no-untyped-call]
            found.append(tuple(forward_ad.unpack_dual(dual)))  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found[0], found[1])


def test_batches_of_cotangents() -> None:
    users = Rows()
    model = generated(copy.deepcopy(users))
    cotangents = torch.randn(2, 3, 4, 24)
    found = []
    x = torch.randn(3, 4, 24, requires_grad=True)
    for each in (model, users):
        for again in (False, True):
            found.append(
                torch.autograd.grad(
                    each(x), x, cotangents, is_grads_batched=True, create_graph=again
                )[0]
            )
    torch.testing.assert_close(found[:2], found[2:])


def test_second_derivatives_where_norms_share_a_weight() -> None:
    """The second norm's input is made of the weight that it takes itself."""
    users = Rows().double()
    model = generated(copy.deepcopy(users))
    x, cotangent = torch.randn(2, 3, 4, 24, dtype=torch.float64)
    found = []
    for each in (model, users):
        x = x.detach().requires_grad_()
        leaves = [x, each.weight, each.bias]
        first = torch.autograd.grad((each(x) ** 3 * cotangent).sum(), leaves, create_graph=True)
        total = torch.stack([(g * g.detach().cos()).sum() for g in first]).sum()
        found.append([*first, *torch.autograd.grad(total, leaves)])
    torch.testing.assert_close(*found)


def test_copies_and_pickles() -> None:
    model, x = generated(Batch()), images()
    model(x)
    for pickled in (False, True):
        other = pickle.loads(pickle.dumps(model)) if pickled else copy.deepcopy(model)
        before = model.mean.clone()
        torch.testing.assert_close(other(x), model(x))
        torch.testing.assert_close(other.mean, model.mean)
        assert other.mean.data_ptr() != model.mean.data_ptr()
        assert not torch.equal(before, model.mean)


def test_threads_that_call_the_same_model() -> None:
    users = Rows()
    model = generated(copy.deepcopy(users))
    inputs = [torch.randn(16, 4, 24) for _ in range(8)]
    model(inputs[0])
    check_threads(model, inputs)


def test_a_compiled_function_around_a_model() -> None:
    users = Rows()
    model = generated(copy.deepcopy(users))
    x = torch.randn(3, 4, 24)
    outer = torch.compile(lambda x: model(x.sin()) + 1, backend="eager")
    torch.testing.assert_close(outer(x), users(x.sin()) + 1)


def test_sizes_that_change_from_call_to_call() -> None:
    users = Rows()
    model = optimize(copy.deepcopy(users), backend="eager", kernels="generated", dynamic=True)
    for rows in (2, 5, 3, 1):
        x = torch.randn(rows, 4, 24)
        torch.testing.assert_close(model(x), users(x))


def test_a_bias_that_changes_before_the_backward() -> None:
    """No gradient depends on its value: a step of an optimiser in between is the user's right."""
    users = Rows().double()
    found = []
    for model in (users, generated(copy.deepcopy(users))):
        x = torch.ones(3, 4, 24, dtype=torch.float64).cumsum(-1).sin().requires_grad_()
        y = model(x)
        with torch.no_grad():
            model.bias.add_(1)
        leaves = [x, model.weight, model.bias]
        first = torch.autograd.grad((y**3).sum(), leaves, create_graph=True)
        found.append([*first, *torch.autograd.grad(first[0].square().sum(), leaves[:2])])
    torch.testing.assert_close(*found)


def test_more_sizes_than_are_remembered() -> None:
    """Each has its backward, also those that were forgotten before it."""
    runtime.build()
    users = Rows()
    model = optimize(copy.deepcopy(users), backend="eager", kernels="generated", dynamic=True)
    inputs = [torch.randn(rows, 4, 24, requires_grad=True) for rows in range(2, 72)]
    for values in ([model(x) for x in inputs], [users(x) for x in inputs]):
        for value in values:
            (value * value.detach().sin()).sum().backward()
    torch.testing.assert_close(model.weight.grad, users.weight.grad, rtol=1e-4, atol=1e-4)


def test_statistics_of_two_axes_that_are_returned() -> None:
    """As many dimensions as the user's, and one may be changed without the other."""

    def norm(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        variance, mean = torch.var_mean(x, (2, 3), correction=0)
        y = (x - mean[..., None, None]) / torch.sqrt(variance[..., None, None] + 1e-5)
        return y, mean.detach(), variance.detach()

    x = images()
    y, mean, variance = generated(norm)(x)
    mean.zero_()
    torch.testing.assert_close((y, variance), norm(x)[::2])


def distance(x: Tensor, of: Tensor) -> Tensor:
    return (x - x.mean(**KEEP)) / (x.std(**KEEP) + 1e-3) * (x.mean(**KEEP) - 99 - of).pow(2)


@pytest.mark.parametrize("size", [1, 64])
def test_squares_of_distances_are_not_added_up_from_rounded_parts(size: int) -> None:
    """(M - 99 - t)^2 = M^2 - M (198 + 2 t) + (99 + t)^2, of which little is left."""
    of = torch.rand(size)
    x = torch.randn(6, 64) + 100
    exact = distance(x.double(), of.double())
    user = (distance(x, of) - exact).abs().max()
    assert (generated(distance)(x, of) - exact).abs().max() <= 3 * user


def standardised(x: Tensor) -> Tensor:
    return (x - x.mean(**KEEP)) / (x.std(**KEEP) + 1e-3)


WITHOUT_KERNEL: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "a mean of magnitudes": (
        lambda x, _: (x - x.mean(**KEEP)) / (x.abs().mean(**KEEP) + 1),
        "another statistic than the mean and the variance",
    ),
    "statistics of two axes": (
        lambda x, _: (x - x.mean(0)) / (x.std(**KEEP) + 1e-3),
        "another statistic than the mean and the variance",
    ),
    "a variance of each element": (
        lambda x, w: (x - x.mean(**KEEP)) / (x.var(**KEEP) + w[0].square()).sqrt(),
        "a function of a statistic and of a tensor inside its group",
    ),
    "a rounded distance": (
        lambda x, w: standardised(x) * (x.mean(**KEEP) - 99 - w[:, :1]).pow(2),
        "a sum in it would lose digits in another order of operations",
    ),
}


@pytest.mark.parametrize("name", WITHOUT_KERNEL)
def test_what_has_no_kernel_takes_another_lowering(name: str, unwritable: list[str]) -> None:
    function, reason = WITHOUT_KERNEL[name]
    x, w = torch.randn(6, 64), torch.randn(6, 64)
    torch.testing.assert_close(generated(function)(x, w), function(x, w))
    assert reason in unwritable


def test_the_sizes_from_which_a_kernel_is_chosen() -> None:
    model = optimize(Rows(), backend="eager")
    small, large = (explain(model, torch.randn(n, 24)).sites[0].lowering for n in (4, 1000))
    assert (small, large) == ("composite", "generated")


def test_a_large_tensor_in_two_threads() -> None:
    """As large as it takes for both to have work."""
    before = torch.get_num_threads()
    x = torch.randn(8, 6, 40, 40)
    assert x.numel() > kernel.SMALL
    try:
        torch.set_num_threads(2)
        assert contract_violations(Batch(), generated, [x, x + 1]) == []
    finally:
        torch.set_num_threads(before)
