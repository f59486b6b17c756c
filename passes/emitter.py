"""Turns formulas back into nodes: small tensors laid out to broadcast against a norm's input."""

from __future__ import annotations

import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode

from bnrewrite.algebra import Reading
from bnrewrite.algebra.axes import Axis, Dims, Size, axes_of, product, size_of
from bnrewrite.algebra.calls import dtype_of, narrows
from bnrewrite.algebra.expression import (
    MAXIMA,
    ZERO,
    Atom,
    Base,
    Exponent,
    Extent,
    Function,
    Monomial,
    Number,
    Polynomial,
    Reduction,
    Sum,
    added,
    factor_of,
    inverse,
    is_even,
    magnitude,
    normalised,
    scaled,
)
from bnrewrite.algebra.ring import Ring
from bnrewrite.algebra.site import Moments

aten = torch.ops.aten
Value = fx.Node | float | int
Reusable = dict[Any, tuple[fx.Node, Dims, Number, bool]]
# (node, factor, power): a base is ``(factor * node) ** power``
Unit = tuple[Callable[[], fx.Node], float, int]


# Their eps and momentum are floats at run time; a symbolic one has no fake value to run with.
SCALAR_ARGUMENTS = (
    aten.batch_norm.default,
    aten.layer_norm.default,
    aten.group_norm.default,
    aten.rms_norm.default,
)
CLAMPS = {"clamp_min": aten.clamp_min.default, "clamp_max": aten.clamp_max.default}
TWO = {**CLAMPS, "maximum": aten.maximum.default, "minimum": aten.minimum.default}


class Unwritable(Exception):
    """A formula that has no form in nodes here; the site stays the user's code."""


def current(node: fx.Node) -> fx.Node:
    """A node, or what replaced it: the tensor of a norm may be the result of one before."""
    while "replaced_by" in node.meta:
        node = node.meta["replaced_by"]
    return node


class Emitter:
    """Writes nodes before one node of a graph.

    Args:
        reading: the meanings of the graph.
        before: new nodes go in front of this one and inherit its origin.
        layout: the dimensions that emitted tensors have, those that do not vary being of size 1.
        dtype: the least precision in which small tensors are computed.
        moments: nodes for E[x] and V of the normalised tensor, by base, where they exist.
    """

    def __init__(self, reading: Reading, before: fx.Node, layout: Dims, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.reading = reading
        self.ring = reading.ring
        self.before = before
        self.layout = layout
        self.given: dict[int, Callable[[], Value]] = {}
        self.variances: list[tuple[Moments, Callable[[], Value]]] = []
        self.units: dict[int, Unit] = {}
        self.reusable: Reusable = {}
        self._written: dict[Any, Value] = {}
        self._symbols: dict[sympy.Expr, Value] = {}

    # -- nodes ---------------------------------------------------------------------------------

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A new node, with its fake value."""
        graph = self.before.graph
        args, kwargs = fx.map_arg((args, kwargs), current)
        with graph.inserting_before(self.before):
            node = graph.call_function(target, args, kwargs)
        for key in ("stack_trace", "nn_module_stack"):
            if key in self.before.meta:
                node.meta[key] = self.before.meta[key]
        values, keywords = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        if target in SCALAR_ARGUMENTS:
            values = tuple(0.5 if isinstance(v, torch.SymFloat) else v for v in values)
        mode = detect_fake_mode(values)
        if mode is None:
            node.meta["val"] = target(*values, **keywords)
        else:
            with enable_python_dispatcher(), mode, torch.no_grad():
                node.meta["val"] = target(*values, **keywords)
        return node

    def extent(self, size: Size) -> Value:
        """A size as a number or a node."""
        if isinstance(size, int):
            return size
        if size.is_Integer:
            return int(size)
        if size in self._symbols:
            return self._symbols[size]
        if size.is_Mul or size.is_Add:
            combine = operator.mul if size.is_Mul else operator.add
            first, *others = (self.extent(a) for a in size.args)
            for other in others:
                first = self.call(combine, first, other)
            self._symbols[size] = first
            return first
        raise Unwritable(f"the size {size} cannot be read from the norm's input")

    def sizes_of(self, node: fx.Node) -> None:
        """Learn the symbolic sizes of a tensor."""
        for dim, extent in enumerate(node.meta["val"].shape):
            if isinstance(extent, torch.SymInt) and not extent.node.expr.is_number:
                expression = extent.node.expr
                if expression not in self._symbols:
                    self._symbols[expression] = self.call(aten.sym_size.int, node, dim)

    def reshape(self, node: fx.Node, shape: list[Size]) -> fx.Node:
        """``reshape``, left out where the shape is that already."""
        current = [_size(s) for s in node.meta["val"].shape]
        if current == shape:
            return node
        symbolic = [s for s in shape if not isinstance(s, int)]
        if len(symbolic) == 1:
            arguments: list[Any] = [s if isinstance(s, int) else -1 for s in shape]
        else:
            arguments = [self.extent(s) for s in shape]
        return self.call(aten.reshape.default, node, arguments)

    def place(self, node: fx.Node, index: Dims, layout: Dims | None = None) -> fx.Node:
        """A tensor whose dimensions run along ``index``, laid out along ``layout``."""
        layout = self.layout if layout is None else layout
        for dim, axes in enumerate(index):
            if not axes and _size(node.meta["val"].shape[dim]) != 1:
                node = self.call(aten.slice.Tensor, node, dim, 0, 1)
        tokens = axes_of(index)
        present = [dim for dim in layout if set(dim) & set(tokens)]
        wanted = [axis for dim in present for axis in dim]
        if set(wanted) != set(tokens):
            raise Unwritable("a tensor varies along a part of a dimension")
        shape: list[Size] = [
            product(a.size for a in dim) if dim in present else 1 for dim in layout
        ]
        if wanted != tokens:
            split: list[Size] = [a.size for a in tokens]
            node = self.reshape(node, split)
            node = self.call(aten.permute.default, node, [tokens.index(a) for a in wanted])
        return self.reshape(node, shape)

    # -- formulas ------------------------------------------------------------------------------

    def tensor(self, polynomial: Polynomial) -> Value:
        """A polynomial as a number or a node in the layout."""
        constant = polynomial.constant
        if constant is not None:
            return _plain(constant)
        key = polynomial.key
        if key not in self._written:
            self._written[key] = self.reused(polynomial) or self._sum(polynomial)
        return self._written[key]

    def reused(self, polynomial: Polynomial, *, at_any_cost: bool = False) -> Value | None:
        """A node of the user's with this meaning, up to a number.

        Args:
            polynomial: what is looked for.
            at_any_cost: take also what costs a further pass over the tensor, as M beside V does.
        """
        if not self.reusable or not self.ring.moments(polynomial):
            return None
        if self.units and self._is_measured(polynomial):
            return None
        lettered, names = self.ring.lettered(polynomial, axes_of(self.layout))
        unit, lead = normalised(lettered)
        entry = self.reusable.get(unit.key)
        if entry is None:
            return None
        node, dims, coefficient, direct = entry
        back = {letter: axis for axis, letter in names.items()}
        dims = tuple(tuple(back.get(a, a) for a in dim) for dim in dims)
        slow = not direct and self.given and self._has_mean(polynomial)
        if slow and not at_any_cost and not _is_root(self.ring, polynomial):
            return None
        try:
            placed = self.place(current(node), dims)
        except Unwritable:
            return None
        ratio = lead / coefficient
        return placed if abs(float(ratio) - 1) < 1e-14 else self.times(placed, ratio)

    def _is_measured(self, polynomial: Polynomial) -> bool:
        """Whether every statistic inside has a unit: then it is written from that."""
        for base_id in polynomial.bases():
            base = self.ring.bases[base_id]
            if base_id in self.units or not base.moments:
                continue
            if isinstance(base, Sum):
                inside: tuple[Polynomial, ...] = (base.polynomial,)
            elif isinstance(base, Function) and base.name in MAXIMA:
                inside = base.arguments
            else:
                return False
            if not all(self._is_measured(p) for p in inside):
                return False
        return True

    def _has_mean(self, polynomial: Polynomial) -> bool:
        """Whether E[x] is inside: then V is too, and ``var_mean`` gives both in one go."""
        todo, seen = list(polynomial.bases()), set()
        means = [next(iter(m.mean.bases())) for m, _ in self.variances]
        while todo:
            base_id = todo.pop()
            if base_id in means:
                return True
            seen.add(base_id)
            base = self.ring.bases[base_id]
            if isinstance(base, Sum):
                todo += base.polynomial.bases() - seen
            elif isinstance(base, Function):
                todo += {b for a in base.arguments for b in a.bases()} - seen
        return False

    def _sum(self, polynomial: Polynomial) -> Value:
        for moments, variance in self.variances:
            lead, rest = self._spread(polynomial, moments)
            if lead.terms and not self._cancels(rest, lead):
                return self.plus(self.times(variance(), self.tensor(lead)), self.tensor(rest))
        if not self._cancels(polynomial):
            return self._total(polynomial)
        common = set.intersection(*(set(monomial) for monomial in polynomial.terms))
        if common:
            terms = polynomial.terms.items()
            rest = Polynomial({tuple(i for i in m if i not in common): c for m, c in terms})
            return self.times(self._term(tuple(sorted(common)), 1), self.tensor(rest))
        known = self.reused(polynomial, at_any_cost=True)
        if known is None:
            raise Unwritable("a sum in it would lose digits in another order of operations")
        return known

    def _spread(self, polynomial: Polynomial, moments: Moments) -> tuple[Polynomial, Polynomial]:
        """``lead * V + rest`` where that is shorter, else a lead of zero."""
        lead = factor_of(polynomial, moments.square.bases().pop())
        if lead.terms:
            spread = self.ring.multiply(lead, moments.variance(self.ring))
            rest = added(polynomial, spread, -1)
            if len(rest.terms) < len(polynomial.terms):
                return lead, rest
        return ZERO, polynomial

    def _cancels(self, polynomial: Polynomial, lead: Polynomial = ZERO) -> bool:
        """Whether ``lead * V`` and the statistics in a sum may be differences of like numbers."""
        bases = self.ring.bases
        found = [
            (coefficient, [(bases[b], e) for b, e in monomial if bases[b].moments])
            for monomial, coefficient in polynomial.terms.items()
        ]
        statistics = [(c, factors) for c, factors in found if factors]
        if len(statistics) + bool(lead.terms) <= 1:
            return False
        return any(c < 0 for c in lead.terms.values()) or any(
            c < 0
            or any(
                not (base.nonnegative or is_even(e) or isinstance(base, Atom))
                for base, e in factors
            )
            for c, factors in statistics
        )

    def _total(self, polynomial: Polynomial) -> Value:
        total: Value = 0
        positive_first = sorted(polynomial.terms.items(), key=lambda item: item[1] < 0)
        for monomial, coefficient in positive_first:
            term = self._term(monomial, magnitude(coefficient))
            if coefficient < 0 and isinstance(total, fx.Node):
                total = self._binary(aten.sub.Tensor, operator.sub, total, term)
            else:
                total = self.plus(total, term if coefficient > 0 else self.times(term, -1))
        return total

    def _term(self, monomial: Monomial, coefficient: Number) -> Value:
        """Coefficient * monomial, the numbers of all its factors in one."""
        result: Value = 1
        statistics = tuple(i for i in monomial if self.ring.bases[i[0]].moments)
        if len(statistics) > 1:
            known = self.reused(Polynomial({statistics: 1}))
            if known is not None:
                result, monomial = known, tuple(i for i in monomial if i not in statistics)
        for base_id, exponent in sorted(monomial, key=lambda item: item[1] < 0):
            base = self.ring.bases[base_id]
            node, factor, power = self._measured(base)
            if exponent < 0 and not _is_tensor(node) and self._may_raise(base, exponent, result):
                raise Unwritable("it divides by a size that may be zero")
            exponent *= power
            if factor != 1:
                coefficient = float(coefficient) * float(factor) ** float(exponent)
            if exponent == -1:
                result = self.over(result, node)
            else:
                result = self.times(result, self.power(node, exponent))
        return self.times(result, coefficient)

    def _may_raise(self, base: Base, exponent: Exponent, result: Value) -> bool:
        """Whether Python's division by a size raises where a tensor's gives inf.

        A number that was read out of a tensor is divided by in Python in the user's code too.
        """
        if self.ring.never_zero(base) or (exponent == -1 and _is_tensor(result)):
            return False
        return not isinstance(base, Atom) and not _is_read_out(base)

    def _measured(self, base: Base) -> tuple[Value, Number, int]:
        """A node, a number and a power: the base is ``(number * node) ** power``."""
        if base.id in self.units:
            node, factor, power = self.units[base.id]
            return node(), factor, power
        if isinstance(base, Sum):
            for monomial in base.polynomial.terms:
                if len(monomial) == 1 and monomial[0][1] == 1 and monomial[0][0] in self.units:
                    _, factor, power = self.units[monomial[0][0]]
                    whole = factor**power
                    return self.tensor(scaled(base.polynomial, inverse(whole))), whole, 1
        return self.base(base), 1, 1

    def power(self, node: Value, exponent: Exponent) -> Value:
        """Node ** exponent by the cheapest operation."""
        key = (node, exponent)
        if key not in self._written:
            self._written[key] = self._power(node, exponent)
        return self._written[key]

    def _power(self, node: Value, exponent: Exponent) -> Value:
        if exponent == 1:
            return node
        if not isinstance(node, fx.Node) or not isinstance(node.meta["val"], torch.Tensor):
            return _scalar(self, operator.pow, node, _plain(exponent))
        named = {
            Fraction(1, 2): aten.sqrt.default,
            Fraction(-1, 2): aten.rsqrt.default,
            -1: aten.reciprocal.default,
        }
        if exponent in named:
            return self.call(named[exponent], node)
        return self.call(aten.pow.Tensor_Scalar, node, _plain(exponent))

    def times(self, left: Value, right: Value | Number) -> Value:
        """Left * right."""
        right = _plain(right) if isinstance(right, Fraction) else right
        if not isinstance(left, fx.Node) and left == 1:
            return right
        if not isinstance(right, fx.Node) and abs(right - 1) < 4e-16:
            return left
        if not isinstance(right, fx.Node) and right == -1 and _is_tensor(left):
            return self.call(aten.neg.default, left)
        return self._binary(aten.mul.Tensor, operator.mul, left, right)

    def plus(self, left: Value, right: Value) -> Value:
        """Left + right."""
        if not isinstance(left, fx.Node) and left == 0:
            return right
        if not isinstance(right, fx.Node) and right == 0:
            return left
        return self._binary(aten.add.Tensor, operator.add, left, right)

    def over(self, left: Value, right: Value) -> Value:
        """Left / right."""
        if _is_tensor(right) and not _is_tensor(left):
            return self.times(self.call(aten.reciprocal.default, right), left)
        return self._binary(aten.div.Tensor, operator.truediv, left, right)

    def _binary(self, target: Any, plain: Any, left: Value, right: Value) -> Value:
        if not _is_tensor(left) and not _is_tensor(right):
            return _scalar(self, plain, left, right)
        if not _is_tensor(left):
            if target is aten.sub.Tensor:
                return self.call(aten.rsub.Scalar, right, left)
            left, right = right, left
        return self.call(target, left, right)

    def base(self, base: Base) -> Value:
        """One base as a node in the layout."""
        if base.id in self.given:
            return self.given[base.id]()
        single = Polynomial({((base.id, 1),): 1})
        key = single.key
        if key not in self._written:
            self._written[key] = self.reused(single) or self._base(base)
        return self._written[key]

    def _base(self, base: Base) -> Value:
        if isinstance(base, Extent):
            return self.extent(base.size)
        if isinstance(base, Sum):
            return self.tensor(base.polynomial)
        if isinstance(base, Function):
            return self._function(base)
        if isinstance(base, Reduction):
            return self._reduction(base)
        assert isinstance(base, Atom)
        assert isinstance(base.source, fx.Node)
        if not isinstance(base.source.meta.get("val"), torch.Tensor):
            return base.source
        node = self.call(aten.detach.default, base.source) if base.stopped else base.source
        dtype = dtype_of(node)
        if not dtype.is_floating_point or narrows(self.dtype, dtype):
            node = self.call(aten.to.dtype, node, self.dtype)
        return self.place(current(node), base.index)

    def _function(self, base: Function) -> Value:
        if base.name == "root":
            raise Unwritable("a standard deviation whose gradient is zero at zero")
        arguments = [self.tensor(a) for a in base.arguments]
        if base.name in TWO:
            arguments.sort(key=lambda a: not _is_tensor(a))
            if not _is_tensor(arguments[0]) or (base.name in CLAMPS and _is_tensor(arguments[1])):
                raise Unwritable(f"a {base.name} of numbers")
            if base.name not in CLAMPS and not _is_tensor(arguments[1]):
                arguments[1] = self.call(aten.full_like.default, arguments[0], arguments[1])
            return self.call(TWO[base.name], *arguments)
        if base.name not in ("abs", "exp", "log"):
            raise Unwritable("a norm whose gradient is zero at zero")
        plain = {"abs": aten.abs.default, "exp": aten.exp.default, "log": aten.log.default}
        return self.call(plain[base.name], *arguments)

    def _reduction(self, base: Reduction) -> Value:
        if base.kind != "mean":
            raise Unwritable("a maximum")
        bound = tuple((axis,) for axis in sorted(base.bound, key=lambda a: a.serial))
        inner = Emitter(self.reading, self.before, (*self.layout, *bound), self.dtype)
        inner.reusable, inner._symbols = self.reusable, self._symbols
        value = inner.tensor(Polynomial({base.monomial: 1}))
        assert isinstance(value, fx.Node)
        dims = list(range(len(self.layout), len(inner.layout)))
        return self.call(aten.mean.dim, value, dims)


def _is_root(ring: Ring, polynomial: Polynomial) -> bool:
    """Whether this is a number times a ``norm`` or ``std``, which only the user's node has."""
    bases = [ring.bases[b] for b in polynomial.bases()]
    return (
        len(polynomial.terms) == len(bases) == 1
        and isinstance(bases[0], Function)
        and bases[0].name == "root"
    )


def _is_read_out(base: Base) -> bool:
    """Whether a size is a number that was read out of a tensor: its symbols are named so."""
    if not isinstance(base, Extent):
        return False
    symbols = sympy.sympify(base.size).free_symbols
    return bool(symbols) and all(symbol.name.startswith("u") for symbol in symbols)


def split_layout(dims: Dims, axes: frozenset[Axis]) -> Dims:
    """The layout in which every dimension that ``axes`` cuts is split into its axes."""
    result: list[tuple[Axis, ...]] = []
    for dim in dims:
        inside = set(dim) & axes
        if inside and inside != set(dim):
            result += [(axis,) for axis in dim]
        else:
            result.append(dim)
    return tuple(result)


def _scalar(emitter: Emitter, function: Any, left: Value, right: Value) -> Value:
    if not isinstance(left, fx.Node) and not isinstance(right, fx.Node):
        value: Value = function(left, right)
        return value
    return emitter.call(function, left, right)


def _is_tensor(value: object) -> bool:
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)


def _plain(value: Number) -> float | int:
    return value if isinstance(value, int) else float(value)


def _size(extent: int | torch.SymInt) -> Size:
    return size_of(extent)
