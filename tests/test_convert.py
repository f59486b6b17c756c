"""Norm modules that are equal to a native one become it; all others stay, and say why."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from contract import contract_violations
from convertible import Bare, Groups, Instances, RootMeanSquare, Tracking
from hand_written import BatchNorm, RowNorm
from test_thread import ReferenceBatchNorm2d
from torch import Tensor, nn
from torch.nn.utils import prune
from unconvertible import STAYING, UNEQUAL

import bnrewrite
from bnrewrite.capture.canonical import canonicalise

pytestmark = pytest.mark.usefixtures("repeatable")

ROWS, IMAGES = (5, 7, 4), (5, 4, 6, 3)
EQUAL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], nn.Module]] = {
    "batch": (lambda: BatchNorm(4), IMAGES, nn.BatchNorm2d(4)),
    "batch of rows": (lambda: BatchNorm(4), (5, 4), nn.BatchNorm1d(4)),
    "batch of volumes": (lambda: BatchNorm(4), (3, 4, 2, 3, 2), nn.BatchNorm3d(4)),
    "without a counter": (lambda: Tracking(4), IMAGES, nn.BatchNorm2d(4)),
    "a subclass": (lambda: ReferenceBatchNorm2d(4, momentum=0.3), IMAGES,
                   nn.BatchNorm2d(4, momentum=0.3)),
    "one position": (lambda: Tracking(4), (5, 4, 1, 1), nn.BatchNorm2d(4)),
    "layer": (lambda: RowNorm(4), ROWS, nn.LayerNorm(4)),
    "layer without parameters": (Bare, ROWS, nn.LayerNorm(4, 1e-6, False)),
    "rms": (lambda: RootMeanSquare(4), ROWS, nn.RMSNorm(4, 1e-6)),
    "group": (lambda: Groups(4), IMAGES, nn.GroupNorm(2, 4)),
    "instance": (lambda: Instances(4), IMAGES, nn.InstanceNorm2d(4, 1e-3, affine=True)),
}  # fmt: skip


class Between(nn.Module):
    """A norm between two things that are none."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.scale = nn.Parameter(torch.rand(1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x * self.scale)
        return torch.sin(y)


class Each(nn.Module):
    """Calls each norm with an input of its own."""

    def __init__(self, norms: dict[str, nn.Module]) -> None:
        super().__init__()
        self.norms = nn.ModuleDict(norms)

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.norms[name](x) for name, x in inputs.items()}


def test_equal_modules_become_native() -> None:
    model = Each({name: make() for name, (make, _, _) in EQUAL.items()}).train()
    model.norms["layer"].eval()
    x = {name: torch.randn(shape) for name, (_, shape, _) in EQUAL.items()}
    before = model.state_dict(keep_vars=True)
    conversion = bnrewrite.convert(model, x)
    assert conversion.model is model
    assert {each.name.removeprefix("norms."): each.reason for each in conversion} == dict.fromkeys(
        EQUAL
    )
    for name, (_, _, native) in EQUAL.items():
        assert type(model.norms[name]) is type(native), name
        assert repr(model.norms[name]) == repr(native)
        assert model.norms[name].training == (name != "layer")
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[key] is before[key] for key in before)


@pytest.mark.parametrize("name", ["batch", "group"])
def test_a_converted_model_keeps_the_contract(name: str) -> None:
    make, shape, _ = EQUAL[name]
    batches = [torch.randn(shape) for _ in range(4)]
    converted = lambda model: bnrewrite.convert(model, batches[0]).model  # noqa: E731
    assert contract_violations(Between(make()), converted, batches) == []


def reasons(makes: Mapping[str, Callable[[], nn.Module]], x: Tensor) -> dict[str, str]:
    """Why modules stay, by name; none of them is replaced."""
    keys = {f"{name}_norm".replace(" ", "_"): name for name in makes}
    model = Each({key: makes[name]() for key, name in keys.items()})
    before = dict(model.norms.items())
    conversion = bnrewrite.convert(model, dict.fromkeys(keys, x))
    assert conversion.converted == ()
    assert all(model.norms[name] is each for name, each in before.items())
    assert f"0 of {len(conversion.left)} hand-written norm modules" in str(conversion)
    return {keys[each.name.removeprefix("norms.")]: str(each.reason) for each in conversion.left}


def test_what_is_not_equal_stays() -> None:
    makes = {name: partial(Tracking, 4, **{name: True}) for name in UNEQUAL}
    found = reasons(makes, torch.randn(IMAGES))
    assert list(found) == list(UNEQUAL)
    assert [name for name in found if not found[name].startswith(UNEQUAL[name])] == [], found


def test_what_has_more_than_a_formula_stays() -> None:
    found = reasons({name: make for name, (make, _) in STAYING.items()}, torch.randn(ROWS))
    assert list(found) == list(STAYING)
    assert [name for name in found if not found[name].startswith(STAYING[name][1])] == [], found


def test_how_a_module_is_called_decides_too() -> None:
    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.named, self.unused, self.both = RowNorm(4), RowNorm(4), BatchNorm(4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.named(x=x)
            return y + self.both(x.transpose(1, 2)).transpose(1, 2) + self.both(x[:, 0])[:, None]

    conversion = bnrewrite.convert(Calls(), torch.randn(ROWS))
    reasons = {each.name: each.reason for each in conversion.left}
    assert reasons["named"] == ("it is called with x by name, which the native module has not")
    assert reasons.get("unused", "") in ("", "the model does not call it with these inputs")
    assert [each.name for each in conversion.converted] == ["both"]  # BatchNorm1d takes both ranks
    assert len(conversion) == len(conversion.converted) + len(conversion.left)


def test_a_call_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (outcome,) = bnrewrite.convert(Between(RowNorm(4)), torch.randn(ROWS))
    assert str(outcome.reason).startswith("it is called under autocast")


def test_the_model_itself_and_a_module_with_two_names() -> None:
    x = torch.randn(ROWS)
    norm = RowNorm(4)
    conversion = bnrewrite.convert(norm, x)
    assert type(conversion.model) is nn.LayerNorm
    assert conversion.model.weight is norm.weight
    twice = nn.Sequential(norm, nn.Linear(4, 4), norm)
    bnrewrite.convert(twice, x)
    assert type(twice[0]) is nn.LayerNorm
    assert twice[0] is twice[2]


def test_no_module_no_norm_and_a_model_that_raises() -> None:
    with pytest.raises(TypeError, match=r"convert takes a torch\.nn\.Module, not a function"):
        bnrewrite.convert(lambda x: x, torch.randn(2))  # type: ignore[arg-type]
    empty = bnrewrite.convert(nn.Linear(4, 4), torch.randn(2, 4))
    assert empty
    assert str(empty) == "0 of 0 hand-written norm modules converted"
    with pytest.raises(RuntimeError):
        bnrewrite.convert(Between(RowNorm(4)), torch.randn(2, 5))
    broken = Between(RowNorm(4))
    broken.lock = __import__("threading").Lock()
    with pytest.raises(TypeError, match="the model cannot be copied"):
        bnrewrite.convert(broken, torch.randn(ROWS))


def test_checkpoints_go_both_ways() -> None:
    class Extra(Tracking):
        """Has a key that nn.BatchNorm2d does not know."""

        def __init__(self, size: int) -> None:
            super().__init__(size)
            self.register_buffer("steps", torch.tensor(3))

    x = torch.randn(IMAGES)
    written = nn.Sequential(Extra(4), nn.Conv2d(4, 2, 1), Tracking(2))
    converted = copy.deepcopy(written)
    assert len(bnrewrite.convert(converted, x).converted) == 2
    file = io.BytesIO()
    with torch.no_grad():
        for value in written.state_dict().values():
            value += 1
    torch.save(written.state_dict(), file)
    file.seek(0)
    converted.load_state_dict(torch.load(file), strict=True)
    assert list(converted.state_dict()) == list(written.state_dict())
    converted(x)
    fresh = nn.Sequential(Extra(4), nn.Conv2d(4, 2, 1), Tracking(2))
    fresh.load_state_dict(converted.state_dict(), strict=True)
    assert int(fresh[0].get_buffer("steps")) == 4
    for key, value in converted.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value)
    again = pickle.loads(pickle.dumps(converted))
    again.load_state_dict(written.state_dict(), strict=True)
    assert type(again[0]) is nn.BatchNorm2d


def test_tools_see_ordinary_modules() -> None:
    x = torch.randn(IMAGES)
    model = nn.Sequential(nn.Conv2d(4, 4, 3), BatchNorm(4), nn.ReLU())
    bnrewrite.convert(model, x)
    model(x)
    expected = model.eval()(x)
    tools: Any = nn.SyncBatchNorm, torch.ao.quantization, prune  # which have no types
    synchronised = tools[0].convert_sync_batchnorm(copy.deepcopy(model))
    assert type(synchronised[1]) is nn.SyncBatchNorm
    fused = tools[1].fuse_modules(copy.deepcopy(model), [["0", "1", "2"]])
    assert type(fused[1]) is nn.Identity
    torch.testing.assert_close(fused(x), expected)
    scripted: Any = torch.jit.script(model)
    torch.testing.assert_close(scripted(x), expected)
    tools[2].random_unstructured(model[1], "weight", amount=2)
    assert torch.count_nonzero(model[1].get_buffer("weight_mask")) == 2


def test_an_optimised_model_is_converted_and_runs(compiled_graphs: list[int]) -> None:
    model = bnrewrite.optimize(nn.Sequential(RowNorm(4), nn.Linear(4, 4)), backend="eager")
    x = torch.randn(ROWS)
    expected = model(x)
    assert sum(compiled_graphs) == 1
    assert len(bnrewrite.convert(model, x).converted) == 1
    compiled_graphs.clear()
    torch.testing.assert_close(model(x), expected)
    assert compiled_graphs == [0]
    assert type(model[0]) is nn.LayerNorm


def test_modules_of_one_class_share_their_proofs(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[Any] = []

    def counted(*args: Any) -> Any:
        graphs.append(args)
        return canonicalise(*args)

    monkeypatch.setattr("bnrewrite.conversion.alone.canonicalise", counted)
    model = nn.Sequential(*(RowNorm(4) for _ in range(6)))
    assert len(bnrewrite.convert(model, torch.randn(ROWS)).converted) == 6
    assert len(graphs) == 1  # of both modes: it does not ask for the mode


def test_converting_changes_nothing_else() -> None:
    model = Between(Tracking(4))
    model.norm.note = "kept"  # type: ignore[assignment]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x, state = torch.randn(IMAGES), torch.get_rng_state()
    bnrewrite.convert(model.train(), x)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert model.norm.note == "kept"
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_numbers_are_those_of_each_module() -> None:
    class Marked(RootMeanSquare):
        offset_key = "marked"

    model: Any = nn.Sequential(Marked(4), nn.Linear(4, 8), Marked(8), nn.Linear(8, 4), Marked(4))
    model[4].variance_epsilon = 1e-3
    assert len(bnrewrite.convert(model, torch.randn(ROWS)).converted) == 3
    assert [model[i].eps for i in (0, 2, 4)] == [1e-6, 1e-6, 1e-3]
    assert [model[i].normalized_shape for i in (0, 2, 4)] == [(4,), (8,), (4,)]
    assert (model[4].variance_epsilon, model[4].offset_key) == (1e-3, "marked")
