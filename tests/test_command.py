"""The command: what it prints, and with which code it ends."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from door_models import BatchNorm, LayerNorm, Net, images, save, script
from torch import Tensor, nn

import bnrewrite
from bnrewrite import OnnxExport, Report
from bnrewrite.cli import DIFFERENT, DONE, FAILED, INTERRUPTED, TERMINATED, WRONG_USAGE, main
from bnrewrite.subject import Given, Subject, parsed_input

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
NET = f"{__name__}:net"
IMAGES = ("--input", "3x3x8x8")


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net(BatchNorm(4))


class Interrupting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyboardInterrupt


def number() -> int:
    return 3


def test_explain_prints_a_table_or_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["explain", NET, *IMAGES, "--html", str(tmp_path / "report.html")]) == DONE
    assert "1 norm (1 batch_norm): 1 rewritten" in capsys.readouterr().out
    assert "<html" in (tmp_path / "report.html").read_text("utf-8")
    assert main(["explain", NET, *IMAGES, "--eval", "--json"]) == DONE
    printed = json.loads(capsys.readouterr().out)
    assert printed["schema"] == "bnrewrite.report"
    assert [site["kind"] for site in printed["sites"]] == ["affine"]


def test_verify_says_whether_both_are_equal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["verify", NET, *IMAGES, "--steps", "2", "--json"]) == DONE
    printed = json.loads(capsys.readouterr().out)
    assert printed["schema"] == "bnrewrite.verify"
    assert printed["ok"] is True
    assert {"output[0]", "gradient of norm.weight"} <= {each["name"] for each in printed["checks"]}
    monkeypatch.setattr(Subject, "pair", lambda *_: (torch.sin, torch.cos))
    assert main(["verify", NET, *IMAGES]) == DIFFERENT
    assert "NOT equal" in capsys.readouterr().out


def test_bench_times_both(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", NET, *IMAGES, "--rounds", "2"]) == DONE
    printed = capsys.readouterr().out
    assert "forward and backward" in printed
    assert "optimised" in printed
    assert main(["bench", NET, *IMAGES, "--rounds", "2", "--train", "--json"]) == DONE
    printed = json.loads(capsys.readouterr().out)
    assert printed["training"] is True
    assert printed["optimised"]["saved_bytes"] < printed["users"]["saved_bytes"]
    assert printed["ratio"] > 0


@pytest.mark.parametrize("command", ["explain", "verify", "bench"])
def test_files(command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    users = Net(LayerNorm(6)).eval()
    further = {"verify": ["--steps", "1"], "bench": ["--rounds", "2"]}.get(command, [])
    torch.export.save(torch.export.export(users, (images(),)), tmp_path / "users.pt2")
    assert main([command, str(tmp_path / "users.pt2"), *further]) == DONE
    scripted = save(script(users), tmp_path / "users.pt")
    assert main([command, str(scripted), *IMAGES, *further]) == DONE
    assert main([command, str(scripted), *IMAGES, "--train", *further]) == DONE
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ([], WRONG_USAGE, "required"),
        (["prove", NET], WRONG_USAGE, "invalid choice"),
        (["explain", NET], WRONG_USAGE, "give the inputs: --input 1x3x224x224"),
        (["explain", NET, "--input", "1x"], WRONG_USAGE, "'1x' is no input; write 1x3x224x224"),
        (["explain", NET, "--input", "2:float31"], WRONG_USAGE, "'2:float31' is no input"),
        (["explain", NET, "--input", "=x"], WRONG_USAGE, "'x' is no number"),
        (["explain", "nothing", *IMAGES], WRONG_USAGE, "nothing is no file; write MODULE:CALLABLE"),
        (["bench", NET, *IMAGES, "--rounds", "1"], WRONG_USAGE, "a median needs at least 2"),
        (["export", NET, *IMAGES], WRONG_USAGE, "--output"),
        (["explain", "no.such.module:x", *IMAGES], FAILED, "there is no module no"),
        (["explain", f"{__name__}:nets", *IMAGES], FAILED, "has no nets"),
        (["explain", f"{__name__}:number", *IMAGES], FAILED, "gives a int, which is no model"),
        (["explain", "none.pt", *IMAGES], FAILED, "FileNotFoundError"),
        (["explain", NET, "--input", "3x4x8x8"], FAILED, "to have 3 channels"),
        (["explain", f"{__name__}:Interrupting", "--input", "1"], INTERRUPTED, "interrupted"),
    ],
)
def test_what_goes_wrong_has_a_sentence_and_a_code(
    arguments: list[str], code: int, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert sentence in " ".join(captured.err.split())
    assert captured.out == ""


def test_a_program_has_one_mode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "users.pt2"
    torch.export.save(torch.export.export(LayerNorm(6), (torch.randn(2, 6),)), path)
    assert main(["explain", str(path), "--train"]) == WRONG_USAGE
    assert "has no mode that --train or --eval could set" in capsys.readouterr().err


def test_export(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[tuple[Any, ...]] = []

    def written(model: Any, args: Any, path: str, **options: Any) -> OnnxExport:
        calls.append((type(model), [tuple(each.shape) for each in args], path, options))
        return OnnxExport(
            Path(path), "cpu", 20, (), (), Report(sites=[]), {"bnrewrite": {"Conv": 1}}
        )

    monkeypatch.setattr(bnrewrite, "export_onnx", written, raising=False)
    arguments = ["export", NET, *IMAGES, "--eval", "-o", "net.onnx", "--opset", "20"]
    further = ["--target", "cpu", "--dynamic", "0,2", "--no-verify"]
    assert main([*arguments, *further]) == DONE
    assert "net.onnx: opset 20 for cpu, 0 norms rewritten" in capsys.readouterr().out
    assert main([*arguments, "--json"]) == DONE
    printed = json.loads(capsys.readouterr().out)
    assert (printed["files"], printed["operators"]) == (["net.onnx"], {"bnrewrite": {"Conv": 1}})
    free = torch.export.Dim.AUTO
    expected = {
        "opset": 20,
        "target": "cpu",
        "verify": False,
        "dynamic_shapes": ({0: free, 2: free},),
    }
    assert calls[0] == (Net, [(3, 3, 8, 8)], "net.onnx", expected)
    assert calls[1][3]["dynamic_shapes"] is None
    assert main([*arguments, "--dynamic", "batch"]) == WRONG_USAGE
    assert "--dynamic is 'batch'; write dimensions" in capsys.readouterr().err


class Ending(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        return x


def test_a_process_that_is_told_to_end_leaves_nothing_half_written(tmp_path: Path) -> None:
    """In a process of its own: Dynamo does not expect to go on behind such an end."""
    path = tmp_path / "net.onnx"
    path.write_text("before")
    export = ["export", f"{__name__}:Ending", "--input", "2x3", "--eval", "-o", str(path)]
    command = [sys.executable, "-m", "bnrewrite", *export]
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(command, env=paths, capture_output=True, check=False)
    assert ended.returncode == TERMINATED, ended.stderr
    assert [each.name for each in tmp_path.iterdir()] == ["net.onnx"]
    assert path.read_text() == "before"


def test_signals_are_handled_as_before() -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert main(["explain", NET, *IMAGES]) == DONE
    assert signal.getsignal(signal.SIGTERM) is before


def test_inputs_are_written_as_shapes_or_numbers() -> None:
    assert parsed_input("8x128:int64") == Given((8, 128), torch.int64)
    assert parsed_input("3") == Given((3,), torch.float32)
    assert parsed_input("=3") == Given(number=3)
    assert parsed_input("=0.5") == Given(number=0.5)
    assert parsed_input("=true") == Given(number=True)
    generator = torch.Generator().manual_seed(0)
    tokens = parsed_input("8x128:int64").value(generator)
    assert tokens.dtype == torch.int64
    assert set(tokens.unique().tolist()) == {0, 1}


def test_it_is_a_module_that_can_be_run() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bnrewrite", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "exit codes: 0 done" in " ".join(done.stdout.split())
