"""Every norm of the forum thread, in our words: found, named, exact, and its habits reported."""

# mypy: disable-error-code="no-any-return"
# Tensor.norm and some operators have no types in torch.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract import contract_violations
from spellings import random_input
from torch import Tensor, nn

from bnrewrite import Report, explain, optimize


def optimised(model: nn.Module) -> Any:
    return optimize(model, backend="eager")


def inputs(*shape: int, count: int = 4) -> list[Tensor]:
    source = torch.Generator().manual_seed(11)
    return [random_input(shape, source) for _ in range(count)]


def codes(report: Report) -> set[str]:
    return {finding.name for finding in report.findings}


class ForumBatchNorm(nn.Module):
    """The question's module: inverted momentum, rebound buffers, a correction by the batch size."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, literal: bool, momentum: float = 0.9) -> None:
        super().__init__()
        self.channels = channels
        self.literal = literal
        self.momentum = momentum
        self.epsilon = 1e-5
        self.weight = nn.Parameter(torch.rand(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor, mode: int) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if mode == 0:
            mean, var = x.mean([0, 2, 3]), x.var([0, 2, 3])
            old, new = self.momentum, 1.0 - self.momentum
            self.running_mean = (old * self.running_mean) + new * mean
            self.running_var = (old * self.running_var) + new * (
                x.shape[0] / (x.shape[0] - 1) * var
            )
            if self.literal:  # the page lost an `else:`, and then this is what runs
                mean, var = self.running_mean, self.running_var
        mean = mean.view([1, self.channels, 1, 1]).expand_as(x)
        var = var.view([1, self.channels, 1, 1]).expand_as(x)
        weight = self.weight.view([1, self.channels, 1, 1]).expand_as(x)
        bias = self.bias.view([1, self.channels, 1, 1]).expand_as(x)
        return weight * (x - mean) / (var + self.epsilon).sqrt() + bias


class ForumNet(nn.Module):
    """The question's network, smaller."""

    def __init__(self, literal: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, kernel_size=3, padding=1)
        self.bn1 = ForumBatchNorm(8, literal)
        self.pool = nn.MaxPool2d(kernel_size=2, stride=2)
        self.classifier = nn.Linear(8 * 4 * 4, 10)

    def forward(self, x: Tensor, mode: int) -> Tensor:
        hidden = self.pool(F.relu(self.bn1(self.conv1(x), mode)))
        return self.classifier(hidden.view(hidden.size(0), -1))


@pytest.mark.parametrize("literal", [False, True], ids=["with the else", "literally"])
def test_the_forum_net(literal: bool) -> None:
    model = ForumNet(literal)
    batches = [(x, 0) for x in inputs(5, 3, 8, 8, count=3)] + [(inputs(5, 3, 8, 8)[3], 1)]
    assert contract_violations(model, optimised, batches) == []
    report = explain(model, *batches[0])
    (site,) = report.sites
    assert site.kind in (("general",) if literal else ("batch_norm", "general"))
    assert (site.status, site.module) == ("rewritten", "bn1")
    assert site.source.startswith("test_thread.py:")
    assert set(site.axes) == {0, 2, 3}
    assert {"buffer-rebound", "statistic-with-history"} <= codes(report)
    assert ("normalises-with-running-statistics" in codes(report)) == literal


class ReferenceBatchNorm2d(nn.BatchNorm2d):
    """The answer's module: a subclass that does by hand what its base class does in C++."""

    def forward(self, input: Tensor) -> Tensor:
        x = input
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked += 1
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
        assert self.running_mean is not None
        assert self.running_var is not None
        if self.training:
            mean = x.mean([0, 2, 3])
            var = x.var([0, 2, 3], unbiased=False)
            count = x.numel() / x.size(1)
            with torch.no_grad():
                self.running_mean = factor * mean + (1 - factor) * self.running_mean
                corrected = var * count / (count - 1)
                self.running_var = factor * corrected + (1 - factor) * self.running_var
        else:
            mean, var = self.running_mean, self.running_var
        x = (x - mean[None, :, None, None]) / torch.sqrt(var[None, :, None, None] + self.eps)
        if self.affine:
            x = x * self.weight[None, :, None, None] + self.bias[None, :, None, None]
        return x


@pytest.mark.parametrize("momentum", [0.1, None], ids=["momentum", "cumulative"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_the_reference_subclass(momentum: float | None, affine: bool) -> None:
    model = ReferenceBatchNorm2d(6, momentum=momentum, affine=affine)
    batches = inputs(4, 6, 5, 3)
    assert contract_violations(model, optimised, batches) == []
    (site,) = explain(model, batches[0]).sites
    assert (site.kind, site.status, site.eps) == ("batch_norm", "rewritten", 1e-5)
    assert {name.split(".")[-1] for name in site.state} >= {"running_mean", "running_var"}


def normalize_with_eps(x: Tensor, p: float = 2, dim: int = 1, eps: float = 1e-12) -> Tensor:
    return x / x.norm(p, dim, keepdim=True).clamp_min(eps).expand_as(x)


def normalize_with_eps_in_place(
    x: Tensor, p: float = 2, dim: int = 1, eps: float = 1e-12
) -> Tensor:
    return torch.div(x, x.norm(p, dim, keepdim=True).clamp_min_(eps).expand_as(x))


def normalize_by_sums(x: Tensor) -> Tensor:
    return torch.div(x, torch.sqrt(torch.sum(x * x, axis=-1, keepdims=True)))  # type: ignore[call-overload]


def normalize_short(x: Tensor, p: float = 2, dim: int = -1) -> Tensor:
    return x / x.norm(p, dim, keepdim=True)


class Around(nn.Module):
    """A function between two linear maps, as it stands in somebody's model."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.before = nn.Linear(5, 6)
        self.function = function
        self.after = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.function(self.before(x)))


NORMALIZES = [normalize_with_eps, normalize_with_eps_in_place, normalize_by_sums, normalize_short]


@pytest.mark.parametrize("function", NORMALIZES, ids=lambda function: function.__name__)
def test_the_hand_written_normalizes(function: Callable[[Tensor], Tensor]) -> None:
    model, batches = Around(function), inputs(7, 5)
    if function is not normalize_with_eps_in_place:  # raises in the user's own backward
        assert contract_violations(model, optimised, batches) == []
    (site,) = explain(model, batches[0]).sites
    assert (site.kind, site.status, site.axes) == ("lp_normalize", "rewritten", (1,))
    assert (site.eps or None) == (1e-12 if function in NORMALIZES[:2] else None)


@pytest.mark.parametrize("function", NORMALIZES, ids=lambda function: function.__name__)
def test_a_zero_row_keeps_its_nan(function: Callable[[Tensor], Tensor]) -> None:
    x = inputs(4, 6)[0]
    x[2] = 0
    expected = function(x.clone())
    found = optimize(function, backend="eager")(x.clone())
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert found[2].isnan().all() == (function in NORMALIZES[2:])


@pytest.mark.parametrize("p", [1, 2, float("inf")])
def test_the_short_normalize_for_every_p(p: float) -> None:
    model, batches = Around(lambda x: normalize_short(x, p)), inputs(7, 5)
    assert contract_violations(model, optimised, batches) == []
    assert [site.kind for site in explain(model, batches[0]).sites] == ["lp_normalize"]


class StandardisedConv2d(nn.Conv2d):
    """A convolution whose weight is standardised at every call."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        mean = weight.mean(dim=1, keepdim=True).mean(dim=2, keepdim=True).mean(dim=3, keepdim=True)
        weight = weight - mean
        std = torch.sqrt(weight.view(weight.size(0), -1).var(dim=1) + 1e-12).view(-1, 1, 1, 1)
        return self._conv_forward(input, weight / (std + 1e-5).expand_as(weight), self.bias)


def test_weight_standardisation_in_a_conv() -> None:
    model = nn.Sequential(StandardisedConv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 2, 1))
    batches = inputs(2, 3, 5, 5)
    assert contract_violations(model, optimised, batches) == []
    (site,) = explain(model, batches[0]).sites
    assert site.kind in ("weight_standardization", "general")
    assert (site.status, site.module) == ("rewritten", "0")


class HandBatchNorm1d(nn.Module):
    """Batch norm of rows, with buffers updated in place."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.bias = nn.Parameter(torch.randn(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            mean, var = x.mean(0), x.var(0, unbiased=False)
            self.running_mean.mul_(0.9).add_(0.1 * mean.detach())
            self.running_var.mul_(0.9).add_(0.1 * x.var(0).detach())
        else:
            mean, var = self.running_mean, self.running_var
        return (x - mean) / torch.sqrt(var + 1e-5) * self.weight + self.bias


class DomainNet(nn.Module):
    """One norm per domain; a call names its domain."""

    def __init__(self, norm: Callable[[int], nn.Module], domains: int) -> None:
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.norms = nn.ModuleList(norm(8) for _ in range(domains))
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor, domain: int) -> Tensor:
        return self.last(F.relu(self.norms[domain](self.first(x))))


def test_domain_specific_norms() -> None:
    model = DomainNet(HandBatchNorm1d, 3)
    batches = [
        (x, domain) for x, domain in zip(inputs(9, 5, count=5), [0, 1, 2, 1, 1], strict=True)
    ]
    assert contract_violations(model, optimised, batches) == []
    for domain in range(3):
        (site,) = explain(model, batches[0][0], domain).sites
        assert (site.kind, site.module) == ("batch_norm", f"norms.{domain}")
        assert site.state == (f"norms.{domain}.running_mean", f"norms.{domain}.running_var")


def test_each_domain_updates_its_own_statistics_only() -> None:
    model = optimised(DomainNet(HandBatchNorm1d, 3))
    start = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(inputs(9, 5)[0], 1)
    moved = {name for name, buffer in model.named_buffers() if not buffer.equal(start[name])}
    assert moved == {"norms.1.running_mean", "norms.1.running_var"}


class PlainAttributes(nn.Module):
    """Running statistics that are not buffers: lost by state_dict(), left behind by .to()."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.running_mean = torch.zeros(channels)
        self.running_var = torch.ones(channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
            self.running_mean = (0.9 * self.running_mean + 0.1 * mean).detach()
            self.running_var = (0.9 * self.running_var + 0.1 * var).detach()
        else:
            mean, var = self.running_mean, self.running_var
        return (x - mean[None, :, None, None]) / (var[None, :, None, None] + 1e-5).sqrt()


class NeverUpdated(nn.Module):
    """Running statistics that are computed and thrown away: they stay zeros and ones."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        running_mean, running_var = self.running_mean, self.running_var
        mean, var = running_mean, running_var
        if self.training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
            running_mean = 0.9 * running_mean + 0.1 * mean
            running_var = 0.9 * running_var + 0.1 * var
        return (x - mean[None, :, None, None]) / (var[None, :, None, None] + 1e-5).sqrt()


@pytest.mark.parametrize(
    ("kind", "code"),
    [(PlainAttributes, "statistic-not-a-buffer"), (NeverUpdated, "statistics-never-updated")],
)
def test_statistics_that_stay_zero(kind: Callable[[int], nn.Module], code: str) -> None:
    model, batches = kind(6), inputs(4, 6, 5, 3)
    assert contract_violations(model, optimised, batches) == []
    reports = [explain(model.train(training), batches[0]) for training in (True, False)]
    assert code in codes(reports[0]) | codes(reports[1])
    assert [site.kind for site in reports[0].sites] == ["batch_norm"]


def test_explaining_changes_nothing() -> None:
    model = ForumNet(literal=True)
    start = {
        name: (id(each), each.clone()) for name, each in model.state_dict(keep_vars=True).items()
    }
    seed = torch.get_rng_state()
    explain(model, inputs(5, 3, 8, 8)[0], 0)
    assert torch.equal(torch.get_rng_state(), seed)
    for name, each in model.state_dict(keep_vars=True).items():
        assert id(each) == start[name][0]
        assert torch.equal(each, start[name][1])
        assert each.grad is None
