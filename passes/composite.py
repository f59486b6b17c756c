"""A norm as its moments and one multiply-add, from ordinary operations.

Before:  y = any spelling of x * scale + shift, the moments of x in scale and shift
After:   V, M = var_mean(x);  A, B = small tensors of V and M;  y = x * A + B
Leaves alone: coefficients as large as the tensor itself.
"""

from __future__ import annotations

from torch import fx

from bnrewrite.algebra.expression import Polynomial, scaled

from .emitter import Unwritable, Value, aten
from .writing import Writing


def write_composite(writing: Writing) -> fx.Node:
    """The nodes of the composite lowering; returns the replacement.

    Raises:
        Unwritable: a coefficient has no form here.
    """
    found, ring = writing.match, writing.reading.ring
    linear = found.linear
    everything = linear.axes
    small = ring.axes(linear.scale) < everything and ring.axes(linear.shift) < everything
    divided = _divided(writing)
    if divided is not None:
        return writing.finish(_affine(writing, divided, _unit(found.weight), found.bias))
    if small:
        return writing.finish(_affine(writing, writing.input(), linear.scale, linear.shift))
    if not found.part:
        raise Unwritable("its coefficients are as large as the tensor")
    value = _affine(writing, writing.input(), Polynomial({found.part: 1}), found.inner)
    return writing.finish(_affine(writing, value, found.weight, found.bias))


def _divided(writing: Writing) -> Value | None:
    """x over the user's own denominator, where an uncentred norm has one."""
    found, ring = writing.match, writing.reading.ring
    coefficients = set(found.weight.terms.values())
    if found.inner.terms or not found.part or len(coefficients) != 1:
        return None
    ratio = ring.power(Polynomial({found.part: coefficients.pop()}), -1)
    denominator = writing.emitter.reused(ratio)
    if denominator is None and found.part[0][1] == -1:
        denominator = writing.emitter.tensor(ratio)
    return None if denominator is None else writing.emitter.over(writing.input(), denominator)


def _unit(weight: Polynomial) -> Polynomial:
    return Polynomial(dict.fromkeys(weight.terms, 1))


def _affine(writing: Writing, x: Value, scale: Polynomial, shift: Polynomial) -> Value:
    """x * scale + shift."""
    emitter = writing.emitter
    factor, offset = emitter.tensor(scale), emitter.tensor(shift)
    if isinstance(factor, fx.Node) and isinstance(offset, fx.Node) and isinstance(x, fx.Node):
        return emitter.call(aten.addcmul.default, offset, x, factor)
    return emitter.plus(emitter.times(x, factor), offset)
