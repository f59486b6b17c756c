"""The benchmarks' code runs, with few rounds, and says what its files hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_onnx, onnx_norms


def test_files_are_measured_side_by_side(tmp_path: Path) -> None:
    results = onnx_norms.main(["--only", "forum", "--rounds", "2", "--output", str(tmp_path)])
    found = {result.peer: result for result in results}
    assert set(found) | {"onnxsim"} == set(onnx_norms.PEERS)
    ours, native = found[onnx_norms.OURS], found[onnx_norms.NATIVE]
    assert (ours.norms, ours.loose, ours.nodes) == (1, 0, native.nodes)
    assert found["onnxscript"].loose > 0
    record = json.loads((tmp_path / "onnx_norms.json").read_text(encoding="utf-8"))
    assert len(record["results"]) == len(results)
    assert (tmp_path / "onnx_norms.md").is_file()


def test_loose_is_what_the_native_twin_does_not_have() -> None:
    assert onnx_norms.loose({"Add": 3, "Sqrt": 1, "Conv": 9}, {"Add": 1}) == 3
    assert onnx_norms.loose({"Add": 1}, {"Add": 2, "Mul": 1}) == 0


def test_another_model_is_refused() -> None:
    with pytest.raises(SystemExit):
        onnx_norms.main(["--only", "no such model"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_check_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_onnx.main([]) == 0
    assert "torch sees no GPU here: nothing was checked" in capsys.readouterr().out
