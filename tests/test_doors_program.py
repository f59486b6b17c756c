"""Exported programs: an exported program comes back, runs elsewhere, and keeps what it was."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from door_models import NORMS, BatchNorm, LayerNorm, Net, elsewhere, images, violations
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import OutputKind

import bnrewrite

pytestmark = pytest.mark.usefixtures("repeatable")


def exported(model: nn.Module, *inputs: Any, dynamic: Any = None) -> ExportedProgram:
    return torch.export.export(model, inputs, dynamic_shapes=dynamic, strict=False)


def batches(program_of: nn.Module) -> ExportedProgram:
    return exported(program_of, images(), dynamic=({0: Dim("batch")},))


def operators(program: ExportedProgram) -> set[str]:
    return {
        str(node.target).removeprefix("aten.").partition(".")[0]
        for node in program.graph.nodes
        if node.op == "call_function"
    }


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("training", [False, True])
def test_every_norm_is_replaced_and_the_batch_stays_free(name: str, training: bool) -> None:
    norm = BatchNorm(4, rebinds=False) if name == "batch_norm" else NORMS[name]()
    users = Net(norm).train(training)
    program = batches(copy.deepcopy(users))
    before = str(program.graph)
    result = bnrewrite.optimize(program)
    assert isinstance(result, ExportedProgram)
    assert result is not program
    assert str(program.graph) == before
    assert name in operators(result) or (name == "batch_norm" and not training)
    assert not {"rsqrt", "pow", "var"} & operators(result) or name == "batch_norm"
    assert set(result.state_dict) == set(users.state_dict())
    assert str(result.range_constraints) == str(program.range_constraints)
    module = result.module()
    for batch in (3, 7):
        assert violations(users, copy.deepcopy(module), images(batch)) == []


@pytest.mark.parametrize("functional", [False, True])
def test_updates_of_buffers_are_in_the_signature(functional: bool) -> None:
    users = Net(BatchNorm(4, rebinds=False)).train()
    program = batches(copy.deepcopy(users))
    if functional:
        program = program.run_decompositions({})
    result = bnrewrite.optimize(program)
    assert "batch_norm" in operators(result)
    assert result.graph_signature.buffers_to_mutate.keys() <= {
        spec.arg.name for spec in result.graph_signature.output_specs
    }
    updated = {
        spec.target
        for spec in result.graph_signature.output_specs
        if spec.kind is OutputKind.BUFFER_MUTATION
    }
    assert updated == {"norm.running_mean", "norm.running_var"}
    module = result.module()
    for _ in range(2):
        x = images()
        users(x)
        module(x)
    for mine, other in zip(users.buffers(), module.buffers(), strict=True):
        torch.testing.assert_close(other, mine)
    again = result.run_decompositions({}).module()
    torch.testing.assert_close(again(images(5))[0].shape, users(images(5))[0].shape)


def test_a_process_without_the_package_loads_runs_and_saves_it(tmp_path: Path) -> None:
    users = Net(BatchNorm(4, rebinds=False)).train()
    torch.export.save(batches(users).run_decompositions({}), tmp_path / "users.pt2")
    result = bnrewrite.optimize(tmp_path / "users.pt2")
    torch.export.save(result, tmp_path / "result.pt2")
    x = images(5)
    torch.save((x, copy.deepcopy(users)(x)[0].detach()), tmp_path / "case.pt")
    printed = elsewhere(
        """
        program = torch.export.load(sys.argv[1])
        x, expected = torch.load(sys.argv[2])
        print((program.module()(x)[0] - expected).abs().max().item() < 1e-5)
        torch.export.save(program, sys.argv[3])
        print(sorted(torch.export.load(sys.argv[3]).state_dict))
        """,
        tmp_path / "result.pt2",
        tmp_path / "case.pt",
        tmp_path / "again.pt2",
    )
    assert printed == f"True\n{sorted(users.state_dict())}\n"


def test_gradients_flow_through_the_result() -> None:
    users = Net(BatchNorm(4)).train()
    module: Any = bnrewrite.optimize(batches(copy.deepcopy(users))).module()
    x = images()
    gradients = []
    for each in (users, module):
        y = each(x)[0]
        torch.manual_seed(1)
        loss = (y * torch.randn(y.shape)).sum()
        named = {name: each.get_parameter(name) for name in ("norm.weight", "conv.weight")}
        gradients.append(torch.autograd.grad(loss, list(named.values())))
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, mine, rtol=1e-4, atol=1e-5)


class Several(nn.Module):
    """Several inputs and results, a number among them, constants, an input that is updated."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = LayerNorm(6)

    def forward(self, pair: list[Tensor], scale: float, state: Tensor) -> Any:
        state.add_(1)
        y = self.norm(pair[0]) * scale
        return y, {"second": self.norm(pair[1]), "none": None}, pair[0], 3, torch.arange(3.0)


def arguments() -> tuple[list[Tensor], float, Tensor]:
    return [torch.randn(2, 6), torch.randn(4, 6)], 0.5, torch.zeros(2)


def test_inputs_and_results_of_any_structure() -> None:
    users = Several()
    program = exported(users, *arguments())
    result = bnrewrite.optimize(program)
    assert "layer_norm" in operators(result)
    assert [spec.kind for spec in result.graph_signature.input_specs] == [
        spec.kind for spec in program.graph_signature.input_specs
    ]
    args = arguments()
    mine, other = users(*copy.deepcopy(args)), result.module()(*args)
    torch.testing.assert_close(other[0], mine[0])
    torch.testing.assert_close(other[1]["second"], mine[1]["second"])
    assert other[1]["none"] is None
    assert other[3] == 3
    assert args[2].tolist() == [1, 1]


class Choosing(nn.Module):
    """A condition on data, with norms around it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = LayerNorm(6), LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = torch.cond(y.sum() > 0, lambda y: y + 1, lambda y: y - 1, (y,))
        result: Tensor = self.second(z)
        return result


def test_norms_around_what_holds_a_graph_of_its_own() -> None:
    users = Choosing()
    program = exported(users, torch.randn(3, 6))
    result = bnrewrite.optimize(program)
    assert "layer_norm" in operators(result)
    x = torch.randn(3, 6)
    torch.testing.assert_close(result.module()(x), users(x))
    report = bnrewrite.explain(program)
    assert len(report.rewritten) == 2
    assert [each.what for each in report.kept] == ["cond"]
    functional = bnrewrite.explain(program.run_decompositions({}))
    assert "a program for inference cannot be put together from parts" in {
        site.reason for site in functional.sites
    }


def test_a_program_without_norms_is_returned_itself() -> None:
    program = exported(nn.Linear(3, 3), torch.randn(2, 3))
    assert bnrewrite.optimize(program) is program


def test_switches() -> None:
    program = batches(Net(LayerNorm(6)))
    assert bnrewrite.optimize(program, disable=["layer_norm"]) is program
    with pytest.raises(ValueError, match="disable names"):
        bnrewrite.optimize(program, disable=["nothing"])


def test_a_program_takes_no_example_inputs() -> None:
    with pytest.raises(TypeError, match="leave example_inputs out"):
        bnrewrite.optimize(batches(Net(LayerNorm(6))), example_inputs=(images(),))
    with pytest.raises(TypeError, match="example_inputs are for a scripted module"):
        bnrewrite.optimize(Net(LayerNorm(6)), example_inputs=(images(),))  # type: ignore[call-overload]


def test_the_report_names_modules_and_lines() -> None:
    report = bnrewrite.explain(batches(Net(BatchNorm(4, rebinds=False)).train()))
    (site,) = report.sites
    assert (site.kind, site.module, site.status) == ("batch_norm", "norm", "rewritten")
    assert site.source.startswith("door_models.py:")
    assert sorted(site.state) == ["norm.running_mean", "norm.running_var"]
