"""Reductions and substitutions: the last layer of the algebra's arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction

from .arithmetic import Arithmetic
from .axes import Axis, Dim, Opaque, Size, product
from .expression import (
    ZERO,
    Atom,
    Base,
    Extent,
    Function,
    Monomial,
    Polynomial,
    Reduction,
    Sum,
    added,
    is_even,
    number,
)

Leaf = Callable[[Base], Polynomial | None]


class Ring(Arithmetic):
    """The formulas of one graph: polynomials, their means and maxima, and substitutions."""

    def within(self, *polynomials: Polynomial) -> Iterator[Base]:
        """The bases of polynomials, and those of sums and functions among them, once each."""
        todo = [base for polynomial in polynomials for base in polynomial.bases()]
        seen: set[int] = set()
        while todo:
            base = self.bases[todo.pop()]
            if base.id in seen:
                continue
            seen.add(base.id)
            yield base
            if isinstance(base, Sum):
                todo += base.polynomial.bases()
            elif isinstance(base, Function):
                todo += [b for argument in base.arguments for b in argument.bases()]

    # -- reductions ----------------------------------------------------------------------------

    def mean(self, polynomial: Polynomial, over: Iterable[Axis]) -> Polynomial:
        """The expectation over axes, taken apart term by term."""
        return self._reduce("mean", polynomial, frozenset(over))

    def maximum_over(
        self, polynomial: Polynomial, over: Iterable[Axis], kind: str = "amax"
    ) -> Polynomial:
        """The maximum over axes of one nonnegatively scaled monomial."""
        if len(polynomial.terms) != 1 or next(iter(polynomial.terms.values())) < 0:
            raise Opaque("a maximum of a sum")
        return self._reduce(kind, polynomial, frozenset(over))

    def _reduce(self, kind: str, polynomial: Polynomial, over: frozenset[Axis]) -> Polynomial:
        result = ZERO
        for monomial, coefficient in polynomial.terms.items():
            inside = tuple(item for item in monomial if self.bases[item[0]].axes & over)
            outside = tuple(item for item in monomial if not self.bases[item[0]].axes & over)
            if kind != "mean" and not all(
                is_even(e) or self.bases[b].nonnegative for b, e in outside
            ):
                raise Opaque("a maximum of a product with a factor of unknown sign")
            term = Polynomial({outside: coefficient})
            if inside:
                term = self.multiply(term, self._reduce_monomial(kind, inside, over))
            result = added(result, term)
        return result

    def _reduce_monomial(self, kind: str, monomial: Monomial, over: frozenset[Axis]) -> Polynomial:
        free = frozenset().union(*(self.bases[b].axes for b, _ in monomial))
        bound = over & free
        if len(monomial) == 1 and monomial[0][1] == 1:
            inner = self.bases[monomial[0][0]]
            if isinstance(inner, Reduction) and inner.kind == kind == "mean":
                monomial, bound = inner.monomial, bound | inner.bound
        return self.reduction(kind, *self._canonical(monomial, bound))

    def _canonical(
        self, monomial: Monomial, bound: frozenset[Axis]
    ) -> tuple[Monomial, frozenset[Axis]]:
        """Rename bound axes by their order of appearance, fusing neighbours that were split."""
        level = 1 + max(self.bases[b].level for b, _ in monomial)
        ordered = sorted(monomial, key=lambda item: (self._rank(self.bases[item[0]]), item[1]))
        dims = [d for b, _ in ordered for d in self._index(self.bases[b])]
        fused = _fusions(dims, bound)
        names: dict[Axis, Axis] = {}
        for dim in dims:
            for axis in dim:
                if axis in bound and axis not in names:
                    size = fused[axis][1] if axis in fused else axis.size
                    key = (level, len(names), size)
                    names[axis] = self._bound.setdefault(key, Axis(size))
        dropped = {follower for chain, _ in fused.values() for follower in chain[1:]}

        def rename(dim: Dim) -> Dim:
            return tuple(names.get(a, a) for a in dim if a not in dropped)

        polynomial = self.reindex(Polynomial({monomial: 1}), rename)
        ((renamed, _),) = polynomial.terms.items()
        return renamed, frozenset(names[a] for a in names if a not in dropped)

    def lettered(
        self, polynomial: Polynomial, order: Iterable[Axis]
    ) -> tuple[Polynomial, dict[Axis, Axis]]:
        """The same formula with its free axes renamed in the given order; and the renaming.

        Two tensors that compute the same of their own axes have the same lettered formula.
        """
        free = self.axes(polynomial)
        names: dict[Axis, Axis] = {}
        for axis in order:
            if axis in free and axis not in names:
                key = (0, len(names), axis.size)
                names[axis] = self._bound.setdefault(key, Axis(axis.size))
        moves: dict[Axis, Dim] = {a: (b,) for a, b in names.items()}
        return self.substitute(polynomial, moves), names

    # -- rewriting -----------------------------------------------------------------------------

    def substitute(self, polynomial: Polynomial, moves: dict[Axis, Dim]) -> Polynomial:
        """Replace axes by tuples of axes everywhere."""
        if not moves or not any(self.bases[b].axes & moves.keys() for b in polynomial.bases()):
            return polynomial
        return self.reindex(
            polynomial, lambda dim: tuple(p for a in dim for p in moves.get(a, (a,)))
        )

    def reindex(self, polynomial: Polynomial, rename: Callable[[Dim], Dim]) -> Polynomial:
        """Apply a renaming to every dimension of every atom's index."""

        def leaf(base: Base) -> Polynomial | None:
            if isinstance(base, Atom):
                index = tuple(rename(dim) for dim in base.index)
                return self.atom(base.source, index, stopped=base.stopped, moments=base.moments)
            return None

        return self.transform(polynomial, leaf)

    def stop(self, polynomial: Polynomial) -> Polynomial:
        """The same value with no gradient (``detach``)."""
        return self._stopped(polynomial, stopped=True)

    def attached(self, polynomial: Polynomial) -> Polynomial:
        """The same value with the gradient of everything inside."""
        return self._stopped(polynomial, stopped=False)

    def _stopped(self, polynomial: Polynomial, *, stopped: bool) -> Polynomial:
        def leaf(base: Base) -> Polynomial | None:
            if isinstance(base, Atom):
                return self.atom(base.source, base.index, stopped=stopped, moments=base.moments)
            return None

        return self.transform(polynomial, leaf)

    def without_roots(self, polynomial: Polynomial) -> Polynomial:
        """Every root as a plain power: the same value, and the same gradient away from zero."""

        def leaf(base: Base) -> Polynomial | None:
            if isinstance(base, Function) and base.name == "root":
                return self.power(self.without_roots(base.argument), Fraction(1, 2))
            return None

        return self.transform(polynomial, leaf)

    def transform(self, polynomial: Polynomial, leaf: Leaf) -> Polynomial:
        """Rebuild a polynomial, replacing each base for which ``leaf`` gives a value."""
        cache: dict[int, Polynomial] = {}

        def rebuild(p: Polynomial) -> Polynomial:
            result = ZERO
            for monomial, coefficient in p.terms.items():
                term = number(coefficient)
                for base, exponent in monomial:
                    new = cache.get(base)
                    if new is None:
                        new = cache[base] = visit(self.bases[base])
                    if len(new.terms) == 1 and new.terms.get(((base, 1),)) == 1:
                        factor = Polynomial({((base, exponent),): 1})
                    else:
                        factor = self.power(new, exponent)
                    term = self.multiply(term, factor)
                result = added(result, term)
            return result

        def visit(base: Base) -> Polynomial:
            new = leaf(base)
            if new is not None:
                return new
            if isinstance(base, Reduction):
                inner = rebuild(Polynomial({base.monomial: 1}))
                return self._reduce(base.kind, inner, base.bound)
            if isinstance(base, Sum):
                return rebuild(base.polynomial)
            if isinstance(base, Function):
                arguments = [rebuild(a) for a in base.arguments]
                if base.name == "root":
                    return self.root(arguments[0])
                if base.name == "abs":
                    return self.absolute(arguments[0])
                return self.function(base.name, *arguments, nonneg=base.nonnegative)
            return Polynomial({((base.id, 1),): 1})

        return rebuild(polynomial)

    # -- inner workings ------------------------------------------------------------------------

    def _rank(self, base: Base) -> tuple[object, ...]:
        """An order of bases that does not depend on the names of axes."""
        if isinstance(base, Atom):
            return (0, self._order[base.source], int(base.stopped))
        if isinstance(base, Reduction):
            return (1, tuple(sorted(self._rank(self.bases[b]) for b, _ in base.monomial)))
        if isinstance(base, Function):
            return (2, base.name)
        return (3, base.id) if isinstance(base, Extent) else (4, len(base.axes))

    def _index(self, base: Base) -> list[Dim]:
        """The dimensions of all atoms inside a base, in a deterministic order."""
        if isinstance(base, Atom):
            return list(base.index)
        inside: Iterable[Monomial] = ()
        if isinstance(base, Reduction):
            inside = (base.monomial,)
        elif isinstance(base, Sum):
            inside = base.polynomial.terms
        elif isinstance(base, Function):
            inside = (m for a in base.arguments for m in a.terms)
        items = {b for monomial in inside for b, _ in monomial}
        ordered = sorted(items, key=lambda b: (str(self._rank(self.bases[b])), b))
        return [dim for b in ordered for dim in self._index(self.bases[b])]


def _fusions(dims: list[Dim], bound: frozenset[Axis]) -> dict[Axis, tuple[list[Axis], Size]]:
    """Chains of bound axes that stand side by side wherever they stand."""
    after: dict[Axis, set[Axis | None]] = {}
    before: dict[Axis, set[Axis | None]] = {}
    for dim in dims:
        for i, axis in enumerate(dim):
            after.setdefault(axis, set()).add(dim[i + 1] if i + 1 < len(dim) else None)
            before.setdefault(axis, set()).add(dim[i - 1] if i else None)

    def follower(axis: Axis) -> Axis | None:
        (next_axis, *others) = after[axis]
        if others or next_axis is None or next_axis not in bound:
            return None
        return next_axis if before[next_axis] == {axis} else None

    followers = {a: f for a in bound if a in after and (f := follower(a)) is not None}
    chains: dict[Axis, tuple[list[Axis], Size]] = {}
    for axis in followers.keys() - set(followers.values()):
        chain = [axis]
        while chain[-1] in followers:
            chain.append(followers[chain[-1]])
        chains[axis] = (chain, product(a.size for a in chain))
    return chains
