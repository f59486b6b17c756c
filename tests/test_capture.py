"""A graph of Dynamo's comes out functional, named, with the user's lines; or it is left."""

from __future__ import annotations

import copy
import random
import warnings
from typing import Any

import pytest
import torch
from hand_written import BatchNorm, Net, RowNorm
from torch import Tensor, fx, nn

import bnrewrite
from bnrewrite.capture import Canonical, Input, capture
from bnrewrite.capture.backend import Compiler
from bnrewrite.capture.look import Look


@pytest.fixture(autouse=True)
def repeatable() -> None:
    torch.manual_seed(0)


def images(size: int = 4) -> Tensor:
    return torch.randn(size, 3, 8, 8)


def looks_of(monkeypatch: pytest.MonkeyPatch) -> list[Look]:
    seen: list[Look] = []
    compile_graph = Compiler.__call__

    def watching(self: Compiler, *args: Any) -> Any:
        self.observe = seen.append
        return compile_graph(self, *args)

    monkeypatch.setattr(Compiler, "__call__", watching)
    return seen


def train(model: Any, x: Tensor) -> None:
    torch.manual_seed(0)
    y = model(x)
    torch.autograd.backward((y.float() * torch.randn(y.shape)).sum())


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


def test_a_model_may_have_several_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = RowNorm(8), RowNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x * 2)

    seen = looks_of(monkeypatch)
    same_training(Broken(), [torch.randn(4, 8) for _ in range(2)])
    assert [[site.module for site in look.sites] for look in seen] == [["first"], ["second"]]


def test_python_numbers_that_change_become_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.scale = RowNorm(8), 0.5

        def forward(self, x: Tensor, factor: float, count: int) -> Tensor:
            return self.norm(x) * factor + count * self.scale

    seen = looks_of(monkeypatch)
    users = Scaled()
    model = bnrewrite.optimize(copy.deepcopy(users), backend="eager")
    for step in range(6):
        x = torch.randn(4, 8)
        model.scale = users.scale = 1.5 * step
        torch.testing.assert_close(
            model(x, 0.1 * step, step + 2), users(x, 0.1 * step, step + 2), rtol=1e-4, atol=1e-5
        )
    assert len(seen) <= 4
    assert all(look.failure is None for look in seen)


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
def test_autocast(inside: bool, widened: bool, monkeypatch: pytest.MonkeyPatch) -> None:
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

    seen = looks_of(monkeypatch)
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
    assert len(seen[0].sites) == 1
    assert len(seen) == 2


def test_nothing_is_rewritten_where_nothing_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def keep(backend: str, graph: fx.GraphModule, *_: Any) -> Any:
        seen.append(graph)
        return graph.forward

    monkeypatch.setattr(
        "bnrewrite.capture.backend.run_by",
        keep,
    )
    looks = looks_of(monkeypatch)
    bnrewrite.optimize(nn.Sequential(nn.Linear(4, 4), nn.GELU()), backend="eager")(torch.ones(1, 4))
    assert seen == [looks[0].graph]  # the user's graph, in the user's operations


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
    monkeypatch: pytest.MonkeyPatch,
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

    seen = looks_of(monkeypatch)
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
    assert [len(look.sites) for look in seen if look.sites] == [1]


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


def test_explain_changes_nothing() -> None:
    model = Net()
    train(model, images())
    model.norm.running_mean = model.norm.running_mean.detach()
    model.norm.running_var = model.norm.running_var.detach()
    state = {
        name: (id(each), each.clone()) for name, each in model.state_dict(keep_vars=True).items()
    }
    gradients = [each.grad.clone() for each in model.parameters() if each.grad is not None]
    x = images()
    generators = torch.get_rng_state(), random.getstate()
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    report = bnrewrite.explain(model, x)
    assert [site.kind for site in report.sites] == ["batch_norm"]
    assert report.graphs == 1
    assert report.graph_breaks == 0
    for name, each in model.state_dict(keep_vars=True).items():
        assert id(each) == state[name][0]
        assert torch.equal(each, state[name][1])
    for mine, before in zip(model.parameters(), gradients, strict=True):
        assert mine.grad is not None
        assert torch.equal(mine.grad, before)
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes


class Uncopyable(BatchNorm):
    """Has an attribute that cannot be copied, and plain state."""

    def __init__(self) -> None:
        super().__init__(3, "in place without gradients")
        self.calls = 0
        self.seen: list[int] = []
        self.lock = __import__("threading").Lock()
        self.plain = torch.zeros(3)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(x.size(0))
        self.plain = self.plain + 1
        return super().forward(x)


def test_explain_of_a_model_that_cannot_be_copied() -> None:
    model = Uncopyable()
    before = copy.copy(model.state_dict())
    before = {name: value.clone() for name, value in before.items()}
    plain = model.plain
    report = bnrewrite.explain(model, images())
    assert [site.kind for site in report.sites] == ["batch_norm"]
    assert model.calls == 0
    assert model.seen == []
    assert model.plain is plain
    torch.testing.assert_close(dict(model.state_dict()), before)


def test_explain_in_the_current_mode_and_of_functions() -> None:
    model = Net().eval()
    assert [site.kind for site in bnrewrite.explain(model, images()).sites] == ["affine"]
    assert not model.training
    norm = RowNorm(8)
    report = bnrewrite.explain(lambda x: norm(x), torch.randn(2, 8))
    assert [site.kind for site in report.sites] == ["layer_norm"]
    assert len(bnrewrite.explain(nn.Linear(2, 2), torch.randn(2, 2))) == 0


def test_explain_counts_graphs_and_breaks() -> None:
    def broken(x: Tensor) -> Tensor:
        x = x - x.mean()
        torch._dynamo.graph_break()
        return x * 2

    report = bnrewrite.explain(broken, torch.randn(2, 8))
    assert (report.graphs, report.graph_breaks) == (2, 1)


def test_explain_of_an_optimised_model_uses_its_options() -> None:
    model = bnrewrite.optimize(Net(), backend="eager", disable=["batch_norm"])
    model(images())
    (site,) = bnrewrite.explain(model, images()).sites
    assert site.status == "left"
    assert int(model.norm.num_batches_tracked) == 1


def findings(model: nn.Module, *args: Any) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for each in bnrewrite.explain(model, *args).findings:
        found.setdefault(each.code, []).append(each.message.split(":")[0])
        assert each.source.startswith(("hand_written.py:", "test_capture.py:"))
    return found


def test_explain_names_how_statistics_are_kept() -> None:
    both = ["norm.running_mean", "norm.running_var"]
    assert findings(Net(), images()) == {"buffer-rebound": both, "statistic-with-history": both}
    assert findings(Net(update="rebind detached"), images()) == {"buffer-rebound": both}
    assert findings(Net(update="in place"), images()) == {"statistic-with-history": both}
    assert findings(Net(update="in place without gradients"), images()) == {}


class Forgetful(BatchNorm):
    """Updates nothing."""

    def track(self, mean: Tensor, variance: Tensor) -> None:
        pass


class Unregistered(nn.Module):
    """Keeps a running mean that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.running_mean = torch.zeros(3)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((0, 2, 3))
        self.running_mean = 0.9 * self.running_mean + 0.1 * mean.detach()
        return x - mean[:, None, None]


def test_explain_names_statistics_that_stay_zero() -> None:
    assert findings(Forgetful(3), images())["statistics-never-updated"] == [
        "running_mean",
        "running_var",
    ]
    assert findings(Unregistered(), images()) == {"statistic-not-a-buffer": ["running_mean"]}
