"""The formula of a module in one mode, where it is one norm of its input and nothing else.

    y = (x - mean) (variance + eps)^(-1/2) weight + bias

with the moments of x, or (a batch norm in evaluation) with two buffers in their place; and the
buffers that are updated with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from bnrewrite.algebra import Match, Reading
from bnrewrite.algebra.axes import Dims, axes_of
from bnrewrite.algebra.calls import dtype_of, name_of, shape_of
from bnrewrite.algebra.expression import ONE, ZERO, Atom, Polynomial, Sum, added, number
from bnrewrite.algebra.frozen import frozen
from bnrewrite.capture.aliases import outputs_of
from bnrewrite.findings import Average, averages

from .alone import Alone
from .record import Unequal, UnequalSizes

_WITHOUT_MODULE = frozenset(("lp_normalize", "weight_standardization"))


@dataclass(frozen=True)
class Affine:
    """A weight or bias that is a parameter as it is, along dimensions of the input."""

    name: str
    dims: Dims


@dataclass(frozen=True)
class Formula:
    """What a module computes in one mode.

    Attributes:
        kind: the name of the norm; "affine" where the statistics are buffers.
        index: the axes of the input's dimensions.
        over: those that are reduced.
        shape: the extents of the input, symbolic where they may differ from call to call.
        eps: under the root.
        weight, bias: None where there is none.
        mean, variance: names of the buffers that stand in the place of the moments.
        running: the running statistics that are updated.
        counters: names of the buffers that one is added to.
    """

    kind: str
    index: Dims
    over: frozenset[object]
    shape: tuple[object, ...]
    eps: float
    weight: Affine | None
    bias: Affine | None
    mean: str | None = None
    variance: str | None = None
    running: list[Average] = field(default_factory=list)
    counters: list[str] = field(default_factory=list)


def formula_of(alone: Alone) -> Formula:
    """The formula of a captured module.

    Raises:
        Unequal: it is more than one norm and its updates, or not of this form.
    """
    if alone.asked and alone.norms:
        raise UnequalSizes(f"its code asks for sizes: {alone.asked[0]}")
    x = _input(alone)
    norm = _only_norm(alone, x)
    ring, linear = alone.reading.ring, norm.linear
    if linear.detached:
        raise Unequal("no gradient flows through it")
    running, counters = _updates(alone, x)
    common = {
        "index": linear.index,
        "over": norm.over,
        "shape": shape_of(x),
        "running": running,
        "counters": counters,
    }
    if norm.kind == "affine":
        parts = frozen(ring, linear)
        if parts is None:
            raise Unequal("its formula is no norm with a stored mean and variance")
        channel = tuple(d for d in linear.index[1:2])
        mean, variance = (_stored(atom, channel) for atom in (parts.mean, parts.variance))
        weight = _affine(alone.reading, parts.weight, ONE, "weight")
        bias = _affine(alone.reading, parts.bias, ZERO, "bias")
        return Formula(
            "affine",
            eps=float(parts.eps),
            weight=weight,
            bias=bias,
            mean=mean,
            variance=variance,
            **common,  # type: ignore[arg-type]
        )
    if norm.kind == "general":
        raise Unequal(f"its formula has no name: {norm.reason}")
    if norm.kind in _WITHOUT_MODULE:
        raise Unequal(f"torch.nn has no module for a {norm.kind}")
    eps = None if norm.root_eps is None else norm.root_eps.constant
    if eps is None or norm.masked or not _is_bare(alone.reading, norm):
        raise Unequal("its denominator is not the root of a moment plus eps")
    weight = _affine(alone.reading, norm.weight, ONE, "weight")
    bias = _affine(alone.reading, norm.bias, ZERO, "bias")
    return Formula(norm.kind, eps=float(eps), weight=weight, bias=bias, **common)  # type: ignore[arg-type]


def _input(alone: Alone) -> fx.Node:
    nodes = {node.name: node for node in alone.canonical.module.graph.nodes}
    tensors = [
        nodes[each.name]
        for each in alone.canonical.inputs
        if each.kind == "input" and isinstance(nodes[each.name].meta.get("val"), torch.Tensor)
    ]
    others = [each.path for each in alone.canonical.inputs if each.kind == "attribute"]
    if others:
        raise Unequal(f"it uses {', '.join(map(str, others))}, which is no parameter and no buffer")
    if len(tensors) != 1:
        raise Unequal(f"it is a function of {len(tensors)} tensors")
    (x,) = tensors
    assert isinstance(x, fx.Node)
    return x


def _only_norm(alone: Alone, x: fx.Node) -> Match:
    """The norm of the input that is all that a module returns."""
    values = outputs_of(alone.canonical.module)
    count = len(alone.canonical.mutated)
    returned = [each for each in values[count:] if each not in values[:count]]
    if len(returned) != 1:
        raise Unequal(f"it gives {len(returned)} values besides its buffers")
    norms = [each for each in alone.norms if not each.left]
    if len(norms) != 1:
        raise Unequal(f"there are {len(norms)} norms in it")
    (norm,) = norms
    if norm.node is not returned[0]:
        raise Unequal(f"{_what(returned[0])} follows the norm, which the native module has not")
    if norm.linear.source is not x:
        raise Unequal(f"{_what(norm.linear.source)} comes before the norm")
    if norm.linear.dims != norm.linear.index or shape_of(norm.node) != shape_of(x):
        raise Unequal("its result has its dimensions in another order than the input")
    if dtype_of(norm.node) != dtype_of(x):
        raise Unequal(f"its result is {dtype_of(norm.node)} where the input is {dtype_of(x)}")
    return norm


def _what(node: object) -> str:
    return name_of(node) or node.op if isinstance(node, fx.Node) else "a number"


def _is_bare(reading: Reading, norm: Match) -> bool:
    """Whether the scale is ``(moment + eps)^(-1/2) weight`` with no factor left out."""
    ring = reading.ring
    whole = ring.multiply(Polynomial({norm.part: 1}), norm.weight)
    base, _ = ring.bases[norm.part[0][0]], norm.part[0][1]
    return whole == norm.linear.scale and isinstance(base, Sum) and len(norm.part) == 1


def _affine(reading: Reading, value: Polynomial, none: Polynomial, name: str) -> Affine | None:
    if value == none:
        return None
    ring = reading.ring
    if len(value.terms) == 1:
        ((monomial, coefficient),) = value.terms.items()
        atom = ring.bases[monomial[0][0]] if len(monomial) == 1 else None
        if coefficient == 1 and isinstance(atom, Atom) and monomial[0][1] == 1:
            source = atom.source
            if isinstance(source, fx.Node) and source.meta.get("parameter") and not atom.stopped:
                return Affine(str(source.meta["path"]), atom.index)
    raise Unequal(f"its {name} is not a parameter as it is")


def _stored(atom: Atom, channel: Dims) -> str:
    source = atom.source
    if not isinstance(source, fx.Node) or not source.meta.get("stored") or atom.index != channel:
        raise Unequal("its stored statistics are not two buffers, a number for each channel")
    return str(source.meta["path"])


def _updates(alone: Alone, x: fx.Node) -> tuple[list[Average], list[str]]:
    """The running statistics of the input, and the counters; nothing else may be updated."""
    canonical, reading = alone.canonical, alone.reading
    nodes = {node.name: node for node in canonical.module.graph.nodes}
    values = outputs_of(canonical.module)
    pairs = [
        (nodes[name], value)
        for name, value in zip(canonical.mutated, values, strict=False)
        if nodes[name] is not value
    ]
    running = averages(reading, pairs)
    known = {each.buffer: each for each in running}
    counters = []
    for buffer, value in pairs:
        path = str(buffer.meta.get("path"))
        if not buffer.meta.get("stored"):
            raise Unequal("it changes its input in place" if buffer is x else f"it updates {path}")
        average = known.get(buffer)
        if average is not None and _is_of_channels(average, x):
            continue
        meaning = reading.formula(value)
        old = reading.ring.atom(buffer, ())
        if meaning is None or meaning.value != added(old, number(1)) or buffer.meta["val"].dim():
            raise Unequal(f"it updates {path} in another way than the native module")
        counters.append(path)
    return running, counters


def _is_of_channels(average: Average, x: fx.Node) -> bool:
    """Whether a running statistic is one of the input, a number for each of its channels."""
    kept = tuple(each for each in average.index if not set(each) & average.bound)
    return (
        average.source is x
        and len(average.index) > 1
        and average.dims == (average.index[1],)
        and kept == average.dims
        and set(axes_of(average.index)) == set(average.index[1]) | average.bound
    )
