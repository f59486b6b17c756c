"""A graph of Dynamo's comes out functional, named, with the user's lines; or it is left."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from hand_written import Net, RowNorm, images, train
from torch import Tensor, fx, nn

import bnrewrite
from bnrewrite.capture import Canonical, Input, capture
from bnrewrite.capture.look import Look

pytestmark = pytest.mark.usefixtures("repeatable")


def same_training(users: nn.Module, batches: list[Tensor], tolerance: float = 1e-4) -> nn.Module:
    """Both train on the batches; outputs, gradients and buffers agree."""
    model = bnrewrite.optimize(copy.deepcopy(users), backend="eager")
    for x in batches:
        for each in (users, model):
            train(each, x)
        torch.testing.assert_close(
            dict(model.state_dict()), dict(users.state_dict()), rtol=tolerance, atol=tolerance
        )
    for mine, theirs in zip(model.parameters(), users.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=tolerance, atol=tolerance)
    return model


def targets(canonical: Canonical) -> set[Any]:
    return {node.target for node in canonical.module.graph.nodes if node.op == "call_function"}


def test_a_graph_is_functional_aten_with_every_input_named() -> None:
    (canonical,) = capture(Net(update="in place"), images())
    assert [each for each in canonical.inputs if each.kind != "input"] == [
        Input("conv_weight", "parameter", "conv.weight"),
        Input("conv_bias", "parameter", "conv.bias"),
        Input("norm_num_batches_tracked", "buffer", "norm.num_batches_tracked"),
        Input("norm_running_mean", "buffer", "norm.running_mean"),
        Input("norm_running_var", "buffer", "norm.running_var"),
        Input("norm_weight", "parameter", "norm.weight"),
        Input("norm_bias", "parameter", "norm.bias"),
    ]
    assert [each.name for each in canonical.inputs] == [
        node.name for node in canonical.module.graph.nodes if node.op == "placeholder"
    ]
    assert sorted(canonical.mutated) == [
        "norm_num_batches_tracked",
        "norm_running_mean",
        "norm_running_var",
    ]
    assert canonical.rebound == ()
    assert canonical.grad_enabled
    for node in canonical.module.graph.nodes:
        if node.op == "call_function":
            assert isinstance(node.target, torch._ops.OpOverload)
            assert not node.target._schema.is_mutable
            assert isinstance(node.meta["val"], Tensor)


def test_rebound_buffers_lead_the_outputs() -> None:
    (canonical,) = capture(Net(update="rebind"), images())
    assert sorted(canonical.rebound) == ["norm_running_mean", "norm_running_var"]
    assert set(canonical.rebound) < set(canonical.mutated)
    output = next(node for node in canonical.module.graph.nodes if node.op == "output")
    values = output.args[0]
    named = {node.name: node for node in canonical.module.graph.nodes}
    for name, value in zip(canonical.mutated, values, strict=False):
        assert value.meta["val"].shape == named[name].meta["val"].shape
    assert len(values) > len(canonical.mutated)


def test_nodes_know_the_users_line_and_module() -> None:
    (canonical,) = capture(nn.Sequential(nn.Conv2d(3, 4, 1), Net().norm), images())
    mean = next(
        node for node in canonical.module.graph.nodes if node.target is torch.ops.aten.mean.dim
    )
    assert "hand_written.py" in mean.meta["stack_trace"]
    assert "x.mean(axes)" in mean.meta["stack_trace"]
    assert list(mean.meta["nn_module_stack"].values())[-1][0] == "1"
    for node in canonical.module.graph.nodes:
        assert "bnrewrite/capture" not in (node.meta.get("stack_trace") or "")


def test_regions_without_gradients_are_marked() -> None:
    (canonical,) = capture(Net(update="rebind without gradients"), images())
    assert torch._C._set_grad_enabled in targets(canonical)
    with torch.no_grad():
        (outside,) = capture(Net(update="rebind"), images())
    assert not outside.grad_enabled


def test_sizes_may_be_symbols() -> None:
    x = images()
    torch._dynamo.mark_dynamic(x, 0)
    found: list[Canonical] = []
    found += capture(Net(), x)
    (canonical,) = found
    sizes = [
        node
        for node in canonical.module.graph.nodes
        if node.op == "placeholder" and isinstance(node.meta["val"], torch.SymInt)
    ]
    assert len(sizes) == 1


def test_a_model_may_have_several_graphs(looks: list[Look]) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = RowNorm(8), RowNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x * 2)

    same_training(Broken(), [torch.randn(4, 8) for _ in range(2)])
    assert [[site.module for site in look.sites] for look in looks] == [["first"], ["second"]]


def test_python_numbers_that_change_become_inputs(looks: list[Look]) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.scale = RowNorm(8), 0.5

        def forward(self, x: Tensor, factor: float, count: int) -> Tensor:
            return self.norm(x) * factor + count * self.scale

    users = Scaled()
    model = bnrewrite.optimize(copy.deepcopy(users), backend="eager")
    for step in range(6):
        x = torch.randn(4, 8)
        model.scale = users.scale = 1.5 * step
        torch.testing.assert_close(
            model(x, 0.1 * step, step + 2), users(x, 0.1 * step, step + 2), rtol=1e-4, atol=1e-5
        )
    assert len(looks) <= 4
    assert all(look.failure is None for look in looks)


def test_control_flow_by_values() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = RowNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            if x.sum().item() > 0:
                return self.norm(x)
            return -self.norm(x * 2)

    same_training(Branching(), [torch.full((2, 8), sign).cumsum(1) for sign in (1.0, -1.0, 1.0)])


def test_sizes_by_values() -> None:
    class Cutting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = RowNorm(8)

        def forward(self, x: Tensor, n: Tensor) -> Tensor:
            return self.norm(x[: int(n.item())])

    users = Cutting()
    model = bnrewrite.optimize(copy.deepcopy(users), backend="eager")
    x = torch.randn(6, 8)
    for n in (2, 3, 4):
        torch.testing.assert_close(
            model(x, torch.tensor(n)), users(x, torch.tensor(n)), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("widened", [False, True])
def test_autocast(
    inside: bool, widened: bool, looks: list[Look], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(8, 8), RowNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            if not inside:
                return self.body(x)
            with torch.autocast("cpu", torch.bfloat16):
                return self.body(x)

        def body(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            z = self.norm(y.float() if widened else y)
            return torch.softmax(torch.einsum("ij,kj->ik", z, z) + y.sum(), -1) @ z

    users = Cast()
    model = bnrewrite.optimize(copy.deepcopy(users), backend="eager")
    unchanged = bnrewrite.optimize(
        copy.deepcopy(users), backend="eager", disable=["plan", "lower", "cleanup"]
    )
    monkeypatch.setattr(Look, "is_rewritten", True)  # the captured graph runs, rewritten or not
    x, expected = torch.randn(4, 8), torch.empty(0)
    for each in (users, model, unchanged):
        with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
            y = each(x)
        torch.autograd.backward(y.float().pow(3).sum())
        expected = y if each is users else expected
        assert y.dtype == expected.dtype
        if each is unchanged:
            assert torch.equal(y, expected)
        torch.testing.assert_close(y, expected, rtol=3e-2, atol=3e-2)
    for mine, theirs in zip(unchanged.parameters(), users.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-2, atol=1e-2)
    assert len(looks[0].sites) == 1
    assert len(looks) == 2


def test_nothing_is_rewritten_where_nothing_was_found(
    looks: list[Look], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def keep(backend: str, graph: fx.GraphModule, *_: Any) -> Any:
        seen.append(graph)
        return graph.forward

    monkeypatch.setattr(
        "bnrewrite.capture.backend.run_by",
        keep,
    )
    bnrewrite.optimize(nn.Sequential(nn.Linear(4, 4), nn.GELU()), backend="eager")(torch.ones(1, 4))
    assert seen == [looks[0].graph]  # the user's graph, in the user's operations


def test_inference_mode_and_no_grad() -> None:
    users = Net()
    model = bnrewrite.optimize(copy.deepcopy(users), backend="eager")
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        x = images()
        with mode():
            torch.testing.assert_close(model(x), users(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dict(model.state_dict()), dict(users.state_dict()))


def test_random_numbers_are_drawn_as_the_users_code_draws_them() -> None:
    users = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), RowNorm(8), nn.Dropout(0.5))
    model = bnrewrite.optimize(copy.deepcopy(users), backend="eager")
    x = torch.randn(16, 8)
    results = []
    for each in (users, model):
        torch.manual_seed(3)
        results.append(each(x))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_inputs_that_are_views_of_each_other() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = RowNorm(4)
            self.a: Tensor
            self.b: Tensor
            flat = torch.zeros(8)
            self.register_buffer("a", flat[:4])
            self.register_buffer("b", flat[2:6])

        def forward(self, x: Tensor) -> Tensor:
            self.a.add_(1)
            self.b.mul_(2)
            return self.norm(x + self.a + self.b)

    users = Pair()
    model = bnrewrite.optimize(copy.deepcopy(users), backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bnrewrite.BnrewriteWarning)
        for _ in range(3):
            x = torch.randn(2, 4)
            torch.testing.assert_close(model(x), users(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dict(model.state_dict()), dict(users.state_dict()))


def test_a_view_of_an_updated_buffer_that_is_returned() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = RowNorm(4)
            self.queue: Tensor
            self.register_buffer("queue", torch.zeros(2, 4))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            self.queue[0] = x.detach().mean(0)
            return self.norm(x), self.queue[0]

    users = Views()
    model = bnrewrite.optimize(copy.deepcopy(users), backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bnrewrite.BnrewriteWarning)
        kept = [(model(x), users(x)) for x in torch.randn(3, 2, 4)]
    torch.testing.assert_close([a for a, _ in kept], [b for _, b in kept], rtol=1e-4, atol=1e-5)
