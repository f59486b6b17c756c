"""What `optimize` takes and refuses: models, functions, switches; sites by their numbers."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from hand_written import Net, RowNorm, images, row_norm, same
from torch import Tensor, nn

import bnrewrite

pytestmark = pytest.mark.usefixtures("repeatable")


def test_a_function_comes_back_as_a_function(compiled_graphs: list[int]) -> None:
    fast = bnrewrite.optimize(row_norm, backend="eager")
    assert fast.__name__ == "row_norm"
    assert fast.__doc__ == row_norm.__doc__
    x = torch.randn(3, 8)
    same(fast, row_norm, x)
    torch.testing.assert_close(fast(x, eps=1.0), row_norm(x, eps=1.0))
    again = bnrewrite.optimize(fast, backend="eager")
    same(again, row_norm, x)
    partial = functools.partial(row_norm, eps=1.0)
    same(bnrewrite.optimize(partial, backend="eager"), partial, x)


def test_methods_and_closures_are_functions(compiled_graphs: list[int]) -> None:
    norm = RowNorm(8)
    x = torch.randn(3, 8)
    same(bnrewrite.optimize(norm.forward, backend="eager"), norm, x)
    eps = 1e-5
    same(bnrewrite.optimize(lambda x: row_norm(x, eps), backend="eager"), row_norm, x)
    assert compiled_graphs == [1, 1]


class Callable_:
    def __call__(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (3, "optimize takes a torch.nn.Module or a function, not a int"),
        (Net, "optimize takes a torch.nn.Module or a function, not a type"),
        (None, "not a NoneType"),
        (Callable_(), "not a Callable_"),
        ([nn.Linear(2, 2)], "not a list"),
    ],
)
def test_what_is_no_model_is_refused(model: Any, sentence: str) -> None:
    with pytest.raises(TypeError, match=sentence):
        bnrewrite.optimize(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_function_is_refused() -> None:
    model = torch.jit.script(row_norm)
    with pytest.raises(TypeError, match="is compiled already"):
        bnrewrite.optimize(model)
    with pytest.raises(TypeError, match="is compiled already"):
        bnrewrite.explain(model, torch.randn(2, 2))


def test_a_compiled_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"is what torch\.compile returned"):
        bnrewrite.optimize(torch.compile(Net()))


@pytest.mark.parametrize(
    ("switches", "error", "sentence"),
    [
        ({"backend": "egaer"}, ValueError, "backend is 'egaer'; it is one of"),
        ({"backend": print}, TypeError, "backend is a builtin_function_or_method"),
        ({"disable": ["fodl"]}, ValueError, "disable names 'fodl', which is no pass"),
        ({"only": ["layernorm"]}, ValueError, "only names 'layernorm'; it takes site numbers"),
        ({"only": [-1]}, ValueError, "only names -1"),
        ({"kernels": "fast"}, ValueError, "kernels is 'fast'"),
    ],
)
def test_a_switch_that_does_not_exist_is_refused(
    switches: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        bnrewrite.optimize(Net(), **switches)


@pytest.mark.filterwarnings("error::bnrewrite.BnrewriteWarning")
@pytest.mark.parametrize("name", ["recognise", "plan", "lower", "cleanup"])
def test_a_pass_that_is_switched_off_leaves_the_users_values(
    name: str, compiled_graphs: list[int]
) -> None:
    users = Net()
    model = bnrewrite.optimize(copy.deepcopy(users), backend="eager", disable=name)
    for x in (images(), images(5)):
        same(model, users, x)
    torch.testing.assert_close(dict(model.state_dict()), dict(users.state_dict()))
    assert set(compiled_graphs) == {int(name == "cleanup")}
    found = [site.status for site in bnrewrite.explain(model, images()).sites]
    assert found == {"recognise": [], "cleanup": ["rewritten"]}.get(name, ["left"])


class Broken(nn.Module):
    """Five norms in three graphs; in eval mode the first is not there."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([RowNorm(8) for _ in range(5)])

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = self.norms[0](x)
        x = self.norms[1](x)
        torch._dynamo.graph_break()
        x = self.norms[2](x)
        torch._dynamo.graph_break()
        y: Tensor = self.norms[4](self.norms[3](x))
        return y


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("only", [0, 1, 2, 3, (1, 3), ("layer_norm",)])
def test_sites_are_numbered_through_all_graphs(
    only: Any, training: bool, compiled_graphs: list[int]
) -> None:
    users = Broken().train(training)
    model = bnrewrite.optimize(copy.deepcopy(users), backend="eager", only=only)
    report = bnrewrite.explain(model, torch.randn(4, 8))
    names = [f"norms.{i}" for i in range(5) if i or training]
    chosen = {only} if isinstance(only, int) else set(only)
    expected = [i for i in range(len(names)) if i in chosen or "layer_norm" in chosen]
    assert report.graphs == 3
    assert [site.module for site in report.sites] == names
    assert [i for i, site in enumerate(report.sites) if site.status == "rewritten"] == expected
    for i, site in enumerate(report.sites):
        assert i in expected or str(site.reason).startswith(f"site {i} (layer_norm) is not in")
    for size in (4, 4, 5, 7):  # at 5 all graphs are compiled again, for any size
        same(model, users, torch.randn(size, 8))
    assert len(compiled_graphs) == 6
    assert sum(compiled_graphs[:3]) == sum(compiled_graphs[3:]) == len(expected)


def test_under_torch_compile_each_graph_counts_from_zero(compiled_graphs: list[int]) -> None:
    options: dict[str, Any] = {"backend": "eager", "only": 0}
    torch.compile(Broken(), backend="bnrewrite", options=options)(torch.randn(4, 8))
    assert compiled_graphs == [1, 1, 1]


def test_the_backend_by_name(compiled_graphs: list[int]) -> None:
    model = Net()
    users = copy.deepcopy(model)
    options: dict[str, Any] = {"backend": "eager"}
    same(torch.compile(model, backend="bnrewrite", options=options), users, images())
    assert compiled_graphs == [1]
    with pytest.raises(Exception, match="bnrewrite has no option 'speed'"):
        torch.compile(Net(), backend="bnrewrite", options={"speed": 1})(images())
