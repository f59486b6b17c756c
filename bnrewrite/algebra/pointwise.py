"""Elementwise arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from torch import fx

from .axes import Opaque
from .calls import COUNTS, is_tensor
from .expression import Function, Polynomial, added, exact, number, scaled
from .meaning import Meaning, Reading
from .ring import Ring
from .signs import nonnegative, positive

Rule = Callable[[Reading, fx.Node, dict[str, Any]], Meaning]


def _floating(node: fx.Node) -> None:
    """Formulas are about real numbers: integers round and wrap, complex numbers conjugate."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dtype.is_floating_point:
        return
    if value.dtype not in COUNTS or value.numel() != 1:
        raise Opaque(f"arithmetic in {value.dtype}")


def _unary(function: Callable[[Ring, Polynomial], Polynomial]) -> Rule:
    def rule(reading: Reading, node: fx.Node, a: dict[str, Any]) -> Meaning:
        _floating(node)
        meaning = reading.operand(a["self"])
        return Meaning(meaning.dims, function(reading.ring, meaning.value))

    return rule


def _binary(function: Callable[[Ring, Polynomial, Polynomial], Polynomial]) -> Rule:
    def rule(reading: Reading, node: fx.Node, a: dict[str, Any]) -> Meaning:
        _floating(node)
        alpha = reading.operand(a.get("alpha", 1))
        if a.get("rounding_mode") is not None:
            raise Opaque("a division that rounds")
        dims, (left, right) = reading.broadcast(
            reading.operand(a["self"]), reading.operand(a["other"])
        )
        if alpha.value.constant != 1:
            right = reading.ring.multiply(right, alpha.value)
        return Meaning(dims, function(reading.ring, left, right))

    return rule


def _scalar(polynomial: Polynomial) -> float | Fraction | int:
    constant = polynomial.constant
    if constant is None:
        raise Opaque("an exponent that is not a number")
    return constant


def power(ring: Ring, base: Polynomial, exponent: Polynomial) -> Polynomial:
    """``base ** exponent`` for a constant exponent."""
    value = _scalar(exponent)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and abs(value) > 16:
        raise Opaque(f"a power of {value}")
    if base.constant is not None and base.constant < 0 and not isinstance(value, int):
        raise Opaque("a root of a negative number")
    return ring.power(base, value)


def maximum(ring: Ring, left: Polynomial, right: Polynomial, name: str = "maximum") -> Polynomial:
    """The larger of two values; a value that is never below the other is the maximum itself.

    ``clamp_min`` and ``maximum`` differ in the gradient where both are equal.
    """
    if nonnegative(ring, added(left, right, -1)):
        return left
    if nonnegative(ring, added(right, left, -1)):
        return right
    a, b = sorted((left, right), key=lambda p: p.key)
    nonneg = nonnegative(ring, a) or nonnegative(ring, b)
    return ring.function(name, a, b, nonneg=nonneg)


def minimum(ring: Ring, left: Polynomial, right: Polynomial, name: str = "minimum") -> Polynomial:
    """The smaller of two values; a value that is never above the other is the minimum itself."""
    if nonnegative(ring, added(right, left, -1)):
        return left
    if nonnegative(ring, added(left, right, -1)):
        return right
    a, b = sorted((left, right), key=lambda p: p.key)
    return ring.function(name, a, b, nonneg=nonnegative(ring, a) and nonnegative(ring, b))


def clamp(reading: Reading, node: fx.Node, a: dict[str, Any]) -> Meaning:
    """``clamp(min, max)``, ``clamp_min``, ``clamp_max``, ``relu`` of a statistic."""
    _floating(node)
    meaning = reading.operand(a["self"])
    dims, value = meaning.dims, meaning.value
    for key, function in (("min", maximum), ("max", minimum)):
        bound = a.get(key)
        if bound is not None:
            dims, (value, limit) = reading.broadcast(Meaning(dims, value), reading.operand(bound))
            name = f"clamp_{key}" if limit.constant is not None else f"clamp_{key} by a tensor"
            value = function(reading.ring, value, limit, name)
    return Meaning(dims, value)


def relu(reading: Reading, node: fx.Node, a: dict[str, Any]) -> Meaning:
    """``relu`` of a value that cannot be negative is the identity; else it is not understood."""
    meaning = reading.operand(a["self"])
    if not nonnegative(reading.ring, meaning.value):
        raise Opaque("an activation")
    return meaning


def _fused(
    function: Callable[[Ring, Polynomial, Polynomial, Polynomial, Polynomial], Polynomial],
) -> Rule:
    def rule(reading: Reading, node: fx.Node, a: dict[str, Any]) -> Meaning:
        _floating(node)
        factor = reading.operand(a["value"]).value
        names = ("self", "tensor1", "tensor2")
        dims, (x, y, z) = reading.broadcast(*(reading.operand(a[n]) for n in names))
        return Meaning(dims, function(reading.ring, x, y, z, factor))

    return rule


def lerp(reading: Reading, node: fx.Node, a: dict[str, Any]) -> Meaning:
    """``start + weight * (end - start)``."""
    _floating(node)
    dims, (start, end, weight) = reading.broadcast(
        *(reading.operand(a[n]) for n in ("self", "end", "weight"))
    )
    step = reading.ring.multiply(weight, added(end, start, -1))
    return Meaning(dims, added(start, step))


def exponential(ring: Ring, value: Polynomial) -> Polynomial:
    """``exp``; ``exp(k log p + r) = p^k exp(r)`` for a p whose logarithm is finite."""
    result, rest = number(1), {}
    for monomial, coefficient in value.terms.items():
        base = ring.bases[monomial[0][0]] if len(monomial) == 1 else None
        logs = isinstance(base, Function) and base.name == "log" and monomial[0][1] == 1
        if isinstance(base, Function) and logs and positive(ring, base.argument):
            exponent = exact(float(coefficient))
            result = ring.multiply(result, ring.power(base.argument, exponent))
        else:
            rest[monomial] = coefficient
    if rest:
        result = ring.multiply(result, ring.function("exp", Polynomial(rest), nonneg=True))
    return result


def logarithm(ring: Ring, value: Polynomial) -> Polynomial:
    """``log`` of parameters and statistics."""
    return ring.function("log", value)


def _small(rule: Rule) -> Rule:
    """A rule for values without a normalised tensor in them; else the result is an atom."""

    def guarded(reading: Reading, node: fx.Node, a: dict[str, Any]) -> Meaning:
        for argument in node.all_input_nodes:
            if is_tensor(argument):
                value = reading.operand(argument).value
                big = reading.ring.raw(value) & reading.anchors
                if not all(isinstance(b, fx.Node) and b.meta.get("parameter") for b in big):
                    raise Opaque("a nonlinear function of the tensor itself")
        return rule(reading, node, a)

    return guarded


def bilinear(reading: Reading, node: fx.Node, a: dict[str, Any]) -> Meaning:
    """A product; zero times a tensor carries its gradient, which is zero, and its NaN."""
    found = _binary(Ring.multiply)(reading, node, a)
    if not found.value.terms:
        factors = (reading.operand(a[name]).value for name in ("self", "other"))
        sources = {source for factor in factors for source in reading.ring.raw(factor)}
        if any(reading.ring.differentiable(source) for source in sources):
            raise Opaque("zero times a tensor")
    return found


def sym_float(reading: Reading, node: fx.Node, a: dict[str, Any]) -> Meaning:
    """A size as a floating-point number."""
    return reading.operand(a["self"])


def rsub(reading: Reading, node: fx.Node, a: dict[str, Any]) -> Meaning:
    """``other - alpha * self``."""
    return _sub(reading, node, {**a, "self": a["other"], "other": a["self"]})


_add = _binary(lambda ring, x, y: added(x, y))
_sub = _binary(lambda ring, x, y: added(x, y, -1))
_div = _binary(Ring.divide)
_pow_rule = _binary(power)


def pow_(reading: Reading, node: fx.Node, a: dict[str, Any]) -> Meaning:
    """``pow`` in all its overloads."""
    return _pow_rule(reading, node, {"self": a["self"], "other": a.get("exponent", a.get("other"))})


POINTWISE: dict[str, Rule] = {
    "add": _add, "sub": _sub, "mul": bilinear, "div": _div, "rsub": rsub,
    "neg": _unary(lambda ring, x: scaled(x, -1)),
    "square": _unary(lambda ring, x: ring.multiply(x, x)),
    "sqrt": _unary(lambda ring, x: ring.power(x, Fraction(1, 2))),
    "rsqrt": _unary(lambda ring, x: ring.power(x, Fraction(-1, 2))),
    "reciprocal": _unary(lambda ring, x: ring.divide(number(1), x)),
    "abs": _unary(Ring.absolute),
    "pow": pow_,
    "addcmul": _fused(lambda r, x, y, z, k: added(x, r.multiply(k, r.multiply(y, z)))),
    "addcdiv": _fused(lambda r, x, y, z, k: added(x, r.multiply(k, r.divide(y, z)))),
    "lerp": lerp, "sym_float": sym_float, "relu": relu,
    "clamp": _small(clamp), "clamp_min": _small(clamp), "clamp_max": _small(clamp),
    "maximum": _small(_binary(maximum)), "minimum": _small(_binary(minimum)),
    "exp": _small(_unary(exponential)), "log": _small(_unary(logarithm)),
}  # fmt: skip
