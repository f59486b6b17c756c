"""Models whose norms need statistics of all groups: global responses, mixtures of statistics."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract import check_threads, contract_violations
from torch import Tensor, nn

from bnrewrite import explain, optimize

pytestmark = pytest.mark.usefixtures("repeatable")
PLANE: dict[str, Any] = {"dim": (2, 3), "keepdim": True}
SHAPE = (3, 8, 5, 7)


def lengths_of(x: Tensor) -> Tensor:
    lengths: Tensor = torch.norm(x, p=2, **PLANE)
    return lengths


class Response(nn.Module):
    """ConvNeXt V2's: the length of each channel over their mean."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(1, channels, 1, 1) + 0.5)
        self.bias = nn.Parameter(torch.randn(1, channels, 1, 1))

    def lengths(self, x: Tensor) -> Tensor:
        return lengths_of(x)

    def mean(self, lengths: Tensor) -> Tensor:
        return lengths.mean(1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        lengths = self.lengths(x)
        y = self.weight * (x * (lengths / (self.mean(lengths) + 1e-6))) + self.bias + x
        return torch.relu(y)


class Squares(Response):
    """By a root whose gradient at zero is infinite: NaN is the user's own."""

    def lengths(self, x: Tensor) -> Tensor:
        return x.pow(2).sum(**PLANE).sqrt()


class Stopped(Response):
    """No gradient flows through the mean of the lengths."""

    def mean(self, lengths: Tensor) -> Tensor:
        return super().mean(lengths.detach())


class OfAll(Response):
    """The mean over samples and channels, weighted by channels."""

    def mean(self, lengths: Tensor) -> Tensor:
        slowness = (lengths * self.weight.square() + 1).reciprocal()
        return slowness.mean((0, 1), keepdim=True).sqrt()


class Apart(Response):
    """Of lengths that are nearly the same the difference counts."""

    def forward(self, x: Tensor) -> Tensor:
        lengths = self.lengths(x + 99)
        return (x + 99) / (1 + (lengths - self.mean(lengths)).square()).sqrt() * self.weight


class Switched(nn.Module):
    """Statistics of instances, layers and batches, mixed by weights that are learnt."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int = 8, *, far: float = 0) -> None:
        super().__init__()
        self.far = far
        self.weight = nn.Parameter(torch.rand(1, channels, 1, 1) + 0.5)
        self.bias = nn.Parameter(torch.randn(1, channels, 1, 1))
        self.mix = nn.Parameter(torch.randn(2, 3))
        self.register_buffer("running_mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.far
        mean, variance = x.mean(**PLANE), x.var(**PLANE)
        square = variance + mean**2
        of_layer = mean.mean(1, keepdim=True)
        layer = square.mean(1, keepdim=True) - of_layer**2
        if self.training:
            of_batch = mean.mean(0, keepdim=True)
            batch = square.mean(0, keepdim=True) - of_batch**2
            with torch.no_grad():
                self.running_mean.lerp_(of_batch, 0.1)
                self.running_var.mul_(0.9).add_(0.1 * batch.flatten())
        else:
            of_batch, batch = self.running_mean, self.running_var.view(1, -1, 1, 1)
        a, b = torch.softmax(self.mix, 1)
        mean = a[0] * mean + a[1] * of_layer + a[2] * of_batch
        variance = b[0] * variance + b[1] * layer + b[2] * batch
        y: Tensor = (x - mean) / (variance + 1e-5).sqrt() * self.weight + self.bias
        return y


class Blended(Response):
    """Statistics of instances and of layers, of which one number is learnt."""

    def forward(self, x: Tensor) -> Tensor:
        one = self.weight[0, 0, 0, 0] / 2
        two = 1 - one
        mean = one * x.mean(**PLANE) + two * x.mean((1, 2, 3), keepdim=True)
        variance = one * x.var(**PLANE) + two * x.var((1, 2, 3), keepdim=True)
        return (x - mean) * torch.rsqrt(variance + 1e-5) + self.bias


class Residual(Response):
    """What is added before the activation is a tensor of its own."""

    def forward(self, x: Tensor) -> Tensor:
        lengths = self.lengths(x)
        y = self.weight * (x * (lengths / (self.mean(lengths) + 1e-6))) + self.bias
        return torch.relu(y + x.flip(0))


class Shared(Response):
    """The lengths go elsewhere too, and a second norm has the same tensor."""

    def forward(self, x: Tensor) -> Tensor:
        lengths = self.lengths(x)
        first = self.weight * (x * (lengths / (self.mean(lengths) + 1e-6))) + x
        second = self.bias * (x * (lengths / (lengths.mean(0, keepdim=True) + 1e-3)))
        return first + second.relu() * lengths + x


class Written(Response):
    """The tensor is changed in place when its lengths are known."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        lengths = self.lengths(x.detach())
        y = self.weight * (x.add_(1) * (lengths / (self.mean(lengths) + 1e-6))) + self.bias
        return y * x


def images(*, zero: bool = False) -> Tensor:
    x = torch.randn(3, 8, 5, 7) * 2 + 0.5
    if zero:
        x[0, 1], x[1] = 0, 0
    return x


def inside(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "response": (Response, images),
    "response of zeros": (Response, lambda: images(zero=True)),
    "from squares": (Squares, images),
    "from squares, of zeros": (Squares, lambda: images(zero=True)),
    "stopped": (Stopped, images),
    "of all": (OfAll, images),
    "apart": (Apart, images),
    "switched, channels last": (Switched, lambda: inside(images())),
    "switched, far from zero": (lambda: Switched(far=4096), lambda: inside(images())),
    "blended": (Blended, images),
    "residual": (Residual, images),
    "shared": (Shared, images),
    "written": (Written, images),
}


def generated(model: Any) -> Any:
    return optimize(model, backend="eager", kernels="generated")


@pytest.mark.parametrize("name", MODELS)
def test_the_contract(name: str) -> None:
    build, draw_one = MODELS[name]
    model = build()
    assert contract_violations(model, generated, [draw_one() for _ in range(3)]) == []
    sites = explain(generated(copy.deepcopy(model)), draw_one()).sites
    assert "generated" in {site.lowering for site in sites}


class Mirrored(nn.Module):
    """The mean over samples that is taken off is the one of another group."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((0, 3)).T[None, :, :, None]
        return (x - mean) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()


class MirroredSquares(nn.Module):
    """The same of the mean square."""

    def forward(self, x: Tensor) -> Tensor:
        square = x.pow(2).mean((0, 3)).T[None, :, :, None]
        return x / (x.pow(2).mean(-1, keepdim=True) + square).sqrt()


@pytest.mark.parametrize("build", [Mirrored, MirroredSquares])
def test_means_of_other_groups(build: Callable[[], nn.Module]) -> None:
    batches = [torch.randn(3, 5, 5, 7) + torch.randn(3, 5, 5, 1) for _ in range(2)]
    assert contract_violations(build(), generated, batches) == []


def test_buffers_of_means_over_groups() -> None:
    """The kernel makes them: no other pass over the tensor is left."""
    model = generated(Switched())
    (site,) = explain(model, images()).sites
    assert site.lowering == "generated"
    assert sorted(site.state) == ["running_mean", "running_var"]


def test_transforms_and_derivatives_of_derivatives() -> None:
    users, x, tangent = Response().double(), images().double(), images().double()
    model = generated(copy.deepcopy(users))
    model(x)

    def close(of: Callable[[nn.Module], Any]) -> None:
        torch.testing.assert_close(of(model), of(users))

    def second(module: nn.Module) -> Any:
        given = [x.clone().requires_grad_(), *module.parameters()]
        total = (module(given[0]) ** 2 * tangent).sum()
        first = torch.autograd.grad(total, given, create_graph=True)
        return [*first, *torch.autograd.grad((first[0] * tangent).sum(), given)]

    close(second)
    close(lambda m: torch.vmap(m)(torch.stack([x, 2 * x])))
    close(lambda m: torch.func.jvp(m, (x,), (tangent,)))
    close(lambda m: torch.func.grad(lambda given: (m(given) ** 2).sum())(x))


def test_sizes_that_change_from_call_to_call() -> None:
    users = Response()
    model = optimize(copy.deepcopy(users), backend="eager", kernels="generated", dynamic=True)
    for rows in (2, 5, 3):
        x = torch.randn(rows, 8, rows + 2, 7)
        torch.testing.assert_close(model(x), users(x))
    assert {site.lowering for site in explain(model, x).sites} == {"generated"}


def test_threads_that_call_the_same_model() -> None:
    model = generated(Response())
    inputs = [images() for _ in range(8)]
    model(inputs[0])
    check_threads(model, inputs)


def test_what_is_kept_for_the_backward() -> None:
    """The tensor, and the moments of each group in two parts."""
    model, x = generated(Response()), images().requires_grad_()
    model(x)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    assert sum(kept.values()) <= x.numel() + 2 * 3 * 8 + 2 * 8


def test_a_kernel_is_chosen_by_itself() -> None:
    model = optimize(Response(64), backend="eager")
    site = explain(model, torch.randn(4, 64, 14, 14)).sites[0]
    assert (site.kind, site.lowering) == ("general", "generated")


def response(x: Tensor, mean: Callable[[Tensor], Tensor]) -> Tensor:
    lengths = lengths_of(x)
    return x * (lengths / (mean(lengths) + 1e-6))


def apart(x: Tensor) -> Tensor:
    lengths = lengths_of(x)
    return x / (1 + (lengths - lengths.mean(1, True)).square()).sqrt()


def blended_groups(x: Tensor) -> Tensor:
    """A weight that varies inside the smallest groups of a formula with larger ones."""
    x = x.view(6, 3, 2, 5, 5) + x.mean()
    mean = x.mean((2, 3, 4), keepdim=True) + 0.5 * x.mean((1, 2, 3, 4), keepdim=True)
    variance = x.var((2, 3, 4), keepdim=True) + x.var((1, 2, 3, 4), keepdim=True)
    y = (x - mean) / (variance + 1e-5).sqrt()
    return y.view(6, 6, 5, 5) * torch.arange(1, 7).view(1, 6, 1, 1)


ANOTHER = "another statistic than the mean and the variance"
WITHOUT_KERNEL: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "the largest length": (lambda x: response(x, lambda n: n.amax(1, keepdim=True)), ANOTHER),
    "samples in the place of channels": (
        lambda x: response(x, lambda n: n.transpose(0, 1).mean(1, keepdim=True)),
        ANOTHER,
    ),
    "lengths of half of the channels": (
        lambda x: x * lengths_of(x) / (lengths_of(x[:, :3]).mean(1, True) + 1),
        ANOTHER,
    ),
    "lengths of the channels in another order": (
        lambda x: x * lengths_of(x) / (lengths_of(x.roll(1, 0)).mean(1, True) + 1),
        ANOTHER,
    ),
    "samples and channels of the tensor swapped": (
        lambda x: x * lengths_of(x) / (lengths_of(x.transpose(0, 1)).mean(1, True) + 1),
        ANOTHER,
    ),
    "lengths over other dimensions": (
        lambda x: x * lengths_of(x) / (torch.norm(x, dim=(1, 2), keepdim=True).mean(3, True) + 1),
        ANOTHER,
    ),
    "lengths of another tensor": (
        lambda x: x * lengths_of(x) / (lengths_of(x + 1).mean(1, True) + 1e-6),
        ANOTHER,
    ),
    "lengths of the transposed tensor": (
        lambda x: x / (lengths_of(x) + lengths_of(x.mT).transpose(0, 1) + 1),
        ANOTHER,
    ),
    "differences of lengths in double precision": (
        lambda x: apart(x.double()),
        "a sum in it would lose digits in another order of operations",
    ),
    "weights inside the smallest groups": (
        blended_groups,
        "a sum in it would lose digits in another order of operations",
    ),
    "weights of each element": (
        lambda x: response(x, lambda n: n.mean(1, True)) * torch.arange(1, x.shape[3] + 1),
        "a mean over groups, and a tensor inside a group",
    ),
}


@pytest.mark.parametrize("name", WITHOUT_KERNEL)
def test_what_has_no_kernel_is_computed_all_the_same(name: str, unwritable: list[str]) -> None:
    function, reason = WITHOUT_KERNEL[name]
    x = torch.randn(6, 6, 5, 5, requires_grad=True)
    found = []
    for each in (generated(function), function):
        y = each(x)
        found.append((y, torch.autograd.grad((y * y.detach().cos()).sum(), x)[0]))
    torch.testing.assert_close(*found)
    assert reason in unwritable
