"""The bases of one graph: each formula part exists once, so equality is identity."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from .axes import Axis, Dims, Size
from .expression import Atom, Base, Function, Monomial, Polynomial, Reduction, is_even

T = TypeVar("T")


class Interning:
    """Makes bases and knows their traits.

    Args:
        differentiable: whether a source carries a gradient; ``detach`` of one that does not is
            the identity.
    """

    def __init__(self, differentiable: Callable[[Any], bool] = lambda source: True) -> None:
        self.bases: list[Base] = []
        self.differentiable = differentiable
        self._interned: dict[tuple[object, ...], Base] = {}
        self._order: dict[object, int] = {}
        self._bound: dict[tuple[int, int, Size], Axis] = {}

    def atom(
        self,
        source: object,
        index: Dims,
        *,
        stopped: bool = False,
        moments: frozenset[object] = frozenset(),
    ) -> Polynomial:
        """A tensor read at an index. ``moments``: what an opaque function of statistics holds."""
        stopped = stopped and self.differentiable(source)
        self._order.setdefault(source, len(self._order))
        axes = frozenset(a for dim in index for a in dim)
        raw = frozenset() if moments else frozenset((source,))
        return self._single(
            ("atom", source, index, stopped),
            lambda i: Atom(i, axes, moments, raw, False, 0, source, index, stopped),
        )

    def order(self, source: object) -> int:
        """The place of a source among all that atoms were made of."""
        return self._order[source]

    def function(self, name: str, *arguments: Polynomial, nonneg: bool = False) -> Polynomial:
        """An uninterpreted function of polynomials."""
        return self._single(
            ("function", name, *(a.key for a in arguments)),
            lambda i: Function(i, *self._traits(arguments), nonneg, self._level(arguments),
                               name, arguments),
        )  # fmt: skip

    def reduction(self, kind: str, monomial: Monomial, bound: frozenset[Axis]) -> Polynomial:
        """A reduction of one monomial, its bound axes in canonical form."""
        inner = [self.bases[b] for b, _ in monomial]
        axes = _union(b.axes for b in inner) - bound
        sources = _union(b.moments | b.raw for b in inner)
        sign = all(is_even(e) or self.bases[b].nonnegative for b, e in monomial)
        level = 1 + max(b.level for b in inner)
        return self._single(
            ("reduction", kind, monomial, bound),
            lambda i: Reduction(i, axes, sources, frozenset(), sign, level, kind, monomial, bound),
        )

    # -- traits --------------------------------------------------------------------------------

    def axes(self, polynomial: Polynomial) -> frozenset[Axis]:
        """The free axes."""
        return _union(self.bases[b].axes for b in polynomial.bases())

    def moments(self, polynomial: Polynomial) -> frozenset[object]:
        """The sources that are reduced somewhere inside."""
        return _union(self.bases[b].moments for b in polynomial.bases())

    def raw(self, polynomial: Polynomial) -> frozenset[object]:
        """The sources that stand outside every reduction."""
        return _union(self.bases[b].raw for b in polynomial.bases())

    # -- inner workings ------------------------------------------------------------------------

    def _single(self, key: tuple[object, ...], make: Callable[[int], Base]) -> Polynomial:
        base = self._interned.get(key)
        if base is None:
            base = self._interned[key] = make(len(self.bases))
            assert base.id == len(self.bases), "a base was interned while another was made"
            self.bases.append(base)
        return Polynomial({((base.id, 1),): 1})

    def _traits(
        self, polynomials: Iterable[Polynomial]
    ) -> tuple[frozenset[Axis], frozenset[object], frozenset[object]]:
        bases = {b for p in polynomials for b in p.bases()}
        found = [self.bases[b] for b in bases]
        return (
            _union(b.axes for b in found),
            _union(b.moments for b in found),
            _union(b.raw for b in found),
        )

    def _level(self, polynomials: Iterable[Polynomial]) -> int:
        return max((self.bases[b].level for p in polynomials for b in p.bases()), default=0)


def _union(sets: Iterable[frozenset[T]]) -> frozenset[T]:
    return frozenset().union(*sets)
