"""The eager stage: kernels, and other lowerings without gradients; the contract holds for all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract import contract_violations
from spellings import TABLE, Spelling
from torch import Tensor, nn

from bnrewrite import explain, optimize
from bnrewrite.kernels.frozen import is_small


def without_gradients(model: nn.Module) -> Any:
    return torch.no_grad()(optimize(model, backend="eager"))


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in TABLE])
def test_a_spelling_without_gradients(row: Spelling) -> None:
    violations = contract_violations(row.build(), without_gradients, row.batches(3))
    assert [v for v in violations if "gradient of" not in v] == []


def by_length(x: Tensor) -> Tensor:
    return x / (x * x).sum(-1, keepdim=True).sqrt().clamp_min(1e-12)


def by_mean_square(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in TABLE])
def test_a_spelling_in_eager_mode(row: Spelling) -> None:
    """With the kernels, that no backend but this one is given."""
    violations = contract_violations(
        row.build(), lambda model: optimize(model, backend="eager"), row.batches(4)
    )
    assert violations == []


def test_only_the_eager_stage_has_kernels() -> None:
    x = torch.randn(512, 256)  # large enough that it is the faster one there
    lowerings = {}
    for backend in ("eager", "aot_eager"):
        (site,) = explain(optimize(by_mean_square, backend=backend), x).sites
        lowerings[backend] = site.kind, site.lowering
    assert lowerings == {"eager": ("rms_norm", "generated"), "aot_eager": ("rms_norm", "native")}


def test_a_norm_for_a_sum_of_squares_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bnrewrite.passes.plan.why_no_kernels", lambda: "there is no compiler")
    (site,) = explain(optimize(by_mean_square, backend="eager"), torch.randn(512, 256)).sites
    assert (site.kind, site.lowering) == ("rms_norm", "composite")
    assert site.notes == ("no kernel is compiled for it: there is no compiler",)


ROWS = {
    "long": torch.randn(5, 4096),
    "longer": torch.randn(3, 50_000),
    "one": torch.randn(7, 1) * 1e-30,
    "zero": torch.zeros(3, 32),
    "huge": torch.full((3, 32), 1e25),
    "tiny": torch.full((3, 32), 1e-25),
    "not finite": torch.tensor([[1.0, torch.nan], [torch.inf, 2.0], [3.0, 4.0]]),
    "strided": torch.randn(32, 700).t(),
    "images": torch.randn(4, 16, 30, 30),
    "images, channels last": torch.randn(4, 16, 30, 30).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("x", [pytest.param(x, id=name) for name, x in ROWS.items()])
@pytest.mark.parametrize("function", [by_length, by_mean_square])
def test_values_where_a_norm_and_a_sum_of_squares_could_part(function: Any, x: Tensor) -> None:
    optimised = optimize(function, backend="eager")
    with torch.no_grad():
        found, expected, exact = optimised(x), function(x), function(x.double())
    assert found.stride() == expected.stride()
    torch.testing.assert_close(found.isnan(), expected.isnan())
    user = (expected - exact).abs().nan_to_num().max()
    largest = exact.abs().nan_to_num().max()
    assert (found - exact).abs().nan_to_num().max() <= 3 * user + largest * 1.2e-7


class Frozen(nn.Module):
    """A batch norm that normalises with what it has stored."""

    mean: Tensor
    variance: Tensor

    def __init__(self, mean: float = 0.0, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("mean", torch.full((4, 1, 1), mean))
        self.register_buffer("variance", torch.rand(4, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / torch.sqrt(self.variance + self.eps)


@pytest.mark.parametrize("mean", [0.0, 5.0, 4000.0])
def test_a_frozen_norm_keeps_the_digits_of_its_centre(mean: float) -> None:
    x = torch.randn(3, 4, 6, 5) + mean
    model = Frozen(mean).eval()
    (site,) = explain(model, x).sites
    assert (site.kind, site.lowering, site.eps) == ("affine", "native", 1e-5)
    exact = (x.double() - mean) / torch.sqrt(model.variance.double() + 1e-5)
    assert (optimize(model, backend="eager")(x) - exact).abs().max() < 2e-6


class Detached(Frozen):
    """Its statistics are parameters."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("mean", "variance"):
            delattr(self, name)
        self.mean = nn.Parameter(torch.rand(4))
        self.variance = nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = (s.detach()[:, None, None] for s in (self.mean, self.variance))
        return (x - mean) / torch.sqrt(variance + self.eps)


def test_statistics_that_are_detached_parameters() -> None:
    batches = [torch.randn(3, 4, 6, 5) for _ in range(2)]
    assert contract_violations(Detached(), lambda m: optimize(m, backend="eager"), batches) == []
    (site,) = explain(Detached(), batches[0].requires_grad_()).sites
    assert (site.kind, site.lowering) == ("affine", "native")


def test_a_stage_without_kernels_is_given_no_operator_that_may_lose_digits() -> None:
    x = torch.randn(3, 4, 6, 5)
    found = {}
    for kernels in ("auto", "native", "composite"):
        model = optimize(Frozen().eval(), backend="aot_eager", kernels=kernels)
        (site,) = explain(model, x).sites
        found[kernels] = site.lowering or site.reason
    assert found == {
        "auto": "composite",
        "native": 'kernels="native" leaves an affine of which PyTorch\'s operator may lose digits',
        "composite": "composite",
    }


def test_statistics_that_change_are_looked_at_again() -> None:
    model = optimize(Frozen().eval(), backend="eager")
    x = torch.randn(3, 4, 6, 5)
    model(x)
    assert is_small(model.mean, model.variance, model.eps)
    model.mean.fill_(4000.0)
    x += 4000.0
    exact = (x.double() - 4000.0) / torch.sqrt(model.variance.double() + 1e-5)
    assert (model(x) - exact).abs().max() < 2e-6
