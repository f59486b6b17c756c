"""Activations in kernels, at every number where an exponential could go wrong."""

from __future__ import annotations

import math

import mpmath
import pytest
import sympy
import torch
from torch import Tensor

from bnrewrite.kernels import norm, why_no_kernels
from bnrewrite.kernels.generated.activations import Z, activation
from bnrewrite.kernels.generated.functions import MIDDLE, tail_series

pytestmark = pytest.mark.skipif(why_no_kernels() is not None, reason=str(why_no_kernels()))
NAMES = ("relu", "relu6", "leaky_relu 0.01", "silu", "gelu", "gelu_tanh", "sigmoid", "tanh")
# a weight of zero: what the activation gets is the bias
TEXT = "x[n d] over d; t0[d]; t1[d]; centre = M; scale = t0*(V + 1.0e-5)**(-1/2); shift = t1; "
FAR = (1e-8, 1e-20, 6.0, 1e4, 1e14, 1e18, math.inf)
EDGES = (0.0, -0.0, *FAR, *(-each for each in FAR), math.nan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_values_and_slopes(name: str, dtype: torch.dtype) -> None:
    """Within three times torch's own error, and three roundings, of thirty digits.

    The edges come first: torch's loops have other rules for NaN behind their last vector.
    """
    values = torch.cat([torch.tensor(EDGES), torch.linspace(-30, 30, 241)]).to(dtype)
    bias = values.clone().requires_grad_()
    x = torch.randn(1, len(values), dtype=dtype)
    y = norm(TEXT + name, x, torch.zeros_like(values), bias)[0]
    ours = (y.detach(), torch.autograd.grad(y.sum(), bias)[0])
    for value, user, truth in zip(ours, by_torch(name, values), exact(name, values), strict=True):
        assert torch.equal(user.isfinite(), value.isfinite())
        finite = truth.isfinite()
        size = truth[finite].abs().clamp_min(1.0)
        apart, own = ((each.double() - truth)[finite].abs() / size for each in (value, user))
        assert apart.max() <= 3 * own.max() + 3 * torch.finfo(dtype).eps


def by_torch(name: str, values: Tensor) -> tuple[Tensor, Tensor]:
    found = activation(name)
    assert found is not None
    z = values.clone().requires_grad_()
    y = found.torch(z)
    return y.detach(), torch.autograd.grad(y.sum(), z)[0]


def exact(name: str, values: Tensor) -> tuple[Tensor, Tensor]:
    """Rounded to float64 once; what is made of pieces is exact there."""
    found = activation(name)
    assert found is not None
    if found.formula is None:
        value, slope = by_torch(name, values.double())
        return value, slope
    functions = {
        "Bounded": lambda z: z,
        "Logistic": lambda z: 1 / (1 + mpmath.exp(-z)),
        "LogisticSlope": lambda z: 1 / (2 + mpmath.exp(-z) + mpmath.exp(z)),
        "Normal": mpmath.ncdf,
    }
    made = []
    with mpmath.workdps(30):
        for formula in (found.formula, sympy.diff(found.formula, Z)):
            function = sympy.lambdify(Z, formula, modules=[functions, "mpmath"])
            numbers = [
                float(function(mpmath.mpf(z))) if math.isfinite(z) else math.nan
                for z in values.tolist()
            ]
            made.append(torch.tensor(numbers, dtype=torch.float64))
    return made[0], made[1]


@pytest.mark.parametrize("x", [0.0, 0.1, 1.0, 3.75, 9.0, 25.0])
def test_the_series_of_a_tail(x: float) -> None:
    """``(x + k) exp(x^2) erfc(x)``, as the standard library has it."""
    t, series = (x - MIDDLE) / (x + MIDDLE), tail_series(2.0**-56)
    total = sum(c * t**k for k, c in enumerate(series))
    expected = (x + MIDDLE) * math.exp(x * x) * math.erfc(x)
    assert total == pytest.approx(expected, rel=1e-13)


def test_other_texts_are_none() -> None:
    assert activation("softplus") is None
    assert activation("") is None
