"""A program from torch's operations: the oracle of the kernels, and what stands in for them.

It can be traced, differentiated any number of times and run on any device and layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, cast

import sympy
import torch
from torch import Tensor

from .activations import activation
from .printing import LARGEST
from .program import M, Ms, N, V, Vs, parse


def _root(a: Tensor) -> Tensor:
    """A square root whose gradient is zero at zero."""
    zero = a == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, a).sqrt())


_FUNCTIONS: dict[str, Any] = {
    "Larger": lambda a, bound: torch.clamp_min(a, bound),
    "Root": _root,
    "sqrt": lambda a: a**0.5,
}


def reference(
    text: str, x: Tensor, tensors: Sequence[Tensor], *, updates: bool = True
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The y and the updates of a program.

    Args:
        text: the program.
        x: of its dimensions.
        tensors: t0, t1, ... with their elements in the order of their axes, then the residual.
        updates: whether they are wanted; the tensors of updates alone may else be any number.
    """
    program = parse(text)
    axes = [axis for dim in program.dims for axis in dim]
    sizes = program.axis_sizes(x.shape)
    split = x.reshape([sizes[axis] for axis in axes])
    over = [i for i, axis in enumerate(axes) if axis in program.over]
    residual = tensors[-1] if program.residual else None
    values = [
        _placed(t, own, axes, sizes) for t, own in zip(tensors, program.tensors, strict=False)
    ]
    values = [  # a buffer may change before a backward; a copy does not
        v.detach().clone() if i in program.fixed else v for i, v in enumerate(values)
    ]
    if split.dtype in (torch.float16, torch.bfloat16):
        split, values = split.float(), [v.float() for v in values]
    if program.about_zero:
        mean = torch.zeros((), dtype=split.dtype, device=x.device)
        variance = (split * split).mean(over, keepdim=True)
    else:
        variance = torch.var(split, over, correction=0, keepdim=True)
        mean = split.mean(over, keepdim=True)  # that of var_mean is NaN where this one is inf
    count = 1
    for i in over:
        count = count * split.shape[i]
    (scale, shift, centre, *new), averages = _functions(text)
    extents = [sizes[axis] for axis in axes]
    given = [mean, variance, mean.detach(), variance.detach(), count, *extents, *values]
    for average, made_of in zip(program.means, averages, strict=True):
        gone = [i for i, axis in enumerate(axes) if axis not in average.axes]
        given.append(made_of(*given).mean(gone, keepdim=True))
    y = scale(*given) * (split - centre(*given)) + shift(*given)
    y = y.reshape(x.shape)
    if residual is not None:
        y = y + residual
    if program.activation:
        behind = activation(program.activation)
        assert behind is not None
        y = behind.torch(y)
    y = _laid_out(y.to(program.dtype or x.dtype), x)
    if not updates:
        return y, ()
    with torch.no_grad():
        kept = [i for i in range(len(axes)) if i not in over]
        shape = [split.shape[i] for i in kept]
        one = torch.ones(
            [1 if i in over else split.shape[i] for i in range(len(axes))], device=x.device
        )
        made = tuple((u(*given) * one).reshape(shape) for u in new)
    return y, made


def _laid_out(y: Tensor, x: Tensor) -> Tensor:
    """A tensor in the layout that ``empty_like(x)`` has."""
    wanted = torch.empty_like(x).stride()
    if y.stride() == wanted:
        return y
    order = sorted(range(y.dim()), key=lambda dim: (-wanted[dim], dim))
    return y.permute(order).contiguous().permute([order.index(dim) for dim in range(y.dim())])


@cache
def _functions(text: str) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    program = parse(text)
    tensors = [program.symbol(i) for i in range(len(program.tensors))]
    averages = [program.mean(i) for i in range(len(program.means))]
    symbols = [M, V, Ms, Vs, N, *program.extents(), *tensors, *averages]

    def made(value: sympy.Expr, known: int = 0) -> Any:
        names = symbols[: len(symbols) - known]
        return sympy.lambdify(names, _taken(value), modules=[_FUNCTIONS, "math"], cse=True)

    def added(terms: Any) -> sympy.Expr:
        return sympy.Add(*(t.group * t.element for t in terms))

    values = [added(program.scale), added(program.shift), program.centre, *program.updates]
    left = len(averages)
    means = [made(mean.value, left - i) for i, mean in enumerate(program.means)]
    return tuple(map(made, values)), tuple(means)


def _taken(value: sympy.Expr) -> sympy.Expr:
    """The same with floating numbers in the place of integers that no operation takes."""
    large = [number for number in value.atoms(sympy.Integer) if abs(number) >= LARGEST]
    floats = {number: sympy.Float(number, 17) for number in large}
    return cast(sympy.Expr, value.xreplace(floats))


def _placed(tensor: Tensor, own: tuple[str, ...], axes: list[str], sizes: dict[str, Any]) -> Tensor:
    """A tensor along its axes, in the order and with the dimensions of all of them."""
    present = [axis for axis in axes if axis in own]
    if tensor.numel() == 1:
        return tensor.reshape([1] * len(axes))
    tensor = tensor.reshape([sizes[axis] for axis in own])
    tensor = tensor.permute([own.index(axis) for axis in present])
    return tensor.reshape([sizes[axis] if axis in own else 1 for axis in axes])
