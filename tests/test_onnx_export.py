"""`export_onnx`: names and structures, what is refused, and files that are whole or not there."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from hand_written import BatchNorm, Net, RowNorm
from onnx_checks import exported
from torch import Tensor, nn

import bnrewrite
from bnrewrite.onnx import ExportError, MismatchError, export, saving, translation
from bnrewrite.onnx.sizes import cases
from bnrewrite.onnx.translation import _Norms

X = torch.randn(3, 8)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), RowNorm(8)).eval()


def test_a_file_and_its_record(tmp_path: Path) -> None:
    model, path = Net().eval(), tmp_path / "net.onnx"
    before = copy.deepcopy(model.state_dict())
    result = bnrewrite.export_onnx(
        model, (torch.randn(2, 3, 8, 8),), str(path), dynamic_shapes=({0: "batch"},)
    )
    assert result.path == path
    assert result.files == (path,)
    assert result.verified
    assert [str(port) for port in result.inputs] == ["x: float32[batch, 3, 8, 8]"]
    assert [str(port) for port in result.outputs] == ["output: float32[batch, 4, 6, 6]"]
    assert [site.kind for site in result.report] == ["affine"]
    assert len(result.verifications) == 3
    tables = {name: sum((table or {}).values()) for name, table in result.operators.items()}
    assert tables["bnrewrite"] < tables["exporter"]
    assert set(tables) == {
        "exporter", "exporter + onnxruntime", "bnrewrite", "bnrewrite + onnxruntime",
    }  # fmt: skip
    assert "opset 23 for cuda, 1 norms rewritten" in " ".join(str(result).split())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert list(tmp_path.iterdir()) == [path]
    onnx.checker.check_model(path)
    y = bnrewrite.Session(path, "cpu")(torch.ones(5, 3, 8, 8))
    torch.testing.assert_close(y, model(torch.ones(5, 3, 8, 8)).detach())


def test_parameters_keep_their_names(tmp_path: Path) -> None:
    exported(net(), tmp_path, X)
    names = {each.name for each in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert {"0.weight", "0.bias", "1.weight", "1.bias"} <= names


class Nested(nn.Module):
    """Takes and gives tensors in containers, and other things beside them."""

    def forward(self, x: dict[str, Any], *, shift: Tensor, flag: bool = False) -> dict[str, Any]:
        first, second = x["pair"]
        y = first - first.mean(-1, keepdim=True)
        y = y / torch.sqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5) + shift
        return {"y": y, "rest": (second, y, None, 3, "flagged" if flag else "plain")}


def test_nested_arguments_and_results(tmp_path: Path) -> None:
    """An input that is returned, a result that is returned twice, and what is no tensor."""
    given = {"pair": [X, torch.randn(2)]}
    outcome = exported(Nested(), tmp_path, given, kwargs={"shift": torch.randn(8), "flag": True})
    assert outcome.operations == {"LayerNormalization": 1, "Identity": 2}
    session = bnrewrite.Session(outcome.path, "cpu")
    assert [port.name for port in session.inputs] == ["x_pair_0", "x_pair_1", "shift"]
    assert [port.name for port in session.outputs] == ["y", "rest_0", "rest_1"]
    y, *_ = session(given, shift=torch.zeros(8))
    torch.testing.assert_close(y, Nested()(given, shift=torch.zeros(8))["y"])


def test_functions_and_optimised_models(tmp_path: Path) -> None:
    model = net()
    optimised = bnrewrite.optimize(copy.deepcopy(model))
    function: Callable[[Tensor], Tensor] = lambda x: model(x) * 2  # noqa: E731
    for each in (optimised, function):
        result = bnrewrite.export_onnx(each, X, tmp_path / "m.onnx", verify=False, target="cpu")
        assert not result.verified
        found = result.operators["bnrewrite"]
        assert found is not None
        assert found["LayerNormalization"] == 1
    y = bnrewrite.Session(tmp_path / "m.onnx", "cpu")(X)
    torch.testing.assert_close(y, 2 * model(X).detach())


@pytest.mark.parametrize("size", ["rows", torch.export.Dim("rows", max=9)])
def test_sizes_have_the_users_names(size: Any, tmp_path: Path) -> None:
    result = bnrewrite.export_onnx(
        net(), X, tmp_path / "m.onnx", dynamic_shapes=({0: size},), verify=False
    )
    assert result.outputs[0].shape == ("rows", 8)


def test_sizes_that_are_tried(tmp_path: Path) -> None:
    """Each dynamic size grows by another amount, and stays in its range and its ratio."""
    from bnrewrite.onnx.program import functional, traced

    half = torch.export.Dim("half", min=2, max=5)
    dynamic = ({0: "n", 1: 2 * half}, {0: torch.export.Dim.STATIC})
    program = functional(traced(lambda x, y: x.sum(1) + y.sum(), (X, X + 1), {}, dynamic))
    shapes = [[tuple(each.shape) for each in case.args] for case in cases(program)]
    assert shapes == [[(3, 8), (3, 8)], [(4, 10), (3, 8)], [(1, 4), (3, 8)]]


def test_a_model_that_does_not_take_other_sizes_itself(tmp_path: Path) -> None:
    class Picky(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not torch.compiler.is_compiling() and x.shape[0] != 3:
                raise ValueError("three rows, please")
            unit: Tensor = x / x.norm(dim=-1, keepdim=True)
            return unit

    outcome = exported(Picky(), tmp_path, X, dynamic=({0: "n"},))
    assert list(outcome.checked.verifications) == ["as traced"]
    assert outcome.checked.notes == (
        "the model itself does not take the sizes 4x8",
        "the model itself does not take the sizes 1x8",
    )


class Counting(nn.Module):
    """Changes a buffer in evaluation mode."""

    def __init__(self, rebind: bool) -> None:
        super().__init__()
        self.rebind = rebind
        self.count: Tensor
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.rebind:
            self.count = self.count + 1
        else:
            self.count += 1
        return x + self.count


class Remembering(nn.Module):
    """Has its state in a plain attribute, and another that it only sets."""

    def __init__(self) -> None:
        super().__init__()
        self.total, self.seen = torch.zeros(8), torch.zeros(8)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x * 2
        self.total = self.total + x.sum(0)
        return x + self.total


class Drawing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class Writing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.add_(1)


class Deciding(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def half_trained() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), BatchNorm(8)).eval()
    model[1].train()
    return model


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (net().train(), "the model is in training mode"),
        (half_trained(), "its module '1' is in training mode"),
        (
            Counting(rebind=False).eval(),
            "the model changes 'count' when it is called in evaluation",
        ),
        (Counting(rebind=True).eval(), "the model changes 'count' when it is called in evaluation"),
        (Remembering().eval(), "the model changes 'total' when it is called in evaluation mode"),
        (Drawing().eval(), "the file cannot be checked: CPUExecutionProvider has no kernel"),
        (Writing().eval(), "the model writes to its input 'x'"),
        (Deciding().eval(), "torch.export cannot trace the model"),
    ],
)
def test_what_is_refused(model: nn.Module, sentence: str, tmp_path: Path) -> None:
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ExportError) as raised:
        bnrewrite.export_onnx(model, (X.clone(),), tmp_path / "m.onnx")
    assert sentence in str(raised.value)
    assert list(tmp_path.iterdir()) == []
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_an_example_of_one_row_that_shall_vary(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="Give an example whose varying sizes are 2 or more"):
        bnrewrite.export_onnx(net(), X[:1], tmp_path / "m.onnx", dynamic_shapes=({0: "n"},))


def test_training_mode_says_what_to_call() -> None:
    with pytest.raises(ExportError, match=r"call model\.eval\(\) before export_onnx"):
        bnrewrite.export_onnx(net().train(), X, "never.onnx")


def test_no_model_at_all(tmp_path: Path) -> None:
    wrong: Any = 3
    with pytest.raises(TypeError, match="export_onnx takes a torch"):
        bnrewrite.export_onnx(wrong, X, tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [({"opset": 16}, "opset is 16; it is one of 17 to 24"),
     ({"opset": 25}, "opset is 25"),
     ({"target": "tpu"}, "target is 'tpu'; it is one of cuda, cpu, tensorrt")],
)  # fmt: skip
def test_choices_that_there_are_not(choice: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        bnrewrite.export_onnx(net(), X, tmp_path / "m.onnx", **choice)


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is a folder"):
        bnrewrite.export_onnx(net(), X, tmp_path)
    with pytest.raises(ExportError, match="there is no folder"):
        bnrewrite.export_onnx(net(), X, tmp_path / "missing" / "m.onnx")
    with pytest.raises(ExportError, match="cannot be written to"):
        bnrewrite.export_onnx(net(), X, Path("/proc/m.onnx"))
    with pytest.raises(ExportError, match="cannot be written to: File name too long"):
        bnrewrite.export_onnx(net(), X, tmp_path / ("m" * 300))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ExportError, match="pipe is no file; give the name of one, or a new name"):
        bnrewrite.export_onnx(net(), X, tmp_path / "pipe")


def test_an_interrupted_export_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"before")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "check", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bnrewrite.export_onnx(net(), X, path)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("onnx_ir.save", full)
    with pytest.raises(ExportError, match=r"m\.onnx cannot be written: No space left on device"):
        bnrewrite.export_onnx(net(), X, tmp_path / "m.onnx", verify=False)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_file_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = _Norms.layer_norm

    def wrong(self: _Norms, x: Any, shape: Any, weight: Any, bias: Any, *_: Any) -> Any:
        return right(self, x, shape, weight, bias, 1e-3)

    monkeypatch.setattr(_Norms, "layer_norm", wrong)
    with pytest.raises(MismatchError, match="differs from the model"):
        bnrewrite.export_onnx(net(), X, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_right_as_traced_alone_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = _Norms.layer_norm

    def tied(self: _Norms, x: Any, *args: Any) -> Any:
        zeros = translation._filled(0.0, x, (3, 8))  # in the traced sizes
        return translation.op.Add(right(self, x, *args), zeros)

    monkeypatch.setattr(_Norms, "layer_norm", tied)
    with pytest.raises(MismatchError, match="4x8"):
        exported(RowNorm(8), tmp_path, X, dynamic=({0: "n"},))


def test_a_failure_of_the_passes_leaves_the_users_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise AssertionError("a bug of ours")

    monkeypatch.setattr(export, "AFTERWARDS", (fails,))
    with pytest.warns(bnrewrite.BnrewriteWarning, match="as they were written: AssertionError"):
        result = bnrewrite.export_onnx(net(), X, tmp_path / "m.onnx", verify=False)
    assert result.report.sites == []
    assert result.notes == (
        "norms are exported as they were written: AssertionError: a bug of ours",
    )
    y = bnrewrite.Session(tmp_path / "m.onnx", "cpu")(X)
    assert isinstance(y, Tensor)
    assert y.shape == X.shape


def test_large_weights_lie_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "LARGEST_FILE", 0)
    path = tmp_path / "m.onnx"
    model = nn.Linear(64, 64).eval()
    result = bnrewrite.export_onnx(model, torch.ones(64), path, target="cpu")
    assert result.files == (path, tmp_path / "m.onnx.data")
    assert sorted(tmp_path.iterdir()) == sorted(result.files)
    y = bnrewrite.Session(path, "cpu")(torch.ones(64))
    torch.testing.assert_close(y, model(torch.ones(64)).detach())
    (tmp_path / "m.onnx.data").unlink()
    with pytest.raises(bnrewrite.onnx.SessionError, match="weights beside m"):
        bnrewrite.Session(path, "cpu")


def test_importing_the_package_imports_no_onnx() -> None:
    code = (
        "import sys, bnrewrite; "
        "print([each for each in ('onnx', 'onnxscript', 'onnxruntime') if each in sys.modules])"
    )
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert outcome.stdout.strip() == "[]", outcome.stderr


def test_there_is_no_other_lazy_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'export_onyx'"):
        bnrewrite.export_onyx  # noqa: B018
