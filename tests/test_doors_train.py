"""Scripted modules in training: a module that Python runs, with both modes and every method."""

import copy
import math
import warnings
from typing import Any, NamedTuple

import pytest
import torch
from contract import contract_violations
from door_models import BatchNorm, LayerNorm, Net, images, reloaded, script
from torch import Tensor, nn

import bnrewrite
from bnrewrite import doors
from bnrewrite.doors.module import plain_module
from bnrewrite.doors.plain import Untranslatable
from bnrewrite.doors.statements import checked_name

pytestmark = [
    pytest.mark.usefixtures("repeatable"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.mark.parametrize("rebinds", [False, True])
def test_training_is_the_users_and_faster(rebinds: bool, compiled_graphs: list[int]) -> None:
    users = Net(BatchNorm(4, rebinds)).train()
    scripted = script(copy.deepcopy(users))
    model = bnrewrite.optimize(scripted, backend="eager")
    assert isinstance(model, nn.Module)
    assert not isinstance(model, torch.jit.ScriptModule)
    assert list(model.state_dict()) == list(users.state_dict())
    steps = [images(), images(5), images(), images()]
    assert (
        contract_violations(
            users,
            lambda given: bnrewrite.optimize(plain(given), backend="eager"),
            steps,
        )
        == []
    )
    model(images())
    model.eval()(images())
    assert compiled_graphs
    assert set(compiled_graphs) == {1}


def plain(users: nn.Module) -> Any:
    """A module from TorchScript with the very tensors of a module."""
    model = plain_module(script(users))
    for name, buffer in users.named_buffers():
        owner, _, last = name.rpartition(".")
        model.get_submodule(owner)._buffers[last] = buffer
    _Following(users, model)
    return model


class _Following:
    """Lets a module follow another one's mode."""

    def __init__(self, users: nn.Module, model: nn.Module) -> None:
        train = users.train

        def both(mode: bool = True) -> nn.Module:
            model.train(mode)
            return train(mode)

        users.train = both  # type: ignore[method-assign]


def test_the_parameters_are_the_scripted_modules() -> None:
    scripted = script(Net(BatchNorm(4)))
    model = bnrewrite.optimize(scripted)
    for mine, other in zip(scripted.parameters(), model.parameters(), strict=True):
        assert mine is other
    loaded = reloaded(scripted)
    for mine, other in zip(
        loaded.parameters(), bnrewrite.optimize(loaded).parameters(), strict=True
    ):
        assert mine.data_ptr() == other.data_ptr()
        assert isinstance(other, nn.Parameter)


class Everything(nn.Module):
    """Loops, lists, dictionaries, numbers, branches on data, methods, a mode for gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([LayerNorm(6), LayerNorm(6)])
        self.names = ["a", "b"]
        self.scale = 3
        self.last = torch.zeros(1)

    def forward(self, x: Tensor, times: int = 2, bias: Tensor | None = None) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        rows: list[Tensor] = []
        for norm in self.norms:
            x = norm(x)
            rows.append(x)
        for i in range(times):
            x = x + rows[i % len(rows)] * float(i) / self.scale
        count = 0
        while bool(x.abs().max() > 1.0) and count < 4:
            x = x / 2
            count += 1
        if bias is not None:
            x = x + bias
        with torch.no_grad():
            self.last = x.sum().reshape(1)
        if x.size(0) == 1 and not x.is_floating_point():
            raise ValueError("one row of numbers")
        for i, name in enumerate(self.names):
            found[name] = self.shifted(rows[i], i + 1)
        found["x"] = x.to(torch.float64).reshape(x.shape[0], -1)[:, ::2]
        return found

    def shifted(self, x: Tensor, by: int) -> Tensor:
        return torch.cat([x[:, by:], x[:, :by]], dim=1) + torch.zeros(x.shape, dtype=x.dtype)


def test_every_construct_computes_the_same() -> None:
    users = Everything()
    scripted = script(users)
    for each in (scripted, reloaded(scripted)):
        model = plain_module(each)
        for given in ((torch.randn(3, 6),), (torch.randn(1, 6), 5, torch.ones(6))):
            expected, found = scripted(*given), model(*given)
            assert expected.keys() == found.keys()
            for name, value in expected.items():
                assert found[name].dtype == value.dtype
                torch.testing.assert_close(found[name], value, rtol=0, atol=0)
            torch.testing.assert_close(model.last, scripted.last)
        assert model(torch.randn(3, 6), bias=torch.ones(6), times=0).keys() == found.keys()
        assert model.scale == 3


class Arithmetic(nn.Module):
    """What TorchScript computes itself, without ATen."""

    def forward(self, x: Tensor, n: int, f: float) -> list[Tensor]:
        whole = [n // 3, -n // 3, n % 3, -n % 3, n & 3, n << 2, int(-2.5), int(f), math.floor(-2.5)]
        broken = [n**2 / 7, 2.0**n, float(n) ** -1, f // 0.3, f % 0.3, n * f, math.sqrt(n), n / 2]
        numbers = [1, 2, 3, 4, 5]
        same = numbers
        same.append(n)
        same += numbers[1:-1] + numbers[::2] + numbers[-2:] + [0] * n
        same[1] = max(n, 3) + min([n, 2, 9]) + abs(-n)
        found = {"a": 1, "b": n}
        found["c"] = len(found)
        total = int("b" in found) + int(n in [1, 5])
        for key in found:
            total = total * 2 + found[key]
        for i in range(10, 0, -3):
            if i == 4:
                continue
            total = total * 10 + i
        left = n
        while left > 0:
            left -= 2
            if total > 10**6:
                break
            total += left * left
        pair = (n, [1, n])
        first, rest = pair
        y = x.clone()
        y += first + rest[1] + total
        y[0] = 5
        y[:, 1] *= 3
        y = y if n > 3 and not f > 0.9 else -y
        rows = [[i] * 2 for i in range(3)]
        return [
            torch.tensor(whole),
            torch.tensor(broken),
            torch.tensor(numbers),
            y,
            torch.tensor(rows),
        ]


def test_numbers_and_containers_are_computed_the_same() -> None:
    scripted = script(Arithmetic())
    for each in (scripted, reloaded(scripted)):
        model = plain_module(each)
        for n, f in ((5, 0.7), (3, 2.3)):
            x = torch.randn(2, 2)
            for mine, other in zip(scripted(x, n, f), model(x, n, f), strict=True):
                torch.testing.assert_close(other, mine, rtol=0, atol=0)


def test_the_copy_has_tensors_of_its_own() -> None:
    model = plain_module(script(Net(BatchNorm(4))))
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.conv.weight.zero_()  # type: ignore[operator, union-attr]
    assert model.conv.weight.abs().sum() > 0  # type: ignore[operator, union-attr]


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


class Naming(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        print(x)
        return x


class Tupled(nn.Module):
    def forward(self, x: Tensor) -> Pair:
        return Pair(x, x)


class Inner(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y


def hooked() -> nn.Module:
    model = LayerNorm(6)

    def twice(self: LayerNorm, given: tuple[Tensor], result: Tensor) -> Tensor:
        return result * 2

    model.register_forward_hook(twice)
    return model


@pytest.mark.parametrize(
    ("users", "sentence"),
    [
        (Inner(hooked()), "inner: it has hooks"),
        (Naming(), "the module: it calls prim::Print"),
        (Inner(Naming()), "inner: it calls prim::Print"),
        (Tupled(), "it makes a named tuple"),
    ],
)
def test_what_has_no_form_is_told(users: nn.Module, sentence: str) -> None:
    scripted = script(users)
    with pytest.raises(Untranslatable, match=sentence):
        plain_module(scripted)
    with pytest.raises(TypeError, match=sentence):
        bnrewrite.optimize(scripted)
    with pytest.raises(TypeError, match=sentence):
        doors.open(scripted)


@pytest.mark.parametrize("name", ["__class__", "class", "a b", "x');print('", "_parameters"])
def test_a_name_that_would_be_more_than_a_name_is_refused(name: str) -> None:
    with pytest.raises(Untranslatable, match="cannot stand for itself in a Python module"):
        checked_name(name)


def test_explain_in_training_names_the_users_lines() -> None:
    scripted = script(Net(BatchNorm(4)))
    before = {name: value.clone() for name, value in scripted.state_dict().items()}
    report = bnrewrite.explain(scripted, images())
    assert [(site.kind, site.status) for site in report.sites] == [("batch_norm", "rewritten")]
    assert report.sites[0].source.startswith("door_models.py:")
    assert {finding.name for finding in report.findings} == {"buffer-rebound"}
    for name, value in scripted.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_what_is_opened_is_a_module() -> None:
    users = Net(BatchNorm(4)).eval()
    opened = doors.open(script(users))
    torch.testing.assert_close(opened.module(images(2))[0].shape, users(images(2))[0].shape)
    assert opened.program is None
    program = torch.export.export(users, (images(),))
    opened = doors.open(program)
    (x,) = opened.example_inputs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(opened.module(x)[0], users(x)[0])
    assert opened.program is program
