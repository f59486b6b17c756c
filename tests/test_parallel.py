"""Several processes: models under DDP and FSDP2, synchronised statistics, and merged ones."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hand_written import BatchNorm, Layer, Net
from process_checks import CHECKS
from processes import outcomes, start
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit

import bnrewrite
from bnrewrite.capture.backend import bnrewrite as backend
from bnrewrite.parallel import merge_statistics, track_statistics
from examples.domain_norms import STEPS


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], str]:
    return outcomes("process_checks", tmp_path_factory)


@pytest.mark.parametrize(("count", "check"), [(n, name) for n in CHECKS for name in CHECKS[n]])
def test_processes(count: int, check: str, found: dict[tuple[int, str], str]) -> None:
    assert found[count, check] == ""


def test_torchrun_starts_the_example_of_domains() -> None:
    program = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    lost, kept = start(*program, "-m", "examples.domain_norms").split("merged")
    means = [ast.literal_eval(line.rpartition("domains ")[2]) for line in kept.splitlines()[1:3]]
    assert means[0] == means[1]
    assert means[0] == pytest.approx([0.0, 1 - 0.9**STEPS], abs=0.1)
    assert "[0.0, 0.0]" in lost


def test_statistics_are_not_synchronised_without_a_process_group() -> None:
    with pytest.raises(ValueError, match="init_process_group first"):
        bnrewrite.optimize(Net(), sync_stats=True)
    for call in (track_statistics, merge_statistics):
        with pytest.raises(ValueError, match="init_process_group first"):
            call(nn.BatchNorm1d(2))


class Switched(Layer):
    """Another formula for each value of a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.way = BatchNorm(3, "in place"), "a"

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) if self.way == "a" else self.norm(-x)


def test_graphs_beyond_the_limit_are_said(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with torch._dynamo.config.patch(recompile_limit=1):
            model, x = (
                bnrewrite.optimize(Switched(), backend="eager", sync_stats=True),
                torch.eye(3),
            )
            model(x)
            model.way = "b"
            with pytest.warns(bnrewrite.BnrewriteWarning, match="recompile_limit, 1 times"):
                found = model(x)
            torch.testing.assert_close(found, model.norm(-x))
            bnrewrite.optimize(model, backend="eager", sync_stats=True)(x)
            model.way = "a"
            with (
                torch._dynamo.config.patch(fail_on_recompile_limit_hit=True),
                pytest.raises(FailOnRecompileLimitHit),
            ):
                model(x)
    finally:
        dist.destroy_process_group()


def test_the_size_of_the_batch_has_to_be_seen() -> None:
    with pytest.raises(ValueError, match="dynamic=False fixes"):
        bnrewrite.optimize(Net(), sync_stats=True, dynamic=False)
    with pytest.raises(ValueError, match="an option of optimize"):
        backend(torch.fx.GraphModule({}, torch.fx.Graph()), [], options={"sync_stats": True})


def test_exported_programs_are_not_synchronised() -> None:
    program = torch.export.export(nn.Linear(2, 2), (torch.randn(1, 2),))
    with pytest.raises(TypeError, match="for modules and functions"):
        bnrewrite.optimize(program, sync_stats=True)
