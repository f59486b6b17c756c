"""Sessions: tensors in and out, and errors that name what is missing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, save

import bnrewrite
from bnrewrite.onnx import Port, SessionError
from bnrewrite.onnx import providers as module

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def write(path: Path, nodes: list[Any], inputs: dict[str, Any], outputs: dict[str, Any]) -> Path:
    """A file of these nodes; inputs and outputs are (type, shape) by name."""

    def ports(given: dict[str, Any]) -> list[Any]:
        return [helper.make_tensor_value_info(name, *port) for name, port in given.items()]

    graph = helper.make_graph(nodes, "test", ports(inputs), ports(outputs))
    opsets = [helper.make_opsetid("", 20)]
    save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of scaled = x * scale and larger = scaled > x, for any number of rows."""
    nodes = [
        helper.make_node("Mul", ["x", "scale"], ["scaled"]),
        helper.make_node("Greater", ["scaled", "x"], ["larger"]),
    ]
    inputs = {"x": (FLOAT, ["n", 3]), "scale": (FLOAT, [])}
    outputs = {"scaled": (FLOAT, ["n", 3]), "larger": (BOOL, ["n", 3])}
    return write(tmp_path / "two.onnx", nodes, inputs, outputs)


@pytest.fixture
def session(path: Path) -> bnrewrite.Session:
    return bnrewrite.Session(path, "cpu")


X, SCALE = torch.randn(4, 3), torch.tensor(2.0)


@pytest.mark.parametrize(
    "call",
    [
        lambda s: s(X, SCALE),
        lambda s: s([X, (SCALE,)]),
        lambda s: s(X, scale=SCALE),
        lambda s: s({"a": X}, None, scale=SCALE),
        lambda s: s(scale=SCALE, x=X.t().contiguous().t().requires_grad_()),
    ],
)
def test_inputs_by_place_and_by_name(
    call: Callable[[bnrewrite.Session], Any], session: bnrewrite.Session
) -> None:
    scaled, larger = call(session)
    assert torch.equal(scaled, 2 * X)
    assert larger.dtype == torch.bool
    assert torch.equal(larger, X > 0)


def test_what_a_file_takes_and_gives(session: bnrewrite.Session) -> None:
    assert session.inputs == (Port("x", torch.float32, ("n", 3)), Port("scale", torch.float32, ()))
    assert [str(port) for port in session.outputs] == [
        "scaled: float32[n, 3]",
        "larger: bool[n, 3]",
    ]
    assert session.providers == ["CPUExecutionProvider"]
    assert session.device == torch.device("cpu")


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_any_number_of_rows(rows: int, session: bnrewrite.Session) -> None:
    x = torch.randn(rows, 3)
    results = session.run({"scale": SCALE, "x": x})
    assert torch.equal(results["scaled"], 2 * x)


def test_inputs_are_read_and_outputs_are_new(session: bnrewrite.Session) -> None:
    x = X.clone()
    first, _ = session(x, SCALE)
    second, _ = session(x, SCALE + 1)
    assert torch.equal(x, X)
    assert torch.equal(first, 2 * X)
    assert torch.equal(second, 3 * X)


def test_several_threads_at_a_time(session: bnrewrite.Session) -> None:
    wrong: list[float] = []

    def work(number: float) -> None:
        x = torch.full((64, 3), number)
        for _ in range(50):
            scaled, _ = session(x, SCALE)
            if not torch.equal(scaled, 2 * x):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda s: s(X), TypeError, "the input scale: float32[] is missing"),
        (lambda s: s(X, SCALE, SCALE), TypeError, "3 inputs are given, the file has 2"),
        (lambda s: s(X, scales=SCALE), TypeError, "there is no input 'scales'; the file has x"),
        (lambda s: s(X, SCALE, x=X), TypeError, "the input 'x' is given twice"),
        (lambda s: s(X, 2.0), TypeError, "is given a float, not a tensor"),
        (lambda s: s(X.double(), SCALE), ValueError, "convert it with .to(torch.float32)"),
        (lambda s: s(X[0], SCALE), ValueError, "is given 1 dimensions, (3,); the file has 2"),
        (lambda s: s(X[:, :2], SCALE), ValueError, "is given size 2 in dimension 1"),
    ],
)
def test_a_wrong_input_is_named(
    call: Callable[[bnrewrite.Session], Any],
    error: type[Exception],
    sentence: str,
    session: bnrewrite.Session,
) -> None:
    with pytest.raises(error) as raised:
        call(session)
    assert sentence in str(raised.value)


def test_a_file_that_stops_while_it_runs(tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", ["x", "y"], ["z"])]
    ports = {"x": (FLOAT, ["n"]), "y": (FLOAT, ["m"])}
    path = write(tmp_path / "add.onnx", nodes, ports, {"z": (FLOAT, ["k"])})
    with pytest.raises(SessionError, match=r"onnxruntime stops at add\.onnx"):
        bnrewrite.Session(path, "cpu")(torch.ones(2), torch.ones(3))


@pytest.mark.parametrize(
    "damage", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b"\x00" * 99]
)
def test_a_damaged_file(damage: Callable[[bytes], bytes], path: Path) -> None:
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(SessionError, match="is no ONNX file that onnxruntime"):
        bnrewrite.Session(path, "cpu")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        bnrewrite.Session(tmp_path / "missing.onnx")


def test_an_operation_without_a_kernel(tmp_path: Path) -> None:
    brain = (TensorProto.BFLOAT16, [2])
    nodes = [helper.make_node("Mul", ["x", "x"], ["y"])]
    path = write(tmp_path / "brain.onnx", nodes, {"x": brain}, {"y": brain})
    with pytest.raises(SessionError, match=r"CPUExecutionProvider has no kernel .*Mul"):
        bnrewrite.Session(path, "cpu")


@without_gpu
def test_without_a_gpu_none_is_the_cpu(path: Path) -> None:
    assert bnrewrite.Session(path).device == torch.device("cpu")


@without_gpu
@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda"), "tensorrt"])
def test_without_a_gpu_asking_for_one_fails(device: Any, path: Path) -> None:
    with pytest.raises(SessionError, match=r"ExecutionProvider.*pass device='cpu'"):
        bnrewrite.Session(path, device)


@pytest.mark.parametrize("device", ["gpu", "cpu:1", "cuda:one", "meta"])
def test_a_device_that_there_is_not(device: str, path: Path) -> None:
    with pytest.raises(ValueError, match="it is one of cuda, cpu, tensorrt or None"):
        bnrewrite.Session(path, device)


def test_an_onnxruntime_without_the_provider(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "available", lambda: ["CPUExecutionProvider"])
    with pytest.raises(SessionError, match=r"has no CUDAExecutionProvider.*install"):
        bnrewrite.Session(path, "cuda")


@without_gpu
def test_a_provider_that_does_not_start_is_not_replaced_by_the_cpu(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Onnxruntime itself goes on with the CPU when CUDA's libraries are missing."""
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime is built without CUDA")
    monkeypatch.setattr(module, "place_for", lambda device: module.Place("cuda"))
    monkeypatch.setattr("bnrewrite.onnx.session.place_for", lambda device: module.Place("cuda"))
    monkeypatch.setattr("bnrewrite.onnx.session.preload", lambda place: None)
    with pytest.raises(SessionError, match=r"CUDAExecutionProvider did not start: .*lib"):
        bnrewrite.Session(path, "cuda")


def test_without_a_gpu_nothing_is_preloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: called.append(1), raising=False)
    monkeypatch.setattr(module, "_preloaded", threading.Event())
    module.preload(module.Place("cpu"))
    assert called == []
    module.preload(module.Place("cuda"))
    module.preload(module.Place("cuda"))
    assert called == [1]
