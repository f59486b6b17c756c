"""A model of opset 18 in opset 17.

Before:  ReduceMean(x, axes); Split(x, num_outputs=2); Pad(x, pads, value)    of opset 18
After:   ReduceMean(x, axes=axes); Split(x); Pad(x, pads, value)              of opset 17
Leaves alone: what both opsets define alike, which is all that is not named here.

onnx's own converter has no step for most of these, and then gives back what it was given.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from .refusal import ExportError

OPSET = 17
Change = Callable[[ir.Node], None]


def write_as_17(model: ir.Model) -> None:
    """Change a model in place.

    Raises:
        ExportError: an operation has no form in opset 17.
    """
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_type in _CHANGES:
            _CHANGES[node.op_type](node)
    model.opset_imports[""] = OPSET


def _is_new(node: ir.Node) -> None:
    raise ExportError(
        f"the model needs {node.op_type}, which has no form in opset {OPSET}: export with opset=18 "
        "or later"
    )


def _reduction(node: ir.Node) -> None:
    """Axes are an attribute; without any, all are reduced."""
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    value = None if axes is None else ir.convenience.get_const_tensor(axes)
    empty = node.attributes.pop("noop_with_empty_axes", None)
    if axes is None and empty is not None and empty.as_int():
        _is_new(node)
    if axes is not None:
        if value is None:
            _is_new(node)
        else:
            node.attributes["axes"] = ir.AttrInt64s("axes", value.numpy().tolist())
    node.resize_inputs(1)


def _split(node: ir.Node) -> None:
    """Into equal parts; where the last one is smaller sizes would have to be told."""
    count = node.attributes.pop("num_outputs", None)
    if count is None:
        return
    x, axis = node.inputs[0], node.attributes.get_int("axis", 0)
    assert x is not None
    size = None if x.shape is None else x.shape[axis]
    if not isinstance(size, int) or size % count.as_int():
        _is_new(node)


def _pad(node: ir.Node) -> None:
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        _is_new(node)
    if node.attributes.get_string("mode", "constant") == "wrap":
        _is_new(node)


def _resize(node: ir.Node) -> None:
    """Along all axes, without a filter against aliasing, which is the default."""
    plain = {"antialias": 0, "keep_aspect_ratio_policy": "stretch"}
    for name, default in plain.items():
        given = node.attributes.pop(name, None)
        if given is not None and given.value != default:
            _is_new(node)
    if "axes" in node.attributes:
        _is_new(node)


def _scatter(node: ir.Node) -> None:
    if node.attributes.get_string("reduction", "none") not in ("none", "add", "mul"):
        _is_new(node)


_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
_NEW = (
    *("BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitwiseNot", "CenterCropPad", "Col2Im"),
    *("GroupNormalization", "Mish", "OptionalGetElement", "OptionalHasElement"),
)
_CHANGES: dict[str, Change] = {
    **{f"Reduce{each}": _reduction for each in _REDUCTIONS},
    **dict.fromkeys(_NEW, _is_new),
    "Split": _split,
    "Pad": _pad,
    "Resize": _resize,
    "ScatterElements": _scatter,
    "ScatterND": _scatter,
}
