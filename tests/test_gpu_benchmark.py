"""The benchmark of GPU kernels, as far as it runs without a GPU."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import bnrewrite
from benchmarks import gpu_norms, network_cases
from benchmarks.cases import HAND, NATIVE
from benchmarks.measure import training_step


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gpu_norms.main(["--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "torch sees no GPU here: nothing was measured\n"
    assert not list(tmp_path.iterdir())


def test_a_case_that_is_none_is_refused() -> None:
    with pytest.raises(SystemExit):
        gpu_norms.main(["--only", "no such norm"])


@pytest.mark.parametrize(
    "norm", [n for n in network_cases.CASES if n.equal], ids=lambda norm: norm.name
)
def test_the_models_of_a_case_are_one_formula(norm: network_cases.Norm) -> None:
    shape = (2, 64, 3, 3) if len(norm.sizes[0]) == 4 else (2, 3, 16)
    case = network_cases.Case(norm, shape, "channels_last", "float32")
    models = case.models("cpu")
    *inputs, _ = case.tensors("cpu")
    made = [model.double()(*(x.double() for x in inputs)) for model in models.values()]
    torch.testing.assert_close(*made)


def test_a_case_is_checked_against_float64() -> None:
    """On a CPU its kernels are C++; what is asked of them is the same."""
    case = network_cases.Case(network_cases.CASES[1], (4, 16, 6, 6), "NCHW", "float32")
    hand = case.models("cpu")[HAND]
    *inputs, cotangent = case.tensors("cpu")
    for x in inputs:
        x.requires_grad_()
    ours = bnrewrite.optimize(copy.deepcopy(hand), backend="eager", kernels="generated")
    assert gpu_norms._wrong(hand, ours, inputs) == ([], "generated")
    lame = bnrewrite.optimize(copy.deepcopy(hand), backend="eager", kernels="native")
    assert gpu_norms._wrong(hand, lame, inputs) == (["the lowerings are 'native'"], "native")
    (first, *_) = training_step(ours, inputs, cotangent)()
    assert first.shape == inputs[0].shape


def test_every_case_is_listed_once() -> None:
    every = network_cases.cases()
    assert len({str(case) for case in every}) == len(every)
    assert {case.layout for case in every} == {"NCHW", "channels_last", "contiguous"}
    assert network_cases.cases("rms_norm, 4x2048x4096, contiguous, bfloat16")[0].channels == 4096


def test_without_liger_there_is_no_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    (case, *_) = network_cases.cases("rms_norm")
    assert case.liger(nn.RMSNorm(4096, eps=1e-6)) is None


def test_what_a_table_has(tmp_path: Path) -> None:
    result = gpu_norms.Result(
        norm="rms_norm", shape="2x3", layout="contiguous", dtype="float32",
        milliseconds={NATIVE: 0.5, gpu_norms.OURS: 0.25}, spread={}, over_native=0.5,
        over_limit=1.25, lowering="generated", wrong="",
    )  # fmt: skip
    results = [result, replace(result, wrong="values")]
    table = gpu_norms.tabulated(results, "cpu")
    assert all(len(row) == len(table.headings) for row in table.rows)
    table.write(tmp_path)
    record = json.loads((tmp_path / "gpu_norms.json").read_text(encoding="utf-8"))
    assert record["machine"]["torch"] == torch.__version__
    assert [each["wrong"] for each in record["results"]] == ["", "values"]
    assert record["results"][0]["date"].startswith("20")
    assert "triton" in record["results"][0]["versions"]
