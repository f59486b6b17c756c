"""Folds a constant affine into the linear map before it.

Before:  y = norm(W x + b), the norm having stored statistics: ``y = (W x + b) a + s``
After:   y = (a W) x + (a b + s), weight and bias computed in float64
Leaves alone: a norm before the linear map; an affine along other axes than the map's outputs; a map
whose result is used elsewhere too; weights that carry a gradient, in eager mode also those that
are large beside the result.

Where the parameters are constants (an export) their folded values become tensors of the graph. In
eager mode a parameter may change between two calls: there a kernel keeps the folded weight and
compares (``bnrewrite/kernels/folding.py``). Other stages have no place to look, and stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from bnrewrite.algebra import Reading, centre
from bnrewrite.algebra.anchors import elements
from bnrewrite.algebra.axes import Opaque, axes_of, product
from bnrewrite.algebra.calls import CASTS, arguments_of, dtype_of, is_tensor, name_of
from bnrewrite.algebra.expression import Function, Polynomial
from bnrewrite.algebra.match import Match
from bnrewrite.kernels.folding import Folding, Parts, Unfoldable, folded, folded_parameters
from bnrewrite.kernels.layout import has_values
from bnrewrite.report.site import REWRITTEN

from .linear_maps import LinearMap, linear_map
from .nodes import Unwritable, aten, current
from .rewriting import Rewriting
from .stored import Stored, extracted, leaves_of
from .writing import Writing

# A float32 number of the weight takes 0.22 ns to compare, one of the result 0.15 ns to transform
# (one core, docs/decisions/0015-fold.md); comparing four vectors takes as long as 30,000 of these.
SMALLEST = 65536  # elements of the result
TIMES = 4  # as many elements of the result as of the stored tensors

ROOMIER = "more accurate than the source: the result before the affine is rounded to {dtype} there"


@dataclass(frozen=True)
class Fold:
    """Runs behind ``Lower``: what it cannot fold has its lowering already."""

    name: str = "fold"

    def run(self, rewriting: Rewriting) -> None:
        """Change the graph site by site, and the records with it."""
        reading = rewriting.reading
        affine = [d for d in rewriting.decisions if d.match.kind == "affine"]
        if reading is None or any(d.record is None for d in rewriting.decisions) or not affine:
            return
        stored, live = Stored(rewriting, reading), _live(rewriting.graph)
        for decision in affine:
            found = linear_map(decision.match.linear.source)
            assert decision.record is not None
            if found is None or decision.record.status != REWRITTEN:
                continue
            try:
                _Site(rewriting, reading, decision.match, found, stored, live).fold()
            except (Unfoldable, Unwritable, Opaque) as refusal:
                note = f"not folded into the {name_of(found.node)} before it: {refusal}"
                decision.notes.append(note)
            else:
                decision.lowering = "fold"
                if _is_half(found.node):
                    decision.notes.append(_roomier(found.node))
            decision.record = replace(
                decision.record, lowering=decision.lowering, notes=tuple(decision.notes)
            )


def _live(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that something is made of: what lowerings left behind goes with ``Cleanup``."""
    *_, output = graph.nodes
    found, todo = {output}, [output]
    while todo:
        for node in todo.pop().all_input_nodes:
            if node not in found:
                found.add(node)
                todo.append(node)
    return found


def _is_half(node: fx.Node) -> bool:
    return dtype_of(node) in (torch.float16, torch.bfloat16)


def _roomier(node: fx.Node) -> str:
    return ROOMIER.format(dtype=_name(dtype_of(node)))


class _Site:
    """One norm behind a linear map."""

    def __init__(
        self,
        rewriting: Rewriting,
        reading: Reading,
        found: Match,
        linear: LinearMap,
        stored: Stored,
        live: set[fx.Node],
    ) -> None:
        self.rewriting, self.reading, self.found = rewriting, reading, found
        self.linear, self.stored, self.live = linear, stored, live
        self.end = current(found.node)
        self.weight = _uncast(linear.weight)
        self.bias = None if linear.bias is None else _uncast(linear.bias)

    def fold(self) -> None:
        """Replace linear map and affine.

        Raises:
            Unfoldable: why they stay two.
        """
        self._check()
        inside = self._between()
        if self.rewriting.constants is None:
            self._check_eager()
        before = self.found.node.prev
        try:
            parts = self._parts()
            inner = _Inner(self.stored, frozenset(_behind(before, self.found.node)))
            places = leaves_of([n for n in parts if n is not None], inner)
            first = leaves_of([self.weight], inner)[0]  # by which what is kept is found again
            places = [first, *(each for each in places if each is not first)]
            recipe = extracted(parts, inner, places)
        finally:
            _erase(_behind(before, self.found.node))
        if self.rewriting.constants is None:
            self._keep(recipe, places, inside)
        else:
            self._settle(recipe, places, self.rewriting.constants)
        _erase(sorted(inside))

    # -- what stands against it ------------------------------------------------------------------

    def _check(self) -> None:
        ring, linear, node = self.reading.ring, self.found.linear, self.linear.node
        reduced = ring.moments(linear.scale) | ring.moments(linear.shift)
        sources = ring.raw(linear.scale) | ring.raw(linear.shift) | reduced
        given = [self.weight, *([] if self.bias is None else [self.bias])]
        objection = self.stored.objection((*given, *map(_current, sources)))
        if objection is not None:
            raise Unfoldable(objection)
        channels = set(linear.index[self.linear.channel])
        if not ring.axes(linear.scale) | ring.axes(linear.shift) <= channels:
            raise Unfoldable("the affine runs along other axes than its outputs")
        dtypes = [_name(dtype_of(each)) for each in (node, self.found.node)]
        if dtypes[0] != dtypes[1]:
            raise Unfoldable(f"its result is {dtypes[0]}, that of the affine {dtypes[1]}")
        if _is_half(node) and self.rewriting.options.strict:
            raise Unfoldable(f"strict=True leaves a site whose replacement is {_roomier(node)}")
        modes = torch._C._set_grad_enabled
        if ring.differentiable(self.linear.x) and (
            linear.detached or any(each.target is modes for each in node.graph.nodes)
        ):
            raise Unfoldable("gradients are switched off for a part of the graph")

    def _check_eager(self) -> None:
        options, node = self.rewriting.options, self.linear.node
        if options.stage != "eager":
            raise Unfoldable("its parameters may change between two calls")
        if options.kernels != "auto":
            raise Unfoldable(f'kernels="{options.kernels}" asks for another lowering')
        before, after = (each.meta["val"] for each in (node, self.end))
        if before.shape != after.shape or before.stride() != after.stride():
            raise Unfoldable("its result is rearranged before the affine")
        device = self.weight.meta["val"].device.type
        if device != "cpu":
            raise Unfoldable(f"looking at its weight would wait for the {device} device")
        if elements(node) < self._fewest():
            raise Unfoldable(
                f"comparing its weight of {elements(self.weight)} elements costs more than it "
                f"saves on {elements(node)}"
            )

    def _between(self) -> set[fx.Node]:
        """The nodes that lead from the linear map to the norm's result, the map among them."""
        inside, todo = {self.linear.node}, [self.linear.node]
        while todo:
            for user in todo.pop().users:
                if user in inside or user is self.end or user not in self.live:
                    continue
                if not is_tensor(user) and name_of(user) == "sym_size":
                    continue
                if user.op == "output" or self.end < user:
                    raise Unfoldable("its result is used elsewhere too")
                inside.add(user)
                todo.append(user)
        return inside | {self.end}

    # -- what takes its place --------------------------------------------------------------------

    def _parts(self) -> Parts[fx.Node]:
        """Nodes that compute what is folded."""
        found = self.found
        writing = Writing(self.reading, found, {}, {})
        writing.dtype = torch.float64
        subtracted = centre(self.reading, found)
        divisor = None if subtracted is None else _divisor(self.reading, found.linear.scale)
        return Parts(
            self.weight,
            self.bias,
            self._vector(writing, found.linear.scale),
            self._vector(writing, found.linear.shift),
            None if subtracted is None else self._vector(writing, subtracted),
            None if divisor is None else self._vector(writing, divisor),
        )

    def _vector(self, writing: Writing, value: Polynomial) -> fx.Node:
        """A coefficient with one number per output."""
        dims = (self.found.linear.index[self.linear.channel],)
        vector = writing.vector(value, dims, 2, torch.float64)
        if vector is None:
            extent = writing.emitter.extent(product(a.size for a in axes_of(dims)))
            vector = writing.emitter.call(aten.full.default, [extent], 2.0, dtype=torch.float64)
        assert isinstance(vector, fx.Node)
        return vector

    def _settle(
        self, recipe: fx.GraphModule, places: list[fx.Node], constants: Mapping[str, Tensor]
    ) -> None:
        """The folded parameters as tensors of the graph."""
        values = [constants.get(node.name) for node in places]
        if any(value is None or not has_values(value) for value in values):
            raise Unfoldable("its parameters have no values here")
        node, module = self.linear.node, self.rewriting.canonical.module
        with torch.no_grad():
            parts = Parts(*recipe.forward(*values))
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

    def _keep(self, recipe: fx.GraphModule, places: list[fx.Node], inside: set[fx.Node]) -> None:
        """A kernel that keeps the folded parameters as long as these do not change."""
        node, x = self.linear.node, self.linear.x
        inner = _Inner(self.stored, frozenset(inside | _sizes_of(node)))
        given = [x, *places]
        given += [each for each in leaves_of([self.end], inner) if each not in given]
        read_early = any(user not in inside and user < self.end for user in _sizes_of(node))
        early = all(each < node for each in given)
        if read_early and not early:
            raise Unfoldable("its result is used elsewhere too")
        folding = Folding(
            recipe,
            extracted(self.end, inner, given),
            self._joined(),
            len(places),
            self.linear.outputs,
            dtype_of(node),
            elements(node) / elements(x),
            int(self._fewest()),
        )
        module = self.rewriting.canonical.module
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

    def _fewest(self) -> float:
        return max(SMALLEST, TIMES * elements(self.weight))

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
    found: set[fx.Node] = set()
    todo = [user for user in node.users if name_of(user) == "sym_size"]
    while todo:
        each = todo.pop()
        if each not in found:
            found.add(each)
            todo += [user for user in each.users if isinstance(user.meta.get("val"), torch.SymInt)]
    return found


def _uncast(node: fx.Node) -> fx.Node:
    """A parameter before it is rounded, as autocast does."""
    while name_of(node) in CASTS:
        before = arguments_of(node)["self"]
        if not dtype_of(before).is_floating_point:
            break
        if before.meta["val"].device != node.meta["val"].device:
            break
        node = before
    return node


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


def _current(source: object) -> object:
    return current(source) if isinstance(source, fx.Node) else source


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
