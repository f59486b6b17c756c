"""Reads the numbers of a norm out of its formula: eps, affine, order, and its name."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction

from torch import fx

from .axes import Axis, Dims
from .calls import is_tensor
from .catalogue import Roles, name_centred
from .expression import (
    MAXIMA,
    ONE,
    ZERO,
    Extent,
    Function,
    Monomial,
    Number,
    Polynomial,
    Reduction,
    Sum,
    added,
    exact,
    factor_of,
    scaled,
)
from .frozen import frozen
from .meaning import Reading
from .ring import Ring
from .signs import positive
from .site import (
    Linear,
    Moments,
    factored,
    mixes_gradients,
    moments_of,
    reduced_axes,
    split_shift,
)


@dataclass(frozen=True)
class Match:
    """A norm site and its formula, ``y = x * scale + shift`` with ``scale = part * weight``.

    Attributes:
        linear: the site as degree one in x.
        kind: one of ``bnrewrite.options.KINDS``.
        over: the reduced axes.
        eps: as the user's formula has it, relative to the user's statistic.
        root_eps: for ``(V + root_eps)^(-1/2)`` and ``(E[x^2] + root_eps)^(-1/2)``: the native eps.
        part: the factor of the scale that is made of moments of x.
        weight, bias: free of moments of x.
        centred: the shift is ``bias - M * scale``.
        inner: ``shift = inner * weight + bias``.
        masked: the root is ``norm``'s, with gradient zero at zero.
        order: p of an Lp norm.
        reason: why the formula has no name (kind "general").
        left: it only looks like a norm, and stays the user's code for that reason.
    """

    linear: Linear
    kind: str
    over: frozenset[Axis]
    moments: Moments
    part: Monomial
    weight: Polynomial
    bias: Polynomial
    centred: bool
    inner: Polynomial = ZERO
    eps: float | None = None
    root_eps: Polynomial | None = None
    masked: bool = False
    order: float | None = None
    reason: str | None = None
    left: bool = False

    @property
    def node(self) -> fx.Node:
        """The node whose value is replaced."""
        return self.linear.node


@dataclass(frozen=True)
class Denominator:
    """A statistic in a denominator.

    Attributes:
        variance: of V, else of a p-norm.
        order: p.
        inside: the eps stands under the root, in units of V or of E[|x|^p].
        outside: the eps stands outside the root or in a maximum, in units of the p-norm.
        masked: the root is ``norm``'s, with gradient zero at zero.
        factor: ``(a V + e)^(-1/2) = a^(-1/2) (V + e / a)^(-1/2)`` where a is not a number (a
            correction over a symbolic size): a^(-1/2), which moves to the weight.
    """

    variance: bool
    order: float
    inside: Polynomial | None
    outside: float | None
    masked: bool
    factor: Polynomial = ONE


def match(reading: Reading, linear: Linear) -> Match:
    """The norm that a site computes: a named one or "general" with the reason."""
    ring = reading.ring
    over = reduced_axes(ring, linear)
    if linear.source not in ring.moments(linear.scale):
        part_of = "its statistics are of a part of the tensor, or of a tensor computed from it"
        return _general(ring, linear, frozenset(), part_of)
    if over is None or not over:
        return _general(ring, linear, frozenset(), "its statistics run over different axes")
    split = factored(ring, linear)
    moments = moments_of(ring, linear, over)
    if split is None:
        return _general(ring, linear, over, "its scale is a sum of different statistics")
    part, weight = split
    inner, rest = split_shift(ring, linear, weight)
    centred_bias = added(linear.shift, ring.multiply(linear.scale, moments.mean))
    uncentred = linear.source not in ring.moments(linear.shift)
    centred = not uncentred and linear.source not in ring.moments(centred_bias)
    bias = centred_bias if centred else rest
    if centred:
        inner = scaled(ring.multiply(Polynomial({part: 1}), moments.mean), -1)
    base = Match(linear, "general", over, moments, part, weight, bias, centred, inner)
    reason: str | None = _reason(ring, linear, base, uncentred)
    found = denominator(ring, linear, part, moments, over) if reason is None else None
    if reason is None and found is None:
        reason = "its denominator is not the root of a moment plus a constant"
    if reason is None and found is not None and found.variance != centred:
        reason = "it subtracts the mean but divides by the root mean square" if centred else (
            "it divides by the standard deviation without subtracting the mean"
        )  # fmt: skip
    if reason is not None or found is None:
        return replace(base, reason=reason, eps=None)
    return _named_centred(reading, base, found) if centred else _named_uncentred(ring, base, found)


def _reason(ring: Ring, linear: Linear, base: Match, uncentred: bool) -> str | None:
    if not uncentred and not base.centred:
        return "it does not subtract the mean of what it divides by"
    if mixes_gradients(ring, linear):
        return "a part of it is detached: no gradient flows through that statistic"
    return None


def _general(ring: Ring, linear: Linear, over: frozenset[Axis], reason: str) -> Match:
    moments = moments_of(ring, linear, over)
    return Match(
        linear, "general", over, moments, (), linear.scale, linear.shift, False, reason=reason
    )


def lookalike(ring: Ring, linear: Linear, reason: str) -> Match:
    """A formula that is none of the tensor that it centres."""
    return replace(_general(ring, linear, frozenset(), reason), left=True)


def affine(ring: Ring, linear: Linear) -> Match:
    """A site whose statistics are stored: nothing of x is reduced."""
    moments, parts = Moments(ONE, ONE), frozen(ring, linear)
    eps = None if parts is None else float(parts.eps) or None
    return Match(
        linear, "affine", frozenset(), moments, (), linear.scale, linear.shift, False, eps=eps
    )


def _named_centred(reading: Reading, base: Match, found: Denominator) -> Match:
    ring = reading.ring
    if found.outside is not None or found.inside is None or found.masked:
        return replace(base, reason="eps is added after the root", eps=found.outside)
    inside = found.inside.constant
    eps = None if inside is None else float(inside)
    kind = _named(reading, base)
    affine = ring.axes(base.weight) | ring.axes(base.bias)
    if kind is None or not affine <= _affine_axes(base, kind):
        return replace(base, reason="its affine runs along axes that no named norm has", eps=eps)
    base = _moved(ring, base, found)
    return replace(base, kind=kind, eps=eps, root_eps=found.inside)


def _moved(ring: Ring, base: Match, found: Denominator) -> Match:
    """The same scale as ``(V + e / a)^(-1/2)`` and a weight with the factor a^(-1/2)."""
    if found.factor == ONE:
        return base
    assert found.inside is not None
    moment = base.moments.variance(ring) if found.variance else base.moments.square
    ((part, _),) = ring.power(added(moment, found.inside), Fraction(-1, 2)).terms.items()
    return replace(
        base,
        part=part,
        weight=ring.multiply(base.weight, found.factor),
        inner=ring.divide(base.inner, found.factor),
    )


def _affine_axes(base: Match, kind: str) -> frozenset[Axis]:
    """The axes along which a native op can have its affine."""
    kept = base.linear.axes - base.over
    if kind == "batch_norm":
        return kept
    if kind == "weight_standardization":
        return base.linear.axes
    if kind == "instance_norm":
        return frozenset(a for i, d in enumerate(base.linear.index) for a in d if i) & kept
    if kind == "group_norm":
        return frozenset(a for d in base.linear.index[1:] for a in d)
    return base.over


def _named_uncentred(ring: Ring, base: Match, found: Denominator) -> Match:
    lp = found.order != 2 or _clamped(ring, base) or _is_over_sum(ring, base, found)
    eps = found.outside
    if found.inside is not None and found.inside.constant is not None:
        eps = float(found.inside.constant)
    root = found.inside if found.order == 2 and not found.masked else None
    everything = base.linear.axes
    if not (ring.axes(base.weight) < everything and ring.axes(base.bias) < everything):
        return replace(base, reason="its affine is as large as the tensor", eps=eps)
    kind = "lp_normalize" if lp else "rms_norm"
    if root is not None:
        base = _moved(ring, base, found)
    return replace(
        base,
        kind=kind,
        eps=eps,
        root_eps=root,
        masked=found.masked,
        order=found.order,
    )


def _is_over_sum(ring: Ring, base: Match, found: Denominator) -> bool:
    """Whether the statistic is a sum of squares, not a mean: the weight has a factor n^(-1/2)."""
    if len(base.weight.terms) != 1:
        return False
    ((monomial, coefficient),) = base.weight.terms.items()
    sizes = tuple(i for i in monomial if isinstance(ring.bases[i[0]], Extent))
    root = ring.power(ring.count(base.over), Fraction(1, 2))
    own = ring.multiply(Polynomial({sizes: coefficient}), found.factor)
    number = ring.multiply(own, root).constant
    return number is not None and math.isclose(float(number), 1, rel_tol=1e-9)


def _clamped(ring: Ring, base: Match) -> bool:
    first = ring.bases[base.part[0][0]]
    return isinstance(first, Function) and first.name in MAXIMA


def denominator(
    ring: Ring, linear: Linear, part: Monomial, moments: Moments, over: frozenset[Axis]
) -> Denominator | None:
    """The statistic that the scale divides by."""
    if len(part) != 1:
        return None
    base, exponent = ring.bases[part[0][0]], part[0][1]
    if exponent == Fraction(-1, 2) and isinstance(base, (Sum, Reduction)):
        single = Polynomial({((base.id, 1),): 1})
        return _under_root(ring, base.polynomial if isinstance(base, Sum) else single, moments)
    if isinstance(base, Sum) and exponent == -1:
        constant = base.polynomial.terms.get((), 0)
        rest = added(base.polynomial, Polynomial({(): constant}), -1) if constant else None
        plain = _norm(ring, linear, rest, moments, over) if rest else None
        found = _outside(plain, float(constant))
        return replace(found, factor=_sizes(ring, rest)) if found and rest else None
    if isinstance(base, Function) and base.name in MAXIMA and exponent in (-1, Fraction(-1, 2)):
        return _clamp(ring, linear, base, exponent == -1, moments, over)
    inverse = Polynomial({((part[0][0], -exponent),): 1})
    return _norm(ring, linear, inverse, moments, over)


def _under_root(ring: Ring, polynomial: Polynomial, moments: Moments) -> Denominator | None:
    """(a V + e) or (a E[x^2] + e), scaled to a = 1."""
    ((square, _),) = moments.square.terms.items()
    lead = factor_of(polynomial, square[0][0])
    if not positive(ring, lead) or ring.raw(lead) or ring.moments(lead):
        return None
    for variance, moment in ((True, moments.variance(ring)), (False, moments.square)):
        rest = added(polynomial, ring.multiply(lead, moment), -1)
        if _is_eps(ring, rest):
            inside = ring.divide(rest, lead)
            factor = ONE if lead.constant == 1 else ring.power(lead, Fraction(-1, 2))
            return Denominator(variance, 2, inside, None, False, factor)
    return None


def _is_eps(ring: Ring, value: Polynomial) -> bool:
    """A number that is not negative, or a scalar that is known at run time only."""
    if value.constant is not None:
        return float(value.constant) >= 0
    return not ring.moments(value) and not any(is_tensor(s) for s in ring.raw(value))


def _norm(
    ring: Ring, linear: Linear, value: Polynomial, moments: Moments, over: frozenset[Axis]
) -> Denominator | None:
    """A p-norm or a standard deviation with a positive factor and no eps."""
    if len(value.terms) != 1 or next(iter(value.terms.values())) <= 0:
        return None
    ((monomial, _),) = value.terms.items()
    items = [i for i in monomial if linear.source in ring.bases[i[0]].moments]
    if len(items) != 1 or ring.axes(Polynomial({tuple(i for i in monomial if i not in items): 1})):
        return None
    single = Polynomial({tuple(items): 1})
    magnitude = ring.absolute(ring.atom(linear.source, linear.index))
    known = [
        (2.0, True, False, ring.root(moments.square)),
        (2.0, False, False, ring.power(moments.square, Fraction(1, 2))),
        (2.0, True, True, ring.root(moments.variance(ring))),
        (2.0, False, True, ring.power(moments.variance(ring), Fraction(1, 2))),
        (1.0, False, False, ring.mean(magnitude, over)),
        (math.inf, False, False, ring.maximum_over(magnitude, over)),
        (math.inf, False, False, ring.maximum_over(magnitude, over, "first")),
    ]
    for order, masked, variance, candidate in known:
        if candidate == single:
            return Denominator(variance, order, ZERO, None, masked)
    base, exponent = ring.bases[items[0][0]], items[0][1]
    if isinstance(base, Function) and base.name.startswith("root ") and exponent == 1:
        power = exact(Fraction(base.name.removeprefix("root ")))
        if ring.mean(ring.power(magnitude, power), over) == base.argument:
            return Denominator(False, float(power), ZERO, None, True)
    if isinstance(exponent, Fraction):
        power = 1 / exponent
        if ring.power(ring.mean(ring.power(magnitude, power), over), exponent) == single:
            return Denominator(False, float(power), ZERO, None, False)
    return None


def _outside(plain: Denominator | None, eps: float) -> Denominator | None:
    if plain is None or eps <= 0:
        return None
    return Denominator(plain.variance, plain.order, None, eps, plain.masked)


def _sizes(ring: Ring, value: Polynomial) -> Polynomial:
    """One over the symbolic sizes in front of a term."""
    ((monomial, _),) = value.terms.items()
    sizes = tuple(i for i in monomial if isinstance(ring.bases[i[0]], Extent))
    return ring.power(Polynomial({sizes: 1}), -1)


def _clamp(
    ring: Ring, linear: Linear, base: Function, whole: bool, moments: Moments, over: frozenset[Axis]
) -> Denominator | None:
    constants = [a.constant for a in base.arguments]
    if (constants[0] is None) == (constants[1] is None):
        return None
    index = 0 if constants[0] is not None else 1
    limit: Number = constants[index] or 0
    other = base.arguments[1 - index]
    if not whole:
        found = _under_root(ring, other, moments)
        return _outside(found, float(limit)) if found and found.inside == ZERO else None
    return _outside(_norm(ring, linear, other, moments, over), float(limit))


def _named(reading: Reading, base: Match) -> str | None:
    """The name of a centred norm: ``batch_norm(x.t())`` is one of the transposed tensor."""
    linear = base.linear
    name = name_centred(roles_of(reading, base, linear.index))
    if name == "layer_norm" and set(linear.index) == set(linear.dims):
        seen = name_centred(roles_of(reading, base, linear.dims))
        return seen if seen == "batch_norm" else name
    return name


def roles_of(reading: Reading, base: Match, index: Dims) -> Roles:
    """What happens to each dimension of the normalised tensor, in the order of ``index``."""
    kept, reduced, mixed, affine = set(), set(), set(), set()
    runs = reading.ring.axes(base.weight) | reading.ring.axes(base.bias)
    for i, dim in enumerate(index):
        inside = set(dim) & base.over
        if inside and inside != set(dim):
            mixed.add(i)
        elif inside:
            reduced.add(i)
        elif dim:
            kept.add(i)
        if set(dim) & runs:
            affine.add(i)
    return Roles(
        frozenset(kept), frozenset(reduced), frozenset(mixed), frozenset(affine),
        len(index), reading.is_parameter(base.linear.source),
    )  # fmt: skip
