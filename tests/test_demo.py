"""The demo and the small examples run, and show what they claim."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("demo")
    _run("examples.demo", "--epochs", "1", "--output", str(output))
    assert [path.name for path in output.iterdir()] == ["demo.json"]
    record: dict[str, Any] = json.loads((output / "demo.json").read_text(encoding="utf-8"))
    return record


def test_demo_finds_the_norm(demo: dict[str, Any]) -> None:
    (site,) = demo["report"]["sites"]
    assert site["status"] == "rewritten"
    assert site["module"] == "bn1"
    assert "forum_net.py" in site["source"]
    assert "buffer-rebound" in {finding["name"] for finding in demo["report"]["findings"]}


def test_demo_trains_as_well_as_native(demo: dict[str, Any]) -> None:
    outcomes = demo["outcomes"]
    # a sanity bound, not a measurement: guessing gives 0.1
    assert all(outcome["accuracy"] > 0.8 for outcome in outcomes.values())
    # the forum's variance is unbiased, so native's weight is scaled: one more vector is saved
    vector = 64 * 4
    assert outcomes["optimised"]["saved"] <= outcomes["native"]["saved"] + vector
    assert outcomes["optimised"]["saved"] < outcomes["hand-written"]["saved"]


def test_demo_keeps_the_buffers(demo: dict[str, Any]) -> None:
    hand, optimised = (demo["outcomes"][name] for name in ("hand-written", "optimised"))
    assert optimised["same_buffers"]
    assert not hand["same_buffers"]
    assert optimised["autograd_nodes"] == 0
    assert hand["autograd_nodes"] > 0


def test_demo_holds_the_contract(demo: dict[str, Any]) -> None:
    assert demo["verified"]


def test_demo_trains_the_literal_reading(demo: dict[str, Any]) -> None:
    literal = demo["literal"]
    assert "backward through the graph a second time" in literal["hand_written_failure"]
    assert literal["accuracy"] > 0.8
    assert literal["verified"]


@pytest.mark.parametrize(
    ("module", "shown"),
    [
        ("examples.compile_backend", "largest difference"),
        ("examples.explain_model", "rms_norm"),
        ("examples.normalize", "verified: True"),
    ],
)
def test_examples_run(module: str, shown: str) -> None:
    assert shown in _run(module)


def test_benchmarks_run(tmp_path: Path) -> None:
    arguments = ["--only", "layer_norm, 2x8x64", "--rounds", "2", "--output", str(tmp_path)]
    _run("benchmarks.norms", *arguments)
    _run("benchmarks.rewriter", "--sites", "5", "10", "--output", str(tmp_path))
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"norms.json", "norms.md", "norms.png", "rewriter.json", "rewriter.md"}
    record = json.loads((tmp_path / "rewriter.json").read_text(encoding="utf-8"))
    assert [result["rewritten"] for result in record["results"]] == [5, 10]


def _run(module: str, *arguments: str) -> str:
    outcome = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert outcome.returncode == 0, outcome.stderr
    return outcome.stdout
