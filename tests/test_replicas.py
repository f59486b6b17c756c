"""DataParallel: replicas run with their own tensors, the first one's statistics are the model's."""

from __future__ import annotations

import copy
import threading
import warnings
from typing import Any

import pytest
import torch
from hand_written import Net, images
from torch import Tensor, nn

import bnrewrite


@pytest.fixture(autouse=True)
def _repeatable(repeatable: None) -> None:
    """Each test starts from the same numbers."""


def replicas(model: Any, count: int) -> list[Any]:
    """What DataParallel makes of a model: the first shares the buffers' memory, others copy it.

    On a machine without devices; parameters are results of a differentiable broadcast there too.
    """
    found = []
    for number in range(count):
        twins = {each: each._replicate_for_data_parallel() for each in model.modules()}
        for module, twin in twins.items():
            for name, child in module._modules.items():
                setattr(twin, name, twins[child])
            for name, parameter in module._parameters.items():
                setattr(twin, name, None if parameter is None else parameter.view_as(parameter))
            for name, buffer in module._buffers.items():
                twin._buffers[name] = buffer.clone() if number else buffer.detach()
        found.append(twins[model])
    return found


def in_threads(models: list[Any], xs: list[Tensor]) -> list[Tensor]:
    """All replicas at once, as DataParallel calls them."""
    found: dict[int, Tensor] = {}

    def call(i: int) -> None:
        found[i] = models[i](xs[i])

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(models))]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
    return [found[i] for i in range(len(models))]


@pytest.mark.filterwarnings("ignore::bnrewrite.BnrewriteWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_replicas_give_outputs_gradients_and_the_first_ones_statistics(
    backend: str, compiled_graphs: list[int]
) -> None:
    users = Net(update="rebind").double()
    model = bnrewrite.optimize(copy.deepcopy(users), backend=backend)
    native = copy.deepcopy(users)
    native.norm = nn.BatchNorm2d(4).double()  # type: ignore[assignment]
    native.load_state_dict(users.state_dict())
    for _ in range(2):
        xs = [images().double() for _ in range(2)]
        for each in (model, native):
            outputs = in_threads(replicas(each, 2), xs)
            torch.autograd.backward(torch.cat(outputs).pow(3).sum())
    assert compiled_graphs
    assert 0 not in compiled_graphs
    torch.testing.assert_close(dict(model.state_dict()), dict(native.state_dict()))
    for mine, its in zip(model.parameters(), native.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad)


@pytest.mark.filterwarnings("ignore::bnrewrite.BnrewriteWarning")
def test_a_replica_computes_with_its_own_parameters() -> None:
    model = bnrewrite.optimize(Net(), backend="eager")
    x = images()
    model(x)
    (replica,) = replicas(model, 1)
    replica.norm.weight = torch.full((4,), 7.0)
    users = Net()
    users.load_state_dict(model.state_dict())
    users.norm.weight.data.fill_(7.0)
    torch.testing.assert_close(replica(x), users(x), rtol=1e-4, atol=1e-5)


def test_statistics_that_replicas_discard_are_reported_once() -> None:
    model = bnrewrite.optimize(Net(), backend="eager")
    first, second = replicas(model, 2)
    with pytest.warns(
        bnrewrite.BnrewriteWarning, match="keeps the running statistics of its first"
    ):
        first(images())
    with warnings.catch_warnings():
        warnings.simplefilter("error", bnrewrite.BnrewriteWarning)
        second(images())


def test_replicas_without_anything_to_lose_are_not_reported() -> None:
    stateless = bnrewrite.optimize(nn.Sequential(nn.Linear(4, 4)), backend="eager")
    evaluated = bnrewrite.optimize(Net().eval(), backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", bnrewrite.BnrewriteWarning)
        replicas(stateless, 1)[0](torch.randn(2, 4))
        replicas(evaluated, 1)[0](images())
