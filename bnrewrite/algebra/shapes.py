"""Reshapes, permutations and broadcasts: they only regroup axes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .anchors import REDUCTIONS
from .axes import Axis, Dim, Dims, Opaque, Size, axes_of, regroup, size_of, substitute
from .calls import CASTS, COUNTS, dtype_of, is_tensor, name_of, narrows, shape_of
from .expression import number
from .meaning import Meaning, Reading
from .stored import is_stored


def unchanged(reading: Reading, node: fx.Node, a: dict[str, Any]) -> Meaning:
    """Copies and memory formats."""
    return reading.operand(a["self"])


def detach(reading: Reading, node: fx.Node, a: dict[str, Any]) -> Meaning:
    """The same value without a gradient."""
    meaning = reading.operand(a["self"])
    return Meaning(meaning.dims, reading.ring.stop(meaning.value))


def cast(reading: Reading, node: fx.Node, a: dict[str, Any]) -> Meaning:
    """A cast is the identity where it loses nothing.

    Where it rounds the normalised tensor, the formula ends there and an atom begins (whether a
    scale multiplies before or after is part of the formula). A statistic that is rounded stays a
    statistic: computed without the rounding it is only more accurate. Not so one that was summed in
    float64, as no replacement does, and a coefficient that is rounded: those are leaves, in the
    precision that the user chose for what follows.
    """
    source = a["self"]
    meaning = reading.operand(source)
    if not isinstance(source, fx.Node):
        raise Opaque("a cast of a number")
    before, after = dtype_of(source), dtype_of(node)
    if after.is_complex or before.is_complex:
        raise Opaque("complex numbers")
    if not before.is_floating_point and (before not in COUNTS or meaning.dims):
        raise Opaque("a cast from integers")
    if not narrows(before, after) or not before.is_floating_point:
        return meaning
    if not after.is_floating_point:
        raise Opaque("a cast to integers")
    ring = reading.ring
    raw, moments = ring.raw(meaning.value), ring.moments(meaning.value)
    if moments and not raw & reading.anchors:
        if _is_reduced_in_double(source):
            return Meaning(meaning.dims, ring.atom(node, meaning.dims, moments=moments))
        reading.narrowed.add(node)
        return meaning
    if moments:
        reading.sealed[node] = meaning
        raise Opaque("a rounding cast")
    if not meaning.dims or _is_small(source):
        return meaning
    if raw and not raw & reading.anchors and all(is_stored(s) for s in raw):
        reading.sealed[node] = meaning
        return Meaning(meaning.dims, ring.atom(node, meaning.dims))
    return reading.atom(node)


def _is_reduced_in_double(node: fx.Node) -> bool:
    """Whether a statistic was summed in float64, and not only combined with what is float64."""
    seen: set[fx.Node] = set()
    todo = [node]
    while todo and len(seen) < 32:
        current = todo.pop()
        if current in seen or not is_tensor(current) or dtype_of(current) != torch.float64:
            continue
        seen.add(current)
        if name_of(current) in REDUCTIONS:
            return True
        todo += current.all_input_nodes
    return False


def _is_small(node: fx.Node) -> bool:
    return node.op == "placeholder" and isinstance(node.meta["val"], torch.nn.Parameter)


def copy(reading: Reading, node: fx.Node, a: dict[str, Any]) -> Meaning:
    """``copy(target, source)``: the source's value in the target's shape and dtype."""
    source, target = a["src"], a["self"]
    if narrows(dtype_of(source), dtype_of(target)):
        raise Opaque("a copy that rounds")
    meaning = reading.operand(source)
    missing = len(shape_of(target)) - len(meaning.dims)
    return Meaning(((),) * missing + meaning.dims, meaning.value)


def view(reading: Reading, node: fx.Node, a: dict[str, Any]) -> Meaning:
    """Any reshape: axes are split and regrouped in row-major order."""
    source = a["self"]
    if dtype_of(source) != dtype_of(node):
        raise Opaque("bits read as another dtype")
    meaning = reading.operand(source)
    dims = materialised(meaning.dims, shape_of(source))
    new, moves = regroup(dims, shape_of(node))
    copies = set(axes_of(substitute(dims, moves))) - set(axes_of(substitute(meaning.dims, moves)))
    new = tuple(() if set(dim) <= copies else dim for dim in new)
    return Meaning(new, reading.ring.substitute(meaning.value, moves))


def materialised(dims: Dims, shape: tuple[Size, ...]) -> Dims:
    """An axis for every dimension that was expanded, so that a reshape can count it."""
    return tuple(
        dim if dim or size == 1 else (Axis(size),) for dim, size in zip(dims, shape, strict=True)
    )


def permute(reading: Reading, node: fx.Node, a: dict[str, Any]) -> Meaning:
    """``permute(dims)``."""
    meaning = reading.operand(a["self"])
    return Meaning(tuple(meaning.dims[d] for d in a["dims"]), meaning.value)


def transpose(reading: Reading, node: fx.Node, a: dict[str, Any]) -> Meaning:
    """``transpose(dim0, dim1)``."""
    meaning = reading.operand(a["self"])
    dims = list(meaning.dims)
    if dims:
        i, j = (a[k] if k in a else a["axis" + k[-1]] for k in ("dim0", "dim1"))
        dims[i], dims[j] = dims[j], dims[i]
    return Meaning(tuple(dims), meaning.value)


def t(reading: Reading, node: fx.Node, a: dict[str, Any]) -> Meaning:
    """The transpose of a matrix."""
    meaning = reading.operand(a["self"])
    return Meaning(tuple(reversed(meaning.dims)), meaning.value)


def movedim(reading: Reading, node: fx.Node, a: dict[str, Any]) -> Meaning:
    """``movedim(source, destination)``."""
    meaning = reading.operand(a["self"])
    rank = len(meaning.dims)
    source, target = (
        [d % rank for d in ([v] if isinstance(v, int) else v)]
        for v in (a["source"], a["destination"])
    )
    placed: dict[int, Dim] = {t: meaning.dims[s] for s, t in zip(source, target, strict=True)}
    rest = iter(d for i, d in enumerate(meaning.dims) if i not in source)
    return Meaning(
        tuple(placed[i] if i in placed else next(rest) for i in range(rank)), meaning.value
    )


def unsqueeze(reading: Reading, node: fx.Node, a: dict[str, Any]) -> Meaning:
    """A new dimension of one element."""
    meaning = reading.operand(a["self"])
    at = a["dim"] % (len(meaning.dims) + 1)
    return Meaning((*meaning.dims[:at], (), *meaning.dims[at:]), meaning.value)


def squeeze(reading: Reading, node: fx.Node, a: dict[str, Any]) -> Meaning:
    """Dimensions of one element disappear."""
    meaning = reading.operand(a["self"])
    shape = shape_of(a["self"])
    rank = len(shape)
    dim = a.get("dim")
    chosen = (
        range(rank) if dim is None else [d % rank for d in ([dim] if isinstance(dim, int) else dim)]
    )
    gone = {d for d in chosen if shape[d] == 1}
    dims = tuple(d for i, d in enumerate(meaning.dims) if i not in gone)
    if len(dims) != len(shape_of(node)):
        raise Opaque("a squeeze of symbolic extents")
    return Meaning(dims, meaning.value)


def expand(reading: Reading, node: fx.Node, a: dict[str, Any]) -> Meaning:
    """Broadcasting: the value does not vary along the new extents."""
    meaning = reading.operand(a["self"])
    return Meaning(((),) * (len(shape_of(node)) - len(meaning.dims)) + meaning.dims, meaning.value)


def repeat(reading: Reading, node: fx.Node, a: dict[str, Any]) -> Meaning:
    """``repeat``, ``tile``: each dimension is run through several times, the copies outermost."""
    source = a["self"]
    meaning = reading.operand(source)
    repeats = list(a["repeats"] if "repeats" in a else a["dims"])
    rank = max(len(repeats), len(meaning.dims))
    repeats = [1] * (rank - len(repeats)) + repeats
    sizes: tuple[Size, ...] = (1,) * (rank - len(meaning.dims)) + shape_of(source)
    dims = ((),) * (rank - len(meaning.dims)) + meaning.dims
    return Meaning(
        tuple(
            (*_copies(times), *dim) if dim and size != 1 else dim
            for dim, size, times in zip(dims, sizes, repeats, strict=True)
        ),
        meaning.value,
    )


def repeat_interleave(reading: Reading, node: fx.Node, a: dict[str, Any]) -> Meaning:
    """``repeat_interleave`` by a number: the copies of an element lie side by side."""
    meaning = reading.operand(a["self"])
    if a.get("dim") is None or not meaning.dims:
        raise Opaque("a repetition of all elements in one row")
    at = a["dim"] % len(meaning.dims)
    dim = meaning.dims[at]
    grown = (*dim, *_copies(a["repeats"])) if dim else dim
    return Meaning((*meaning.dims[:at], grown, *meaning.dims[at + 1 :]), meaning.value)


def _copies(times: object) -> Dim:
    """An axis along which nothing varies."""
    if isinstance(times, fx.Node):
        size = size_of(times.meta["val"])
    elif isinstance(times, int):
        size = times
    else:
        raise Opaque("a number of copies that is computed")
    if size == 0:
        raise Opaque("no copies")
    return (Axis(size),) if size != 1 else ()


def whole(reading: Reading, node: fx.Node, a: dict[str, Any]) -> Meaning:
    """A slice of everything."""
    if shape_of(a["self"]) != shape_of(node) or a["step"] != 1:
        raise Opaque("a part of a tensor")
    return reading.operand(a["self"])


def select(reading: Reading, node: fx.Node, a: dict[str, Any]) -> Meaning:
    """Indexing a dimension along which the value does not vary."""
    meaning = reading.operand(a["self"])
    at = a["dim"] % len(meaning.dims)
    if meaning.dims[at]:
        raise Opaque("a part of a tensor")
    return Meaning(meaning.dims[:at] + meaning.dims[at + 1 :], meaning.value)


def filled(reading: Reading, node: fx.Node, a: dict[str, Any]) -> Meaning:
    """Constant tensors: ``full``, ``ones_like``, ``zeros``, ``scalar_tensor``."""
    name = str(node.target)
    if "ones" in name:
        value: Any = 1
    elif "zeros" in name:
        value = 0
    else:
        value = a.get("fill_value", a.get("s"))
    constant = reading.operand(value).value.constant
    if constant is None:
        raise Opaque("a tensor filled with a value that is not a number")
    kept = torch.tensor(float(constant), dtype=dtype_of(node)).item()
    return Meaning(((),) * len(shape_of(node)), number(float(kept)))


def size(reading: Reading, node: fx.Node, a: dict[str, Any]) -> Meaning:
    """A size read from a tensor."""
    return Meaning((), reading.ring.extent(size_of(node.meta["val"])))


SHAPES = {
    **dict.fromkeys(("clone", "contiguous", "alias", "lift_fresh_copy", "lift_fresh",
                     "positive", "resolve_conj", "resolve_neg"), unchanged),
    **dict.fromkeys(sorted(CASTS), cast),
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as",
                     "reshape_as", "ravel"), view),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), transpose),
    **dict.fromkeys(("t", "numpy_T"), t),
    **dict.fromkeys(("movedim", "moveaxis"), movedim),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), expand),
    **dict.fromkeys(("full", "full_like", "ones", "ones_like", "zeros", "zeros_like",
                     "scalar_tensor", "new_ones", "new_zeros", "new_full"), filled),
    "detach": detach, "permute": permute, "unsqueeze": unsqueeze, "squeeze": squeeze,
    "repeat": repeat, "tile": repeat, "repeat_interleave": repeat_interleave,
    "slice": whole, "select": select, "sym_size": size, "copy": copy,
}  # fmt: skip
