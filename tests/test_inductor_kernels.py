"""Kernels under Inductor on a CPU: it places their operators, and moves tensors between them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract import contract_violations
from hand_written import BatchNorm
from torch import Tensor, fx, nn

from benchmarks import hand_written
from bnrewrite import explain, optimize


class Block(nn.Module):
    """Convolutions, which Inductor runs in a layout of its own, norms and a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.third = nn.Conv2d(4, 8, 1)
        self.batch, self.other = (BatchNorm(8, update="in place") for _ in range(2))
        self.group = hand_written.GroupNorm(2, 8)
        self.response = hand_written.GlobalResponseNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.batch(self.first(x)).relu()
        y = self.other(self.second(y)) + self.third(x)
        y = nn.functional.silu(self.group(y.relu()))
        z: Tensor = self.response(y)
        return z


def through_inductor(model: Any, **choices: Any) -> Any:
    return optimize(model, backend="inductor", kernels="generated", **choices)


def test_a_model_of_convolutions() -> None:
    batches = [torch.randn(3, 4, 6, 5) for _ in range(3)]
    model = Block()
    assert contract_violations(model, through_inductor, batches) == []
    lowerings = [site.lowering for site in explain(through_inductor(model), batches[0]).sites]
    assert lowerings == ["generated"] * 4


def test_batches_that_grow() -> None:
    batches = [torch.randn(n, 4, 6, 5) for n in (2, 3, 5, 4)]
    model = nn.Sequential(BatchNorm(4, update="in place"), hand_written.GroupNorm(2, 4), nn.ReLU())
    calls = contract_violations(model, lambda m: through_inductor(m, dynamic=True), batches)
    assert calls == []


class Rows(nn.Module):
    """A language model's norms: of a sum that goes on, in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.root = hand_written.LayerNorm(16), hand_written.RMSNorm(16)
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = x + y
        z = z + self.linear(self.norm(z))
        return z, self.root(z).sigmoid() * y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_sums(dtype: torch.dtype) -> None:
    batches: list[Any] = [tuple(torch.randn(2, 5, 16, dtype=dtype) for _ in "xy") for _ in range(3)]
    assert contract_violations(Rows().to(dtype), through_inductor, batches) == []


def test_no_placeholder_stands_for_an_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """For Inductor's C++ wrapper its ``val`` does, of which no input takes a gradient."""
    from torch._inductor import compile_fx

    seen: list[Any] = []

    def note(graph: fx.GraphModule, inputs: Any, **given: Any) -> Any:
        seen.extend(node.meta.get("val") for node in graph.graph.find_nodes(op="placeholder"))
        return graph.forward

    monkeypatch.setattr(compile_fx, "compile_fx", note)
    through_inductor(hand_written.LayerNorm(16))(torch.randn(2, 16, requires_grad=True))
    assert seen == [None] * 3


def test_no_backward_keeps_more_than_x_and_moments() -> None:
    """The partition of the graph saves what the operator saves."""
    x = torch.randn(4, 8, 16, 16, requires_grad=True)
    model = nn.Sequential(hand_written.GroupNorm(2, 8), nn.ReLU())
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    call = through_inductor(model)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call(x)
    parameters = sum(4 * p.numel() for p in model.parameters())
    assert sum(kept.values()) - 4 * x.numel() <= 2 * parameters + 2 * 4 * 2 * 4
