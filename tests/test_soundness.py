"""Formulas that are equal on paper and not in numbers: at zero, at infinity, out of range."""

# mypy: disable-error-code="no-any-return"
# Tensor.norm and some operators have no types in torch.

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from contract import Batch, contract_violations
from torch import Tensor, nn

from bnrewrite import explain, optimize

EPS = 1e-5
Formula = Callable[..., Any]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


ROWS = (draw(4, 6), draw(4, 6, seed=1))
PAIR = ((draw(4, 6), draw(4, 6, seed=1)), (draw(4, 6, seed=2), draw(4, 6, seed=3)))
IMAGES = (draw(3, 6, 4, 4), draw(3, 6, 4, 4, seed=1))
CONSTANT_ROW = (torch.cat([draw(3, 6), torch.full((1, 6), 2.0)]), draw(4, 6))
HALF = (600 * draw(4, 64)).half()
WEIGHT = 0.5 + draw(6, seed=4).abs()
WITH_A_ZERO = WEIGHT * torch.tensor([1.0, 1, 0, 1, 1, 1])
WITH_AN_INFINITY = torch.tensor([1.0, torch.inf, 1, 1, 1, 1])


@dataclass(frozen=True, eq=False)
class Case:
    """One formula.

    Attributes:
        formula: of the module and its inputs.
        batches: of one training step each, the last of evaluation.
        parameters: in the order of their names.
        buffers: likewise.
        kinds: what is found in it; None where that is no matter.
    """

    formula: Formula
    batches: tuple[Batch, ...] = ROWS
    parameters: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    kinds: tuple[str, ...] | None = None


class Model(nn.Module):
    weight: Tensor
    unused: Tensor
    mean: Tensor
    var: Tensor

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.formula = case.formula
        for name, value in case.parameters.items():
            self.register_parameter(name, nn.Parameter(value.clone()))
        for name, value in case.buffers.items():
            self.register_buffer(name, value.clone())

    def forward(self, *inputs: Any) -> Any:
        return self.formula(self, *inputs)


def layer(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, False, True) + EPS).sqrt()


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def divided_by_matrix_norm(order: float) -> Case:
    def formula(m: Model, x: Tensor) -> Tensor:
        return x @ (m.weight / torch.linalg.norm(m.weight, order)).t()

    return Case(formula, parameters={"weight": draw(5, 6, seed=2)}, kinds=())


def with_weight(formula: Formula, weight: Tensor = WEIGHT) -> Case:
    return Case(formula, parameters={"weight": weight})


def length_of_a_fraction(m: Model, x: Tensor) -> Tensor:
    return (x / 64) / (x / 64).pow(2).sum(-1, keepdim=True).sqrt().clamp(min=1e-3)


def rounded_mean(m: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    rounded = x.mean(-1, dtype=torch.bfloat16)
    return rounded, (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + EPS)


def mean_in_double(m: Model, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True, dtype=torch.float64)
    return (x - mean.float()) / (x.var(-1, False, True) + EPS).sqrt()


def another_zero(m: Model, x: Tensor) -> Tensor:
    up, down = torch.copysign(x, 0.0), torch.copysign(x, -0.0)
    return (up - down.mean(-1, keepdim=True)) / (down.var(-1, False, True) + EPS).sqrt()


def large_integers(m: Model, x: Tensor) -> Tensor:
    return layer(x) * 10**10 * m.weight * 10**10 + x.mean(-1, keepdim=True) * 2**32 * 2**32


def one_element(m: Model, x: Tensor) -> Tensor:
    return layer(x) + (x - x.mean(0, keepdim=True)) / (x.std(0, False, True) + 0.1)


def size_below_zero(m: Model, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    power = centred.square().sum(-1, keepdim=True) * ((x.shape[-1] - 9) // 2)
    return centred / (power.abs() + EPS).sqrt()


def logarithm_of_the_variance(m: Model, x: Tensor) -> Tensor:
    var = torch.exp(torch.log(x.var(-1, False, True)))
    return (x - x.mean(-1, keepdim=True)) / (var + 0.1).sqrt()


def compensated(m: Model, x: Tensor) -> Tensor:
    """A variance without the rounding of its mean: E[x - E[x]] vanishes, and x does not."""
    centred = x - x.mean(-1, keepdim=True)
    rest = centred.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) - rest * rest + EPS).sqrt()


def one_statistic_for_all(m: Model, x: Tensor) -> Tensor:
    return (x - m.mean) / torch.sqrt(m.var + EPS)


def one_statistic_clamped(m: Model, x: Tensor) -> Tensor:
    return ((x - m.mean) / torch.clamp_min(m.var.sqrt(), 1e-6)).clamp(-5, 5)


def normalised_means(m: Model, x: Tensor) -> Tensor:
    means = x.mean((2, 3))
    normal = (means - means.mean(-1, keepdim=True)) / torch.sqrt(means.var(-1, keepdim=True) + EPS)
    return m.weight.view(1, -1, 1, 1) * x.tanh() + normal[..., None, None]


def keypoints(m: Model, x: Tensor) -> Tensor:
    size = m.var
    return (x - (size / 2)[:, None, :]) / (size.max(-1).values / 2)[:, None, None]


CASES = {
    "spectral norm": divided_by_matrix_norm(2),
    "largest column": divided_by_matrix_norm(1),
    "largest row": divided_by_matrix_norm(float("inf")),
    "a parameter used for nothing": Case(
        lambda m, x: layer(x) * m.weight + 0.0 * m.unused.sum(),
        parameters={"weight": WEIGHT, "unused": draw(3)},
        kinds=("layer_norm",),
    ),
    "zero times infinity": Case(
        lambda m, x: layer(x) + 0.0 * m.mean, buffers={"mean": WITH_AN_INFINITY}
    ),
    "itself less itself": with_weight(lambda m, x: layer(x) + (m.weight - m.weight)),
    "to the power of zero": with_weight(lambda m, x: layer(x) * m.weight**0),
    "divided by itself": with_weight(lambda m, x: layer(x) * (m.weight.exp() / m.weight.exp())),
    "lerp by nothing": with_weight(lambda m, x: torch.lerp(layer(x), m.weight + 0 * x, 0.0)),
    "another norm used for nothing": Case(lambda m, x, z: layer(x) + 0.0 * layer(z), PAIR),
    "a variance that is compensated": Case(compensated, kinds=("layer_norm",)),
    "squares of a fraction in float16": Case(length_of_a_fraction, (HALF, HALF)),
    "squares of a fraction": Case(lambda m, x: rms(x * 1e-25), (1e25 * draw(4, 6), 1e25 * ROWS[1])),
    "squares of a multiple": Case(
        lambda m, x: layer(x * 1e25), (1e-25 * draw(4, 6), 1e-25 * ROWS[1])
    ),
    "a shift before the norm": Case(
        lambda m, x: layer(x - 1e4), (1e4 + draw(8, 64), 1e4 + draw(8, 64, seed=1))
    ),
    "a shift before the squares": Case(
        lambda m, x: (x - 100) / ((x - 100).square().mean(-1, keepdim=True) + EPS),
        (100 + draw(8, 64), 100 + draw(8, 64, seed=1)),
    ),
    "a mean that is rounded": Case(rounded_mean, (3 * draw(4, 64) + 5, draw(4, 64, seed=1))),
    "a mean in float64": Case(mean_in_double, (1e3 + draw(4, 64), 1e3 + draw(4, 64, seed=1))),
    "a deviation of one element": Case(
        one_element, (draw(1, 6), draw(1, 6, seed=1)), kinds=("layer_norm",)
    ),
    "a size that may be negative": Case(
        size_below_zero, tuple(draw(4, n, seed=n) for n in (12, 13, 6, 7))
    ),
    "a size that may be zero": Case(
        lambda m, x, n: layer(x) / (n * m.weight) * n,
        tuple((draw(4, 6, seed=n), n) for n in (5, 7, 0, 0)),
        {"weight": WEIGHT},
    ),
    "a square divided by itself": with_weight(
        lambda m, x: layer(x) * m.weight.square() / m.weight, WITH_A_ZERO
    ),
    "a power of a root of a negative": with_weight(
        lambda m, x: layer(x) * (m.weight**0.4) ** 2.5, -WEIGHT
    ),
    "the logarithm of zero": Case(logarithm_of_the_variance, CONSTANT_ROW),
    "zeros of two signs": Case(another_zero, kinds=()),
    "integers beyond 64 bits": with_weight(large_integers),
    "scalar statistics": Case(
        one_statistic_for_all,
        buffers={"mean": torch.tensor(0.3), "var": torch.tensor(2.3)},
        kinds=("affine",),
    ),
    "statistics of one element": Case(
        one_statistic_clamped,
        buffers={"mean": torch.tensor([0.3]), "var": torch.tensor([2.3])},
        kinds=("affine",),
    ),
    "means that are normalised": Case(
        normalised_means, IMAGES, {"weight": WEIGHT}, kinds=("layer_norm",)
    ),
    "both coefficients from one": Case(
        keypoints,
        (draw(2, 9, 2), draw(2, 9, 2, seed=1)),
        buffers={"var": torch.tensor([[640.0, 480.0], [300.0, 512.0]])},
        kinds=("affine",),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_formula_keeps_its_numbers(name: str) -> None:
    case = CASES[name]
    assert contract_violations(Model(case), optimised, case.batches) == []


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.kinds is not None])
def test_what_is_found(name: str) -> None:
    case = CASES[name]
    batch = case.batches[0]
    report = explain(Model(case), *(batch if isinstance(batch, tuple) else (batch,)))
    found = tuple(site.kind for site in report.sites if site.status == "rewritten")
    assert found == case.kinds


@pytest.mark.filterwarnings("error::bnrewrite.BnrewriteWarning")
@pytest.mark.parametrize("kernels", ["composite", "generated"])
def test_integers_beyond_64_bits(kernels: str) -> None:
    case = CASES["integers beyond 64 bits"]
    model = functools.partial(optimize, backend="eager", kernels=kernels)
    assert contract_violations(Model(case), model, case.batches) == []


def test_integers_beyond_64_bits_in_transforms() -> None:
    model = Model(CASES["integers beyond 64 bits"])
    expected = torch.func.vmap(model)(ROWS[0])
    function = optimize(model.forward, backend="eager", kernels="generated")
    torch.testing.assert_close(torch.func.vmap(function)(ROWS[0]), expected)
    x = ROWS[1].clone().requires_grad_()
    second = [second_derivative(each, x) for each in (function, model.forward)]
    torch.testing.assert_close(*second, rtol=1e-3, atol=1e-3 * float(second[1].abs().max()))


def second_derivative(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    cotangent = draw(4, 6, seed=5)
    (first,) = torch.autograd.grad(function(x), x, cotangent, create_graph=True)
    return torch.autograd.grad(first, x, cotangent)[0]


def optimised(model: nn.Module) -> Any:
    return optimize(model, backend="eager")
