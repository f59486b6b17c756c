"""What people do with a model after it was optimised or converted gives what it gives without."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from contract import Trace, error, violation
from hand_written import Net
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

import bnrewrite

pytestmark = [
    pytest.mark.usefixtures("repeatable"),
    pytest.mark.filterwarnings("error::bnrewrite.BnrewriteWarning"),
]

Batches = list[Tensor]


def batches(dtype: torch.dtype) -> Batches:
    source = torch.Generator().manual_seed(3)
    return [torch.randn(4, 3, 8, 8, generator=source).to(dtype) for _ in range(4)]


def optimised(model: nn.Module) -> nn.Module:
    return bnrewrite.optimize(model, backend="eager")


def converted(model: nn.Module) -> nn.Module:
    template = copy.deepcopy(native_net())
    template.load_state_dict(model.state_dict())
    return template


@cache
def native_net() -> nn.Module:
    conversion = bnrewrite.convert(Net(update="rebind detached"), batches(torch.float32)[0])
    assert len(conversion.converted) == 1
    return conversion.model


WAYS = pytest.mark.parametrize("way", [optimised, converted])


class Training:
    """Steps of SGD on squares of what a model gives."""

    def __init__(self, model: nn.Module, scaler: torch.amp.GradScaler | None = None) -> None:
        self.model = model
        self.optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
        self.scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)

    def step(self, x: Tensor, factor: float = 1.0) -> None:
        self.optimiser.zero_grad()
        weights = torch.linspace(0.5, 1.5, 4, dtype=x.dtype).view(1, 4, 1, 1)
        loss = ((self.model.train()(x) - 0.3) ** 2 * weights).mean() * factor
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimiser)
        self.scaler.update()


def seen(model: nn.Module, x: Tensor, lead: str = "") -> Trace:
    """Everything that a model has, and what it gives in evaluation."""
    values = {f"{lead}{key}": each.detach().clone() for key, each in model.state_dict().items()}
    with torch.no_grad():
        return {**values, f"{lead}output": model.eval()(x)}


def averaged(model: nn.Module, given: Batches) -> Trace:
    training, average = Training(model), AveragedModel(model, use_buffers=True)
    for x in given:
        training.step(x)
        average.update_parameters(model)
    return seen(model, given[0]) | seen(average.module, given[0], "average ")


def copied(model: nn.Module, given: Batches) -> Trace:
    Training(model).step(given[0])
    twin = copy.deepcopy(model)
    Training(twin).step(given[1])
    return seen(model, given[2]) | seen(twin, given[2], "copy ")


def saved(model: nn.Module, given: Batches) -> Trace:
    Training(model).step(given[0])
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    Training(loaded).step(given[1])
    return seen(loaded, given[2])


def scaled(model: nn.Module, given: Batches) -> Trace:
    """The second batch overflows: its step is skipped, its statistics are not."""
    training = Training(model, torch.amp.GradScaler("cpu", init_scale=64.0))
    training.step(given[0])
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    statistics = model.get_buffer("norm.running_mean").clone()
    training.step(given[1], float("inf"))
    for name, each in model.named_parameters():
        assert torch.equal(each, before[name])
    assert not torch.equal(model.get_buffer("norm.running_mean"), statistics)
    training.step(given[2])
    return seen(model, given[3])


def channels_last(model: nn.Module, given: Batches) -> Trace:
    Training(model).step(given[0])
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    Training(model).step(given[1].contiguous(memory_format=torch.channels_last))
    return seen(model, given[2])


def halved(model: nn.Module, given: Batches) -> Trace:
    """In evaluation; the exact run rounds its weights too, and computes with what they are then."""
    dtype = given[0].dtype
    Training(model).step(given[0])
    rounded = {key: each.half() for key, each in model.state_dict().items()}
    model.half()
    assert model.get_buffer("norm.running_mean").dtype == torch.float16
    if dtype == torch.float64:
        model.double().load_state_dict({key: each.double() for key, each in rounded.items()})
        return {"output": seen(model, given[1].half().double())["output"]}
    return {"output": seen(model, given[1].half())["output"]}


STORIES = [averaged, copied, saved, scaled, channels_last, halved]


@WAYS
@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
def test_a_story_ends_as_it_does_without(
    story: Callable[[nn.Module, Batches], Trace],
    way: Callable[[nn.Module], nn.Module],
    compiled_graphs: list[int],
) -> None:
    original = Net(update="rebind detached")
    x, wide = batches(torch.float32), batches(torch.float32)
    exact = story(copy.deepcopy(original).double(), [each.double() for each in wide])
    user = story(copy.deepcopy(original), x)
    mine = story(way(copy.deepcopy(original)), x)
    assert list(mine) == list(user)
    assert any(compiled_graphs) == (way is optimised)
    found = [
        violation(key, mine[key], user[key], exact[key].double(), error(user[key], exact[key]))
        for key in user
    ]
    assert [each for each in found if each] == []


def test_update_bn_leaves_hand_written_norms_and_finds_converted_ones() -> None:
    given: Any = batches(torch.float32)
    original = Net(update="rebind detached")
    native: Any = copy.deepcopy(original)
    native.norm = nn.BatchNorm2d(4)
    native.load_state_dict(original.state_dict())
    update_bn(given, native)
    models = {way: way(copy.deepcopy(original)) for way in (optimised, converted)}
    for model in models.values():
        update_bn(given, model)
    before = original.state_dict()
    for key, value in models[optimised].state_dict().items():
        assert torch.equal(value, before[key])  # as with the user's own: it is no nn.BatchNorm2d
    for key, value in models[converted].state_dict().items():
        assert torch.equal(value, native.state_dict()[key])
