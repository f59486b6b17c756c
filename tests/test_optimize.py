"""`optimize` returns the user's own object, and whatever is done with a module goes on working."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hand_written import Net, RowNorm, images, row_norm, same
from torch import Tensor, nn

import bnrewrite
from bnrewrite.capture.hook import KEY

pytestmark = pytest.mark.usefixtures("repeatable")


def optimised(**switches: Any) -> Net:
    return bnrewrite.optimize(Net(), **{"backend": "eager", **switches})


def test_the_same_object_comes_back() -> None:
    model = Net()
    keys, attributes = list(model.state_dict()), set(vars(model))
    back = bnrewrite.optimize(model, backend="eager")
    assert back is model
    assert type(back) is Net
    back(images())
    assert list(back.state_dict()) == keys
    mine = {name for name in set(vars(back)) - attributes if not name.startswith("___")}
    assert mine == {KEY}  # Dynamo's own marks have three underscores
    assert repr(back) == repr(Net())


def test_other_instances_of_the_class_are_not_optimised(compiled_graphs: list[int]) -> None:
    optimised()
    Net()(images())
    assert compiled_graphs == []


def test_a_model_is_rewritten_once_per_mode(compiled_graphs: list[int]) -> None:
    model = optimised()
    for _ in range(4):
        model.train()(images())
        model.eval()(images())
    assert compiled_graphs == [1, 1]


def test_sizes_that_change_need_one_more_graph(compiled_graphs: list[int]) -> None:
    model = optimised()
    for size in range(2, 12):
        model(images(size))
    assert len(compiled_graphs) <= 2


def test_models_of_one_class_do_not_use_up_each_others_recompilations(
    compiled_graphs: list[int],
) -> None:
    limit = torch._dynamo.config.recompile_limit
    for channels in range(2, limit + 5):
        model = bnrewrite.optimize(RowNorm(channels), backend="eager")
        model(torch.randn(2, channels))
    assert compiled_graphs == [1] * (limit + 3)


def test_a_deep_copy_is_optimised_and_has_its_own_tensors(compiled_graphs: list[int]) -> None:
    model = optimised()
    model(images())
    twin = copy.deepcopy(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        twin.norm.weight.fill_(7.0)
    users = Net()
    users.load_state_dict(twin.state_dict())
    x = images()
    same(twin, users, x)
    assert compiled_graphs == [1]  # the copy shares the compiled call
    torch.testing.assert_close(dict(model.state_dict()), before)
    torch.testing.assert_close(dict(twin.state_dict()), dict(users.state_dict()))


def replicated(module: Any) -> Any:
    return module._replicate_for_data_parallel()


def test_a_replica_of_data_parallel_runs_with_its_own_tensors() -> None:
    model = optimised()
    x = images()
    model.eval()(x)
    replica = replicated(model)
    for name, child in model.named_children():
        twin = replicated(child)
        setattr(replica, name, twin)
        for each, value in child.named_parameters():
            setattr(twin, each, torch.full_like(value.detach(), 7.0))
        for each, buffer in child.named_buffers():
            setattr(twin, each, buffer.clone())
    users = Net().eval()
    users.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in users.parameters():
            parameter.fill_(7.0)
    same(replica, users, x)


def test_an_averaged_copy_is_optimised() -> None:
    model = optimised()
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    model(images())
    average.update_parameters(model)
    users = Net()
    users.load_state_dict(average.module.state_dict())
    same(average, users, images())


def test_a_pickled_model_is_optimised_when_it_comes_back(compiled_graphs: list[int]) -> None:
    model = optimised()
    model(images())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    back = torch.load(file, weights_only=False)
    same(back, model, images())
    assert compiled_graphs == [1, 1]
    assert isinstance(back, Net)


def test_a_saved_model_loads_without_bnrewrite(tmp_path: Path) -> None:
    model = optimised()
    model(images())
    torch.save(model, tmp_path / "model.pt")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    script = (
        "import sys, torch\n"
        "class Refuse:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name.split('.')[0] == 'bnrewrite': raise ImportError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        f"model.load_state_dict(torch.load({str(tmp_path / 'weights.pt')!r}))\n"
        "print(tuple(model(torch.ones(2, 3, 8, 8)).shape))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "(2, 4, 6, 6)", done.stderr


def test_hooks_fire_once_per_call() -> None:
    model = optimised()
    calls: list[str] = []
    model.register_forward_pre_hook(lambda *_: calls.append("pre"))
    model.register_forward_hook(lambda *_: calls.append("forward"))
    model.norm.register_forward_hook(lambda *_: calls.append("inner"))
    model.register_full_backward_hook(lambda *_: calls.append("backward"))
    for _ in range(3):
        torch.autograd.backward(model(images().requires_grad_()).sum())
    assert sorted(calls) == sorted(["pre", "forward", "inner", "backward"] * 3)


def test_a_hook_that_is_added_later_fires_and_can_be_removed() -> None:
    model = optimised()
    model(images())
    seen: list[int] = []
    handle = model.norm.register_forward_hook(lambda *_: seen.append(1))
    model(images())
    handle.remove()
    model(images())
    assert seen == [1]


def test_the_model_can_be_moved_to_another_dtype() -> None:
    model = optimised()
    model(images())
    users = Net()
    users.load_state_dict(model.state_dict())
    model.double()
    users.double()
    same(model, users, images().double())


def test_optimize_again_replaces_the_options(compiled_graphs: list[int]) -> None:
    model = optimised()
    model(images())
    again = bnrewrite.optimize(model, backend="eager", disable=["batch_norm"])
    assert again is model
    model(images())
    assert compiled_graphs == [1, 0]


def test_it_takes_the_place_of_an_earlier_compile(compiled_graphs: list[int]) -> None:
    model = Net()
    model.compile(backend="eager")
    bnrewrite.optimize(model, backend="eager")(images())
    assert compiled_graphs == [1]


def test_an_optimised_module_inside_a_compiled_and_an_optimised_one(
    compiled_graphs: list[int],
) -> None:
    inner = optimised()
    outer = nn.Sequential(inner, nn.ReLU())
    users = copy.deepcopy(outer)
    del users[0].__dict__[KEY]
    x = images()
    same(torch.compile(outer, backend="eager"), users, x)
    assert compiled_graphs == []  # the user's compile sees the user's code
    same(bnrewrite.optimize(outer, backend="eager"), users, x)
    assert compiled_graphs == [1]
    same(outer[0], users[0], x)


def test_an_optimised_module_in_a_model_that_is_not(compiled_graphs: list[int]) -> None:
    outer = nn.Sequential(nn.Conv2d(3, 3, 1), optimised())
    torch.autograd.backward(outer(images()).sum())
    assert compiled_graphs == [1]


def test_shared_modules_and_tied_parameters() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = RowNorm(8)
            self.b = self.a
            self.c = RowNorm(8)
            self.c.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x)).sin())

    users = Shared()
    model = bnrewrite.optimize(copy.deepcopy(users), backend="eager")
    x = torch.randn(4, 8)
    for each in (users, model):
        torch.autograd.backward(each(x).pow(3).sum())
    same(model, users, x)
    torch.testing.assert_close(model.a.weight.grad, users.a.weight.grad, rtol=1e-4, atol=1e-5)


def test_a_shared_norm_with_statistics_is_updated_twice() -> None:
    norm = Net().norm
    users = nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.ReLU(), norm)
    model = bnrewrite.optimize(copy.deepcopy(users), backend="eager")
    for _ in range(3):
        x = images()
        same(model, users, x)
    torch.testing.assert_close(dict(model.state_dict()), dict(users.state_dict()))


def test_parametrizations() -> None:
    users = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), RowNorm(8))
    nn.utils.parametrizations.weight_norm(users[0], "bias", dim=0)
    model = bnrewrite.optimize(copy.deepcopy(users), backend="eager")
    for _ in range(3):
        x = torch.randn(4, 8)
        for each in (users, model):
            torch.autograd.backward(each(x).pow(3).sum())
        same(model, users, x)
    for mine, theirs in zip(model.parameters(), users.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_threads() -> None:
    model = optimised().eval()
    users = Net().eval()
    users.load_state_dict(model.state_dict())
    x = images()
    results: list[Tensor] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(5):
                results.append(model(x))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    for result in results:
        torch.testing.assert_close(result, users(x), rtol=1e-4, atol=1e-5)


def test_an_optimised_model_can_be_traced_scripted_and_exported() -> None:
    model = bnrewrite.optimize(RowNorm(8), backend="eager")
    x = torch.randn(2, 8)
    expected = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        trace: Any = torch.jit.trace
        torch.testing.assert_close(trace(model, x)(x), expected)
    for strict in (True, False):
        program = torch.export.export(model, (x,), strict=strict)
        torch.testing.assert_close(program.module()(x), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)


def test_vmap_runs_the_users_code() -> None:
    users = RowNorm(8)
    model = bnrewrite.optimize(copy.deepcopy(users), backend="eager")
    x = torch.randn(5, 3, 8)
    torch.testing.assert_close(torch.vmap(model)(x), torch.vmap(users)(x))
    torch.testing.assert_close(
        torch.func.grad(lambda x: model(x).pow(3).sum())(x),
        torch.func.grad(lambda x: users(x).pow(3).sum())(x),
    )
    fast = bnrewrite.optimize(row_norm, backend="eager")
    torch.testing.assert_close(torch.vmap(fast)(x), torch.vmap(row_norm)(x))


def test_functional_call() -> None:
    users = RowNorm(8)
    model = bnrewrite.optimize(copy.deepcopy(users), backend="eager")
    x = torch.randn(3, 8)
    weights = {name: torch.randn(8) for name, _ in users.named_parameters()}
    torch.testing.assert_close(
        torch.func.functional_call(model, weights, (x,)),
        torch.func.functional_call(users, weights, (x,)),
    )


def test_double_backward() -> None:
    users = RowNorm(8).double()
    model = bnrewrite.optimize(copy.deepcopy(users), backend="eager")
    x = torch.randn(3, 8, dtype=torch.double, requires_grad=True)
    second = []
    for each in (users, model):
        (first,) = torch.autograd.grad(each(x).pow(3).sum(), x, create_graph=True)
        second.append(torch.autograd.grad(first.pow(2).sum(), x)[0])
    torch.testing.assert_close(second[1], second[0])


def test_many_norms_of_norms() -> None:
    """Each is one of the last one's result: what is read twice per step doubles with each."""
    layers = [RowNorm(8) for _ in range(40)]
    report = bnrewrite.explain(nn.Sequential(*layers), torch.randn(4, 8))
    assert [site.kind for site in report.sites] == ["layer_norm"] * len(layers)
