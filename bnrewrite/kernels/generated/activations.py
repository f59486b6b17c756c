"""Activations behind a norm, as formulas of z; their derivatives are taken by sympy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.nn import functional

Z = sympy.Symbol("z", real=True)
FAR = 64  # where the logistic function of a cube of z is one or zero, in double precision too


class Logistic(sympy.Function):  # type: ignore[misc]
    """``1 / (1 + exp(-z))``."""

    def fdiff(self, argindex: int = 1) -> Any:
        """Of its own, as ``1 - Logistic(z)`` has no digits where z is large."""
        return LogisticSlope(self.args[0])


class LogisticSlope(sympy.Function):  # type: ignore[misc]
    """``Logistic(z) Logistic(-z)``."""


class Normal(sympy.Function):  # type: ignore[misc]
    """The distribution function of the normal distribution, ``(1 + erf(z / sqrt(2))) / 2``."""

    def fdiff(self, argindex: int = 1) -> Any:
        """The density."""
        z: Any = self.args[0]
        return sympy.exp(-(z**2) / 2) * sympy.Float(1 / math.sqrt(2 * math.pi))


class Bounded(sympy.Function):  # type: ignore[misc]
    """z, or the nearest of ``-FAR`` and ``FAR``, for functions that are flat beyond those."""

    def fdiff(self, argindex: int = 1) -> Any:
        """That of z: beyond, it multiplies a slope of zero."""
        return sympy.Integer(1)


@dataclass(frozen=True)
class Activation:
    """What a kernel computes of z, the norm with its residual.

    Attributes:
        torch: the same by torch.
        formula: an expression of z; None where it is made of pieces.
        pieces: the result for a number ``made``, and the cotangent for that of the result,
            ``given``, in C++.
        of_result: the pieces of the cotangent are the same for a result as for its ``made``, and
            torch's backward is of the result too.
    """

    torch: Callable[[Tensor], Tensor]
    formula: Any = None
    pieces: tuple[str, str] = ("", "")
    of_result: bool = False


_NEAR: Any = Bounded(Z)  # a cube overflows long before z does
_CUBE = sympy.Float(2 * math.sqrt(2 / math.pi)) * (_NEAR + sympy.Float(0.044715) * _NEAR**3)
_ACTIVATIONS = {
    "relu": Activation(
        functional.relu,
        pieces=("made < acc(0) ? V{} : made", "made <= acc(0) ? V{} : given"),
        of_result=True,
    ),
    "relu6": Activation(
        functional.relu6,
        pieces=(
            "made < acc(0) ? V{} : made > acc(6) ? V{} + acc(6) : made",
            "made > acc(0) ? (made < acc(6) ? given : V{}) : V{}",  # of NaN none, as in torch
        ),
    ),
    "silu": Activation(functional.silu, Z * Logistic(Z)),
    "gelu": Activation(functional.gelu, Z * Normal(Z)),
    "gelu_tanh": Activation(partial(functional.gelu, approximate="tanh"), Z * Logistic(_CUBE)),
    "sigmoid": Activation(torch.sigmoid, Logistic(Z)),
    "tanh": Activation(torch.tanh, sympy.tanh(Z)),
}


@cache
def activation(text: str) -> Activation | None:
    """The activation of a name, or of ``leaky_relu`` and its slope; None for other texts."""
    name, _, slope = text.partition(" ")
    if name != "leaky_relu":
        return _ACTIVATIONS.get(text)
    return Activation(
        partial(functional.leaky_relu, negative_slope=float(slope)),
        pieces=(
            f"made > acc(0) ? made : made * acc({slope})",
            f"made > acc(0) ? given : given * acc({slope})",
        ),
    )
