"""Derivatives of a native norm: its own backward once, the formula's where it is differentiated.

The backward of a native norm takes the saved moments for constants when it is itself differentiated
twice: third derivatives, as a loss that holds second derivatives needs them, would be wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .layout import has_values

Gradients = tuple[Tensor | None, ...]


def records(*inputs: Tensor | None) -> bool:
    """Whether autograd records a call, by backward mode alone, of tensors with values."""
    return (
        torch.is_grad_enabled()
        and any(each is not None and each.requires_grad for each in inputs)
        and all(each is None or has_values(each) for each in inputs)
        and forward_ad._current_level < 0
    )


def gradients(
    formula: Callable[..., Tensor],
    native: Callable[[], Sequence[Tensor | None]],
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    cotangent: Tensor,
) -> Gradients:
    """Gradients of a norm, which can be differentiated any number of times where that is asked for.

    Args:
        formula: of the inputs, from ordinary operations.
        native: the operator's own backward, a gradient for each input.
        inputs: what the norm is computed from.
        needed: of which inputs the gradient is wanted.
        cotangent: of the norm's value.
    """
    if torch.is_grad_enabled():
        return _of_formula(formula, inputs, needed, cotangent)
    return tuple(g if need else None for g, need in zip(native(), needed, strict=True))


def _of_formula(
    formula: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    cotangent: Tensor,
) -> Gradients:
    # by other names: x may be made of the same weight, which is no way that counts here
    inputs = [None if each is None else each.view_as(each) for each in inputs]
    wanted = [each for each, need in zip(inputs, needed, strict=True) if need and each is not None]
    found = iter(torch.autograd.grad(formula(*inputs), wanted, cotangent, create_graph=True))
    return tuple(
        next(found) if need and each is not None else None
        for each, need in zip(inputs, needed, strict=True)
    )
