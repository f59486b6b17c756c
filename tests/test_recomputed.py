"""Buffers updated where activation checkpointing runs code again: as often as by the user's."""

from __future__ import annotations

import copy

import pytest
import torch
from hand_written import UPDATES, BatchNorm, Layer, RowNorm, Running
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bnrewrite
from bnrewrite.capture import bindings

SIZE = 8
# The user's own code raises: what is rebound with its history is computed again from itself.
WITHOUT_HISTORY = [each for each in UPDATES if each not in ("rebind", "in place")]


class Checkpointed(Layer):
    """A norm under checkpointing, between two more."""

    def __init__(self, second: Layer) -> None:
        super().__init__()
        self.first, self.second = RowNorm(SIZE), second
        self.linear = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        inner = checkpoint(self.inner, self.first(x), use_reentrant=False)
        assert isinstance(inner, Tensor)
        return self.first(inner)

    def inner(self, x: Tensor) -> Tensor:
        return torch.sin(self.linear(self.second(x)))


def trained(model: nn.Module, outside: bool, reentrant: bool = False) -> list[Tensor]:
    """All that three steps show, with the model under checkpointing or not."""
    seen: list[Tensor] = []
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        x = torch.randn(6, SIZE, dtype=torch.float64, generator=generator).requires_grad_()
        y = checkpoint(model, x, use_reentrant=reentrant) if outside else model(x)
        assert isinstance(y, Tensor)
        cotangent = torch.randn(y.shape, dtype=torch.float64, generator=generator)
        torch.autograd.backward(y, cotangent)
        assert x.grad is not None
        seen += [y.detach(), x.grad, *(each.clone() for each in model.buffers())]
        seen += [each.grad.clone() for each in model.parameters() if each.grad is not None]
    return seen


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("update", WITHOUT_HISTORY)
def test_a_model_under_checkpointing(update: str, backend: str, reentrant: bool) -> None:
    users = nn.Sequential(BatchNorm(SIZE, update), BatchNorm(SIZE, update)).double()
    model = bnrewrite.optimize(copy.deepcopy(users), backend=backend)
    identities = [id(each) for each in model.buffers()]
    torch.testing.assert_close(trained(model, True, reentrant), trained(users, True, reentrant))
    assert [id(each) for each in model.buffers()] == identities


def test_a_model_under_checkpointing_that_updates_nothing_is_rewritten() -> None:
    users = nn.Sequential(RowNorm(SIZE), RowNorm(SIZE)).double()
    model = bnrewrite.optimize(copy.deepcopy(users), backend="eager")
    torch.testing.assert_close(trained(model, True), trained(users, True))
    graphs: list[str] = []

    def step() -> None:
        x = torch.randn(4, SIZE, dtype=torch.float64, requires_grad=True)
        y = checkpoint(model, x, use_reentrant=False)
        assert isinstance(y, Tensor)
        graphs.append(str(y.grad_fn))

    step()
    assert "LayerNorm" in graphs[0]


@pytest.mark.parametrize("at_the_end", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_checkpoint_with_updates_is_not_compiled(at_the_end: bool, backend: str) -> None:
    users = Checkpointed(Running(SIZE, at_the_end)).double()
    model = bnrewrite.optimize(copy.deepcopy(users), backend=backend)
    torch.testing.assert_close(trained(model, False), trained(users, False))


def test_a_graph_that_stays_eager_says_so() -> None:
    model = bnrewrite.optimize(Checkpointed(Running(SIZE)), backend="inductor")
    report = bnrewrite.explain(model, torch.randn(4, SIZE, requires_grad=True))
    assert [each.what for each in report.kept] == ["checkpoint"]
    assert "this graph runs in eager mode" in report.kept[0].reason
    assert report.kept[0].source.startswith("test_recomputed.py:")


def test_a_checkpointed_graph_is_called_by_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    bind = bindings.call_by_bindings

    def watched(module: torch.fx.GraphModule) -> None:
        bind(module)
        seen.extend(str(node.target) for node in module.graph.nodes if node.op[:5] == "call_")

    monkeypatch.setattr("bnrewrite.capture.stage.call_by_bindings", watched)
    model = bnrewrite.optimize(Checkpointed(RowNorm(SIZE)), backend="eager")
    model(torch.randn(4, SIZE, requires_grad=True))
    assert any("sin" in each for each in seen)
    assert not any(each.startswith("aten.") for each in seen)
