"""`explain` changes nothing, counts graphs, and names how statistics are kept."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from hand_written import BatchNorm, Net, RowNorm, images, train
from torch import Tensor, nn
from torch._dynamo.exc import TensorifyScalarRestartAnalysis

import bnrewrite
from bnrewrite.capture.explain import _Watcher

pytestmark = pytest.mark.usefixtures("repeatable")


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
        found.setdefault(each.name, []).append(each.message.split(":")[0])
        assert each.source.startswith(("hand_written.py:", "test_explain.py:"))
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


def test_what_one_function_is_called_with_says_nothing_of_another() -> None:
    def mean_square(x: Tensor, eps: float = 1e-3) -> Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)

    def deviation(x: Tensor, eps: float = 1e-12) -> Tensor:
        length: Tensor = torch.linalg.vector_norm(x, 2, -1, keepdim=True)
        return x / length.clamp_min(eps)

    assert [site.eps for site in bnrewrite.explain(mean_square, torch.randn(4, 6)).sites] == [1e-3]
    (site,) = bnrewrite.explain(deviation, torch.randn(5, 8)).sites
    assert (site.kind, site.eps) == ("lp_normalize", 1e-12)  # and not a number that varies


def test_a_graph_that_dynamo_discards_is_not_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes another in its place, or none, and empties the first."""
    compile_graph, calls = _Watcher.__call__, []

    def restarted(watcher: Any, graph: Any, inputs: Any) -> Any:
        run = compile_graph(watcher, graph, inputs)
        calls.append(run)
        if len(calls) == 1:
            raise TensorifyScalarRestartAnalysis("from the beginning")
        return run

    monkeypatch.setattr(_Watcher, "__call__", restarted)
    report = bnrewrite.explain(RowNorm(4), torch.randn(3, 4))
    assert len(calls) == 2
    assert (report.graphs, len(report.sites)) == (1, 1)
