"""What opset 17 writes in another form than the opset in which the exporter writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch
from onnx_checks import Formula, exported
from torch import Tensor, nn
from torch.nn import functional

from bnrewrite.onnx import ExportError
from bnrewrite.onnx.older import write_as_17

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
EDGES = (1, 1, 2, 2)


def everything(x: Tensor) -> Tensor:
    """Each operation that is written in another form."""
    first, second = x.chunk(2, 1)
    y = torch.cat([first.amax(1, keepdim=True), second.amin((2, 3), keepdim=True) + first], 1)
    y = functional.pad(y, EDGES, mode="reflect") + functional.pad(y, EDGES, value=2.0)
    y = functional.interpolate(y, scale_factor=2.0) * y.norm(dim=1, keepdim=True).mean()
    result: Tensor = y.scatter(1, (y[:, :1] > 0).long(), y[:, 1:2])
    return result


def test_every_operation_that_was_another(tmp_path: Path) -> None:
    outcome = exported(Formula(everything), tmp_path, X, dynamic=({0: "n"},), opset=17)
    found = {"Split", "Pad", "Resize", "ReduceMax", "ReduceMin", "ReduceL2", "ScatterElements"}
    assert found <= set(outcome.operations)


@pytest.mark.parametrize(
    ("formula", "operation"),
    [
        (functional.mish, "Mish"),
        (lambda x: functional.pad(x, EDGES, mode="circular"), "Pad"),
        (lambda x: functional.interpolate(x, size=3, mode="bilinear", antialias=True), "Resize"),
        (lambda x: x.scatter_reduce(1, (x > 0).long(), x, "amax"), "ScatterElements"),
    ],
)
def test_what_has_no_form_is_named(
    formula: Callable[[Tensor], Tensor], operation: str, tmp_path: Path
) -> None:
    sentence = f"the model needs {operation}, which has no form in opset 17: export with opset=18"
    with pytest.raises(ExportError, match=sentence):
        exported(Formula(formula), tmp_path, X, opset=17)


def test_equal_parts_of_a_size_that_is_not_known() -> None:
    """Opset 17 has no number of parts: without sizes the parts are equal, or there are none."""
    text = """<ir_version: 8, opset_import: ["" : 18]>
    f (float[%s] x) => (float[m] y) { y, rest = Split <axis = 0, num_outputs = 2> (x) }"""
    model = ir.from_onnx_text(text % 4)
    write_as_17(model)
    assert "num_outputs" not in next(iter(model.graph)).attributes
    for size in (5, "n"):
        with pytest.raises(ExportError, match="the model needs Split"):
            write_as_17(ir.from_onnx_text(text % size))


def test_convolutions_without_a_bias_have_none(tmp_path: Path) -> None:
    """The exporter adds zeros, to volumes in a shape that onnxruntime refuses; a user's stay."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d)
    shapes = ((2, 4, 6), (2, 4, 6, 6), (2, 4, 5, 5, 5), (2, 4, 6))
    for kind, shape in zip(kinds, shapes, strict=True):
        stored = kind(4, 4, 3)
        nn.init.zeros_(next(each for each in stored.parameters() if each.dim() == 1))
        model = nn.Sequential(kind(4, 4, 3, bias=False), stored)
        outcome = exported(model, tmp_path, torch.randn(shape))
        inputs = [len(node.input) for node in onnx.load(outcome.path).graph.node]
        assert inputs == [2, 3]
