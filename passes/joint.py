"""Writes a linear map and the affine behind it as one.

Before:  y = (W x + b) a + s
After:   y = W' x + b' with tensors W', b' of the graph, or a kernel that keeps these two
Leaves alone: whatever stands between the two; ``Cleanup`` drops it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from bnrewrite.algebra import Match, Reading, centre
from bnrewrite.algebra.anchors import elements
from bnrewrite.algebra.axes import Size, product, size_of
from bnrewrite.algebra.calls import dtype_of, is_tensor, name_of
from bnrewrite.algebra.expression import Function, Polynomial
from bnrewrite.kernels.folding import Folding, Parts, Unfoldable, folded, folded_parameters
from bnrewrite.kernels.layout import has_values
from bnrewrite.walks import reached

from .emitter import Emitter
from .linear_maps import LinearMap
from .nodes import aten, current
from .rewriting import Rewriting
from .stored import NOT_STORED, Recipe, Stored, extracted, leaves_of
from .writing import Writing


class Joint:
    """A norm with stored statistics right behind a linear map.

    Attributes:
        end: the result of the affine, as its lowering has written it.
    """

    def __init__(
        self,
        rewriting: Rewriting,
        reading: Reading,
        found: Match,
        linear: LinearMap,
        stored: Stored,
    ) -> None:
        self.rewriting, self.reading, self.found = rewriting, reading, found
        self.linear, self.stored = linear, stored
        self.end = current(found.node)

    def write(self, inside: set[fx.Node], fewest: int) -> None:
        """Replace both.

        Args:
            inside: the nodes from the linear map to the result, both among them.
            fewest: elements of the result from which on comparing the stored tensors pays.

        Raises:
            Unfoldable: why they stay two.
        """
        before = self.found.node.prev
        try:
            parts = self._parts()
            inner = _Inner(self.stored, frozenset(_behind(before, self.found.node)))
            places = leaves_of([n for n in parts if n is not None], inner)
            first = leaves_of([self.linear.weight], inner)[:1]  # what is kept is found by it
            places = [*first, *(each for each in places if each not in first)]
            recipe = Recipe(self.rewriting.canonical.module, extracted(parts, inner, places))
        finally:
            _erase(_behind(before, self.found.node))
        if self.rewriting.constants is not None:
            self._settle(recipe, places, self.rewriting.constants)
        elif first:
            self._keep(recipe, places, inside, fewest)
        else:
            raise Unfoldable(NOT_STORED)
        _erase(sorted(inside))

    def _parts(self) -> Parts[fx.Node]:
        """Nodes that compute what is folded."""
        found = self.found
        subtracted = centre(self.reading, found)
        divisor = None if subtracted is None else _divisor(self.reading, found.linear.scale)
        if subtracted is not None and divisor is None:
            raise Unfoldable("its centre is of unknown size beside the deviation")
        channel = found.linear.index[self.linear.channel]
        dims = tuple((axis,) for axis in channel) or ((),)
        emitter = Emitter(self.reading, found.node, dims, torch.float64, {}, {})
        whole = product(axis.size for axis in channel)
        return Parts(
            self.linear.weight,
            self.linear.bias,
            _vector(emitter, found.linear.scale, whole),
            _vector(emitter, found.linear.shift, whole),
            None if subtracted is None else _vector(emitter, subtracted, whole),
            None if divisor is None else _vector(emitter, divisor, whole),
        )

    def _settle(
        self, recipe: Recipe, places: list[fx.Node], constants: Mapping[str, Tensor]
    ) -> None:
        """The folded parameters as tensors of the graph."""
        values = [constants.get(node.name) for node in places]
        if any(value is None or not has_values(value) for value in values):
            raise Unfoldable("its parameters have no values here")
        node, module = self.linear.node, self.rewriting.canonical.module
        with torch.no_grad():
            parts = Parts(*recipe(values))
            pair = folded_parameters(parts, self.linear.outputs, dtype_of(node))
        number = sum(name.startswith("folded_weight_") for name, _ in module.named_buffers())
        made: list[fx.Node] = []
        for name, value in zip(("weight", "bias"), pair, strict=True):
            module.register_buffer(f"folded_{name}_{number}", value)
            with node.graph.inserting_before(node):
                made.append(node.graph.get_attr(f"folded_{name}_{number}"))
        made[0].meta["val"] = self.linear.weight.meta["val"].to(dtype_of(node))
        made[1].meta["val"] = node.meta["val"].new_empty(pair[1].shape)
        with node.graph.inserting_before(node):
            joined = self.linear.called(self.linear.x, *made)
        _describe(joined, node)
        writing = Writing(self.reading, self.found, {}, {})
        self._replace(writing.finish(joined, self.found.linear.index), joined)

    def _keep(
        self, recipe: Recipe, places: list[fx.Node], inside: set[fx.Node], fewest: int
    ) -> None:
        """A kernel that keeps the folded parameters as long as these do not change."""
        node, x = self.linear.node, self.linear.x
        inner = _Inner(self.stored, frozenset(inside | _sizes_of(node)))
        given = [x, *places]
        given += [each for each in leaves_of([self.end], inner) if each not in given]
        read_early = any(user not in inside and user < self.end for user in _sizes_of(node))
        early = all(each < node for each in given)
        if read_early and not early:
            raise Unfoldable("its result is used elsewhere too")
        module = self.rewriting.canonical.module
        folding = Folding(
            recipe,
            fx.GraphModule(module, extracted(self.end, inner, given)),
            self._joined(),
            len(places),
            self.linear.outputs,
            dtype_of(node),
            elements(node) / elements(x),
            fewest,
        )
        name = f"folding_{sum(isinstance(each, Folding) for each in module.children())}"
        module.add_module(name, folding)
        with node.graph.inserting_before(node if early else self.end):
            held = node.graph.get_attr(name)
            result = node.graph.call_function(folded, (held, *given))
        _describe(result, self.end)
        self._replace(result, result)

    def _joined(self) -> fx.GraphModule:
        """The linear map as a function of x, weight and bias."""
        graph = fx.Graph()
        graph.output(self.linear.called(*map(graph.placeholder, ("x", "weight", "bias"))))
        return fx.GraphModule({}, graph)

    def _replace(self, replacement: fx.Node, result: fx.Node) -> None:
        """Put a node in the place of the affine; sizes are those of the new linear map."""
        for user in list(self.linear.node.users):
            if name_of(user) == "sym_size":
                user.replace_input_with(self.linear.node, result)
        self.end.replace_all_uses_with(replacement)
        self.end.meta["replaced_by"] = replacement


@dataclass(frozen=True)
class _Inner:
    """Whether a node is copied into a part: a constant that is computed, or one of the part's."""

    stored: Stored
    own: frozenset[fx.Node]

    def __call__(self, node: fx.Node) -> bool:
        return node in self.own or (node.op != "placeholder" and node in self.stored)


def _vector(emitter: Emitter, value: Polynomial, whole: Size) -> fx.Node:
    """A coefficient with one number per output, in float64."""
    written = emitter.tensor(value)
    if not is_tensor(written):
        shape = [emitter.extent(whole)]
        return emitter.call(aten.full.default, shape, written, dtype=torch.float64)
    sizes = [product(axis.size for axis in dim) for dim in emitter.layout]
    if [size_of(each) for each in written.meta["val"].shape] != sizes:
        written = emitter.call(aten.expand.default, written, list(map(emitter.extent, sizes)))
    return emitter.reshape(written, [whole])


def _divisor(reading: Reading, scale: Polynomial) -> Polynomial | None:
    """The factors of a scale that are divided by, or stand under a root or an exponential."""
    common = set.intersection(*(set(monomial) for monomial in scale.terms))
    bases = reading.ring.bases
    found = [
        (base, exponent)
        for base, exponent in sorted(common)
        if exponent < 0
        or not isinstance(exponent, int)
        or (isinstance(each := bases[base], Function) and each.name == "exp")
    ]
    return Polynomial({tuple(found): 1}) if found else None


def _sizes_of(node: fx.Node) -> set[fx.Node]:
    """The sizes of a tensor, and what is computed from these."""

    def numbers(made: fx.Node) -> list[fx.Node]:
        return [user for user in made.users if isinstance(user.meta.get("val"), torch.SymInt)]

    return set(reached([each for each in node.users if name_of(each) == "sym_size"], numbers))


def _behind(before: fx.Node, end: fx.Node) -> list[fx.Node]:
    """The nodes between two nodes."""
    found = []
    while before.next is not end:
        before = before.next
        found.append(before)
    return found


def _erase(nodes: list[fx.Node]) -> None:
    """Drop those of these nodes that nothing uses; updates in place are not dead by themselves."""
    for node in reversed(nodes):
        if not node.users:
            node.graph.erase_node(node)


def _describe(made: fx.Node, origin: fx.Node) -> None:
    for key in ("stack_trace", "nn_module_stack", "val"):
        if key in origin.meta:
            made.meta[key] = origin.meta[key]
