"""The table of kernels against the onnxruntime that is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from bnrewrite.onnx.kernels import KERNELS, OPSETS, PROVIDERS, TARGETS, has_kernel
from bnrewrite.onnx.providers import missing_library, place_for
from bnrewrite.onnx.refusal import SessionError

DTYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float64: TensorProto.DOUBLE,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
}
SHAPE = [2, 8, 16]
VECTORS: dict[
    str, tuple[list[int], dict[str, Any]]
] = {  # sizes of the further inputs, and attributes
    "LayerNormalization": ([16, 16], {"axis": -1}),
    "RMSNormalization": ([16], {"axis": -1}),
    "InstanceNormalization": ([8, 8], {}),
    "BatchNormalization": ([8, 8, 8, 8], {}),
    "GroupNormalization": ([8, 8], {"num_groups": 2}),
}


def runs_as_one(operation: str, opset: int, dtype: torch.dtype, provider: str, at: Path) -> bool:
    """Whether onnxruntime loads a file of one node, and leaves it one, casts aside."""
    number, (sizes, attributes) = DTYPES[dtype], VECTORS[operation]
    names = ["x", *(f"v{i}" for i in range(len(sizes)))]
    shapes = [SHAPE, *([size] for size in sizes)]
    graph = helper.make_graph(
        [helper.make_node(operation, names, ["y"], **attributes)],
        "one",
        [helper.make_tensor_value_info(n, number, s) for n, s in zip(names, shapes, strict=True)],
        [helper.make_tensor_value_info("y", number, SHAPE)],
    )
    opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.optimized_model_filepath = str(at)
    if provider != PROVIDERS["cpu"]:  # else the CPU's kernel would do for a missing one
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[provider])
    except Exception:  # no such operation in this opset, or no kernel
        return False
    found = [node.op_type for node in onnx.load(at).graph.node if node.op_type != "Cast"]
    return found == [operation]


def here(target: str) -> bool:
    """Whether a provider runs on this machine."""
    try:
        place = place_for(target)
    except SessionError:
        return False
    return missing_library(place) is None


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("operation", KERNELS)
def test_the_table_is_what_is_installed(operation: str, target: str, tmp_path: Path) -> None:
    if not here(target):
        pytest.skip(f"{PROVIDERS[target]} does not run on this machine")
    claimed, found = set(), set()
    for opset in (17, 20, 21, 22, 23, 24):
        for dtype in DTYPES:
            if has_kernel(operation, target, opset, dtype):
                claimed.add((opset, dtype))
            if runs_as_one(operation, opset, dtype, PROVIDERS[target], tmp_path / "one.onnx"):
                found.add((opset, dtype))
    if target == "cpu":
        assert claimed == found
    else:
        assert claimed <= found  # CUDA may have more, as casts to and from the CPU


def test_every_row_has_every_target() -> None:
    assert all(set(kernel.dtypes) == set(TARGETS) for kernel in KERNELS.values())
    assert (OPSETS[0], OPSETS[-1]) == (17, 24)
