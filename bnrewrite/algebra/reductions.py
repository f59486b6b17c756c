"""Means, sums, variances, norms and maxima: all end in expectations."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import torch
from torch import fx

from .axes import Axis, Dim, Dims, Opaque, Size, axes_of, product
from .calls import POOLS, dtype_of, name_of, narrows, pools_everything, reduced_dims, shape_of
from .expression import Polynomial, added, exact, number
from .meaning import Meaning, Reading
from .ring import Ring


class Reduced:
    """The operand of a reduction, with the axes that it reduces."""

    def __init__(
        self,
        reading: Reading,
        source: Any,
        dim: object,
        keepdim: bool,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(source, fx.Node) or not source.meta["val"].dtype.is_floating_point:
            raise Opaque("a reduction of integers or complex numbers")
        if dtype is not None and narrows(dtype_of(source), dtype):
            raise Opaque("a reduction that rounds what it reduces")
        meaning = reading.operand(source)
        shape = shape_of(source)
        self.ring: Ring = reading.ring
        self.value = meaning.value
        self.dims = reduced_dims(source, dim)
        self.over: list[Axis] = [a for d in self.dims for a in meaning.dims[d]]
        self.count: Size = product(shape[d] for d in self.dims)
        kept = [() if i in self.dims else d for i, d in enumerate(meaning.dims)]
        self.result: Dims = tuple(
            kept if keepdim else (d for i, d in enumerate(kept) if i not in self.dims)
        )

    def mean(self) -> Polynomial:
        """E[x]."""
        return self.ring.mean(self.value, self.over)

    def sum(self, value: Polynomial | None = None) -> Polynomial:
        """N E[x]."""
        mean = self.ring.mean(self.value if value is None else value, self.over)
        return self.ring.multiply(self.ring.extent(self.count), mean)

    def variance(self, correction: float) -> Polynomial:
        """(E[x^2] - E[x]^2) n / (n - correction)."""
        ring, mean = self.ring, self.mean()
        second = ring.mean(ring.multiply(self.value, self.value), self.over)
        variance = added(second, ring.multiply(mean, mean), -1)
        if correction == 0:
            return variance
        if self.count == correction:
            raise Opaque("a variance with no degree of freedom left")
        count = ring.extent(self.count)
        return ring.multiply(variance, ring.divide(count, added(count, number(correction), -1)))


def _of(reading: Reading, a: dict[str, Any]) -> Reduced:
    keepdim = bool(a.get("keepdim", False))
    return Reduced(reading, a["self"], a.get("dim"), keepdim, a.get("dtype"))


def mean(reading: Reading, node: fx.Node, a: dict[str, Any]) -> Meaning:
    """``mean``."""
    r = _of(reading, a)
    return Meaning(r.result, r.mean())


def total(reading: Reading, node: fx.Node, a: dict[str, Any]) -> Meaning:
    """``sum``."""
    r = _of(reading, a)
    return Meaning(r.result, r.sum())


def _correction(a: dict[str, Any]) -> float:
    if "unbiased" in a:
        return 1 if a["unbiased"] else 0
    correction = a.get("correction")
    if isinstance(correction, fx.Node):
        raise Opaque("a correction that is computed")
    return 1 if correction is None else correction


def variance(reading: Reading, node: fx.Node, a: dict[str, Any]) -> Meaning:
    """``var``."""
    r = _of(reading, a)
    return Meaning(r.result, r.variance(_correction(a)))


def deviation(reading: Reading, node: fx.Node, a: dict[str, Any]) -> Meaning:
    """``std``: a root whose gradient at zero is zero."""
    r = _of(reading, a)
    return Meaning(r.result, r.ring.root(r.variance(_correction(a))))


def variance_and_mean(reading: Reading, node: fx.Node, a: dict[str, Any]) -> tuple[Meaning, ...]:
    """``var_mean``."""
    return variance(reading, node, a), mean(reading, node, a)


def deviation_and_mean(reading: Reading, node: fx.Node, a: dict[str, Any]) -> tuple[Meaning, ...]:
    """``std_mean``."""
    return deviation(reading, node, a), mean(reading, node, a)


def norm(reading: Reading, node: fx.Node, a: dict[str, Any]) -> Meaning:
    """``norm``, ``linalg.norm`` and ``linalg.vector_norm`` for the vector norms."""
    order = a.get("p", a.get("ord"))
    reduced = reduced_dims(a["self"], a.get("dim"))
    if name_of(node) == "linalg_norm" and order not in (None, "fro") and len(reduced) != 1:
        raise Opaque("a matrix norm")
    if isinstance(order, str):
        if order != "fro":
            raise Opaque(f"the matrix norm {order}")
        order = 2
    r = _of(reading, a)
    return Meaning(r.result, p_norm(r, 2 if order is None else order))


def p_norm(r: Reduced, order: object) -> Polynomial:
    """(sum |x|^p)^(1/p); max |x| for p = inf."""
    if not isinstance(order, (int, float)) or order <= 0:
        raise Opaque(f"a norm of order {order}")
    if order == 2:
        return r.ring.root(r.sum(r.ring.multiply(r.value, r.value)))
    magnitude = r.ring.absolute(r.value)
    if order == math.inf:
        return r.ring.maximum_over(magnitude, r.over)
    if order == 1:
        return r.sum(magnitude)
    exponent = exact(order)
    mean = r.ring.mean(r.ring.power(magnitude, exponent), r.over)
    root = r.ring.function(f"root {exponent}", mean, nonneg=True)
    return r.ring.multiply(r.ring.power(r.ring.extent(r.count), 1 / Fraction(exponent)), root)


def maximum(reading: Reading, node: fx.Node, a: dict[str, Any]) -> Meaning:
    """``amax``."""
    r = _of(reading, a)
    return Meaning(r.result, r.ring.maximum_over(r.value, r.over))


def maximum_with_index(
    reading: Reading, node: fx.Node, a: dict[str, Any]
) -> Meaning | tuple[Meaning, ...]:
    """``max``: over one dimension its gradient goes to the first of equal elements."""
    if "other" in a:
        raise Opaque("an elementwise maximum")
    r = _of(reading, a)
    kind = "amax" if a.get("dim") is None else "first"
    value = Meaning(r.result, r.ring.maximum_over(r.value, r.over, kind))
    return value if a.get("dim") is None else (value,)


def pooled(reading: Reading, node: fx.Node, a: dict[str, Any]) -> Meaning:
    """``adaptive_avg_pool*d(1)``, or one window over all: a mean that keeps its dimensions."""
    if not pools_everything(node):
        raise Opaque("a pooling that leaves more than one element")
    count = int(name_of(node).removesuffix("d")[-1])
    r = Reduced(reading, a["self"], list(range(-count, 0)), True)
    return Meaning(r.result, r.mean())


def einsum(reading: Reading, node: fx.Node, a: dict[str, Any]) -> Meaning:
    """A sum of products over named axes."""
    equation, tensors = a["equation"].replace(" ", ""), a["tensors"]
    if "->" not in equation or "..." in equation:
        equation = _explicit(equation, [len(shape_of(t)) for t in tensors])
    inputs, output = equation.split("->")
    letters: dict[str, Dim] = {}
    extents: dict[str, Size] = {}
    ring = reading.ring
    value = number(1)
    for letters_of, tensor in zip(inputs.split(","), tensors, strict=True):
        if len(set(letters_of)) != len(letters_of):
            raise Opaque("a diagonal")
        meaning = reading.operand(tensor)
        for letter, extent in zip(letters_of, shape_of(tensor), strict=True):
            if extents.get(letter, 1) == 1:
                extents[letter] = extent
        order = sorted(letters.keys() | set(letters_of))
        mine = dict(zip(letters_of, meaning.dims, strict=True))
        dims, (value, factor) = reading.broadcast(
            Meaning(tuple(letters.get(k, ()) for k in order), value),
            Meaning(tuple(mine.get(k, ()) for k in order), meaning.value),
        )
        letters = dict(zip(order, dims, strict=True))
        value = ring.multiply(value, factor)
    gone = [k for k in letters if k not in output]
    if not gone and len(tensors) == 1:
        return Meaning(tuple(letters[k] for k in output), value)
    summed = ring.mean(value, axes_of(tuple(letters[k] for k in gone)))
    count = ring.extent(product(extents[k] for k in gone))
    return Meaning(tuple(letters[k] for k in output), ring.multiply(count, summed))


def _explicit(equation: str, ranks: list[int]) -> str:
    """The same equation with letters for the ellipsis and an explicit output."""
    inputs, arrow, output = equation.partition("->")
    terms = inputs.split(",")
    free = iter(c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation)
    most = max((r - len(t) + 3 for t, r in zip(terms, ranks, strict=True) if "..." in t), default=0)
    names = "".join(next(free) for _ in range(most))

    def filled(term: str, rank: int) -> str:
        missing = rank - len(term) + 3
        return term.replace("...", names[len(names) - missing :] if missing else "")

    terms = [filled(t, r) if "..." in t else t for t, r in zip(terms, ranks, strict=True)]
    if not arrow:
        letters = "".join(terms)
        once = sorted(c for c in set(letters) - set(names) if letters.count(c) == 1)
        return f"{','.join(terms)}->{names}{''.join(once)}"
    return f"{','.join(terms)}->{output.replace('...', names)}"


def dot(reading: Reading, node: fx.Node, a: dict[str, Any]) -> Meaning:
    """The inner product of two vectors."""
    other = a.get("tensor", a.get("other"))
    return einsum(reading, node, {"equation": "i,i->", "tensors": [a["self"], other]})


def item(reading: Reading, node: fx.Node, a: dict[str, Any]) -> Meaning:
    """One result of an operation with several."""
    results = reading.outputs.get(a["self"])
    if results is None or a["other"] >= len(results):
        raise Opaque("one of several results")
    result = results[a["other"]]
    if not isinstance(result, Meaning):
        raise Opaque("a part that no formula is known of")
    return result


REDUCTIONS = {
    "mean": mean, "sum": total, "var": variance, "std": deviation,
    "var_mean": variance_and_mean, "std_mean": deviation_and_mean,
    "norm": norm, "linalg_vector_norm": norm, "linalg_norm": norm, "frobenius_norm": norm,
    "amax": maximum, "max": maximum_with_index, "einsum": einsum, "dot": dot, "vdot": dot,
    **dict.fromkeys(sorted(POOLS), pooled),
    "getitem": item,
}  # fmt: skip
