"""Exported programs, scripted modules and their files as ONNX files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from onnx_models import ChannelNorm
from torch import nn
from torch.export import Dim, ExportedProgram

import bnrewrite
from bnrewrite.onnx import ExportError, OnnxExport

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), ChannelNorm(6), nn.ReLU()).eval()


def program(model: nn.Module) -> ExportedProgram:
    return torch.export.export(model, (X,), dynamic_shapes=({0: Dim("n")},))


def export(model: Any, folder: Path, args: Any = X, **given: Any) -> OnnxExport:
    return bnrewrite.export_onnx(model, args, folder / "m.onnx", target="cpu", **given)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("in_a_file", [False, True])
@pytest.mark.parametrize("is_program", [True, False])
def test_every_form_is_the_same_file(is_program: bool, in_a_file: bool, tmp_path: Path) -> None:
    """A program brings its own sizes that vary, and its own arguments."""
    model = net()
    given: Any = program(model) if is_program else torch.jit.script(model)
    if in_a_file:
        path = tmp_path / ("m.pt2" if is_program else "m.pt")
        (torch.export.save if is_program else torch.jit.save)(given, path)
        given = path
    sizes = {} if is_program else {"dynamic_shapes": ({0: "n"},)}
    result = export(given, tmp_path, () if is_program else X, **sizes)
    assert result.operators["bnrewrite"] == {"Conv": 1, "Relu": 1}
    assert len(result.verifications) == 3
    other = torch.randn(5, 3, 8, 8)
    found = bnrewrite.Session(result.path, "cpu")(other)
    assert torch.allclose(found, model(other), atol=1e-5)  # type: ignore[arg-type]


def forgetful() -> ExportedProgram:
    found = program(net())
    found._example_inputs = None
    return found


@pytest.mark.parametrize(
    ("given", "args", "choices", "kind", "sentence"),
    [
        (lambda: program(net()), X, {"dynamic_shapes": ({0: "n"},)}, TypeError, "its own sizes"),
        (lambda: program(net()), X[:, :2], {}, ExportError, "the model does not run on the argum"),
        (lambda: program(net()), (X, X), {}, ExportError, "the program takes arguments like Tree"),
        (forgetful, (), {}, ExportError, "the program was saved without arguments of a call"),
        (lambda: "absent.pt2", X, {}, FileNotFoundError, "absent.pt2"),
        (
            lambda: program(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))),
            X,
            {},
            ExportError,
            "the model changes '1.running_mean' .* call model.eval\\(\\) before it is exported",
        ),
        (
            lambda: torch.jit.script(net().train()),
            X,
            {},
            ExportError,
            "the model is in training mode",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_refused(
    given: Callable[[], Any],
    args: Any,
    choices: dict[str, Any],
    kind: type[Exception],
    sentence: str,
    tmp_path: Path,
) -> None:
    with pytest.raises(kind, match=sentence):
        export(given(), tmp_path, args, **choices)
    assert list(tmp_path.iterdir()) == []
