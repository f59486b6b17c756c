"""What fails, ours or the user's, leaves the user's code, with one warning or the user's error."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from hand_written import Net, RowNorm, images
from torch import Tensor, fx, nn

import bnrewrite
from bnrewrite.capture.backend import Compiler
from bnrewrite.capture.look import Look

pytestmark = pytest.mark.usefixtures("repeatable")


def one_warning(model: nn.Module, *calls: Any) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for x in calls:
            model(x)
    mine = [each for each in caught if each.category is bnrewrite.BnrewriteWarning]
    assert len(mine) == 1
    return str(mine[0].message)


def test_a_failing_capture_leaves_the_users_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no such thing\nsecond line")

    monkeypatch.setattr("bnrewrite.capture.look.canonicalise", fail)
    users = Net()
    model = bnrewrite.optimize(copy.deepcopy(users), backend="eager")
    message = one_warning(model, images(4), images(5), images(6))
    assert message.endswith("not rewritten: RuntimeError: no such thing")
    assert int(model.norm.num_batches_tracked) == 3


def test_a_failing_pass_leaves_the_users_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("axis")

    monkeypatch.setattr("bnrewrite.passes.rewrite", fail)
    users = Net()
    model = bnrewrite.optimize(copy.deepcopy(users), backend="eager")
    x = images()
    assert "KeyError" in one_warning(model, x)
    torch.testing.assert_close(model(x), (users(x), users(x))[1])


def test_a_stage_that_refuses_the_rewritten_graph_gets_the_users(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(graph: fx.GraphModule, example_inputs: Any) -> Any:
        if any(isinstance(n.target, torch._ops.OpOverload) for n in graph.graph.nodes):
            raise ValueError("I take no ATen")
        return graph.forward

    torch._dynamo.register_backend(refuse, name="no_aten")
    users = RowNorm(8)
    model = bnrewrite.optimize(copy.deepcopy(users), backend="no_aten")
    x = torch.randn(3, 8)
    assert one_warning(model, x).endswith(
        "no_aten does not take the rewritten graph: ValueError: I take no ATen"
    )
    torch.testing.assert_close(model(x), users(x))


def test_where_dynamo_fails_the_users_code_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.calls = RowNorm(8), 0

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            torch._dynamo.graph_break()
            self.calls += 1
            return self.norm(x + 1)

    def fail(*_: Any) -> None:
        raise RuntimeError("no backend here")

    monkeypatch.setattr(Compiler, "__call__", fail)
    users = Counting()
    model = bnrewrite.optimize(copy.deepcopy(users), backend="eager")
    x = torch.randn(3, 8)
    message = one_warning(model, x, x)
    assert "Dynamo fails on it: BackendCompilerFailed" in message
    assert model.calls == 2
    torch.testing.assert_close(model(x), users(x))


def test_an_error_of_the_users_is_the_users_and_nothing_is_lost(
    looks: list[Look],
) -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.calls = RowNorm(8), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if x.dim() != 2:
                raise ValueError(f"{x.dim()} dimensions")
            return self.norm(x)

    users = Picky()
    model = bnrewrite.optimize(copy.deepcopy(users), backend="eager")
    with pytest.raises(ValueError, match=r"^3 dimensions$"):
        model(torch.randn(2, 2, 8))
    with pytest.raises(RuntimeError) as mine:
        model(torch.randn(2, 7))
    with pytest.raises(RuntimeError) as theirs:
        users(torch.randn(2, 7))
    assert str(mine.value) == str(theirs.value)
    assert model.calls == 2
    model(torch.randn(2, 8))
    assert [len(look.sites) for look in looks if look.sites] == [1]
