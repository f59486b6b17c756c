"""A folded weight follows every change of what it was made of, however that is written."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from behind_linear_maps import NORMS, Normed, broken_promise, centred, notes
from hand_written import Layer
from torch import Tensor, nn

import bnrewrite
from bnrewrite.capture.look import Look
from bnrewrite.kernels import folding
from bnrewrite.kernels.folding import Folding, is_same

pytestmark = [
    pytest.mark.filterwarnings("error::bnrewrite.BnrewriteWarning"),
    pytest.mark.usefixtures("small"),
]


def the_same(model: nn.Module, users: nn.Module, seed: int = 1) -> None:
    """Both give the same without gradients, by the contract."""
    assert isinstance(users, Normed)
    x = users.inputs(seed).to(users.filters.dtype)
    with torch.no_grad():
        assert broken_promise(users, model(x), x) is None


def by_an_optimiser(m: Normed) -> None:
    torch.autograd.backward(m(m.inputs()).square().mean())
    torch.optim.Adam(m.parameters(), lr=0.1).step()
    m.zero_grad()


def by_a_fused_optimiser(m: Normed) -> None:
    torch.autograd.backward(m(m.inputs()).square().mean())
    torch.optim.SGD(m.parameters(), lr=0.1, fused=True).step()
    m.zero_grad()


def in_place(m: Normed) -> None:
    with torch.no_grad():
        m.filters.mul_(1.5)


def through_data(m: Normed) -> None:
    m.filters.data[0] += 1.0  # no version counts this


def through_numpy(m: Normed) -> None:
    m.filters.detach().numpy()[1] *= -2.0


def by_rebinding_data(m: Normed) -> None:
    m.filters.data = m.filters.data * 3.0


def of_one_bit(m: Normed) -> None:
    m.filters.data.view(torch.int32)[5, 3, 2, 2] ^= 1 << 20


def by_a_new_parameter(m: Normed) -> None:
    m.filters = nn.Parameter(m.filters.detach() + 1.0)


def by_loading(m: Normed) -> None:
    m.load_state_dict(Normed("conv2d", centred, seed=8).state_dict())


def by_loading_and_assigning(m: Normed) -> None:
    m.load_state_dict(Normed("conv2d", centred, seed=8).state_dict(), assign=True)


def of_a_statistic(m: Normed) -> None:
    m.variance.fill_(3.0)


def of_a_statistic_through_data(m: Normed) -> None:
    m.mean.data.add_(2.0)


def of_the_bias(m: Normed) -> None:
    assert m.offset is not None
    m.offset.data.zero_()


def to_negative_zero(m: Normed) -> None:
    m.filters.data.zero_().neg_()


CHANGES = (
    by_an_optimiser,
    by_a_fused_optimiser,
    in_place,
    through_data,
    through_numpy,
    by_rebinding_data,
    of_one_bit,
    by_a_new_parameter,
    by_loading,
    by_loading_and_assigning,
    of_a_statistic,
    of_a_statistic_through_data,
    of_the_bias,
    to_negative_zero,
)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change: Callable[[Normed], None], computed: list[bool]) -> None:
    users = Normed("conv2d", centred).eval()
    model = bnrewrite.optimize(copy.deepcopy(users))
    the_same(model, users)
    the_same(model, users, 2)
    assert computed == [True]
    change(model)
    change(users)
    the_same(model, users)
    the_same(model, users, 2)
    assert computed == [True, True]


def test_a_change_of_the_dtype(computed: list[bool]) -> None:
    users = Normed("conv2d", centred).eval()
    model = bnrewrite.optimize(copy.deepcopy(users))
    for dtype in (torch.float32, torch.float64, torch.float32):
        the_same(model.to(dtype), users.to(dtype))
    assert computed == [True, True]  # the first graph has kept what is right again


def test_values_that_cannot_be_folded_for_a_while(computed: list[bool]) -> None:
    users = Normed("conv2d", centred).eval()
    model = bnrewrite.optimize(copy.deepcopy(users))
    for mean in (0.0, 4096.0, 1.0, torch.nan, torch.inf, -1.0):
        for each in (model, users):
            each.mean.fill_(mean)
        the_same(model, users)
        the_same(model, users, 2)
    assert computed == [True, False, True, *[False] * 3, True]  # NaN is looked at in each call


def test_training_again(computed: list[bool]) -> None:
    users = Normed("conv2d", centred).eval()
    model = bnrewrite.optimize(copy.deepcopy(users))
    the_same(model, users)
    for _ in range(2):
        gradients = []
        for each in (model.train(), users.train()):
            optimiser = torch.optim.SGD(each.parameters(), lr=0.1)
            torch.autograd.backward(each(users.inputs(3)).square().mean())
            gradients.append([p.grad.clone() for p in each.parameters() if p.grad is not None])
            optimiser.step()
            optimiser.zero_grad()
        assert len(gradients[0]) == 4
        torch.testing.assert_close(*gradients)
        the_same(model.eval(), users.eval())
    assert computed == [True, True, True]
    torch.testing.assert_close(model.state_dict(), users.state_dict())


def test_gradients_on_and_off(computed: list[bool]) -> None:
    users = Normed("conv2d", centred).eval()
    model = bnrewrite.optimize(copy.deepcopy(users)).requires_grad_(False)
    x = users.inputs()
    assert broken_promise(users, model(x), x) is None
    assert computed == [True]
    model.requires_grad_(True)
    y = model(x)
    assert y.requires_grad
    with torch.inference_mode():
        inside = model(x)
    assert broken_promise(users, inside.clone(), x) is None
    model.requires_grad_(False)
    outside = model(x.clone().requires_grad_())  # what inference mode has kept may be saved
    torch.autograd.backward(outside.sum())


def test_parameters_made_in_inference_mode(computed: list[bool]) -> None:
    with torch.inference_mode():
        users = Normed("conv2d", centred).eval()
        model = bnrewrite.optimize(copy.deepcopy(users))
        for _ in range(2):
            model.filters.mul_(2.0)
            users.filters.mul_(2.0)
            assert broken_promise(users, model(users.inputs()).clone(), users.inputs()) is None
    assert computed == [True, True]


def test_copies_have_weights_of_their_own(computed: list[bool]) -> None:
    users = Normed("conv2d", centred).eval()
    model = bnrewrite.optimize(copy.deepcopy(users))
    the_same(model, users)
    average, other = copy.deepcopy(model), copy.deepcopy(users)
    for each in (average, other):
        each.filters.data.mul_(0.5)
    for seed in range(3):
        the_same(average, other, seed)
        the_same(model, users, seed)
    assert computed == [True, True]


def test_nothing_is_saved_with_the_model(computed: list[bool]) -> None:
    users = Normed("conv2d", centred).eval()
    grown = []
    for disable in ("fold", ()):
        model = bnrewrite.optimize(copy.deepcopy(users), disable=disable)
        before = len(pickle.dumps(model))
        the_same(model, users)
        grown.append(len(pickle.dumps(model)) - before)
    assert computed == [True]
    assert grown[0] == grown[1] < 4 * users.filters.numel()
    assert list(model.state_dict()) == list(users.state_dict())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    the_same(torch.load(file, weights_only=False), users)
    assert computed == [True, True]


def foldings(looks: list[Look]) -> list[Folding]:
    found = [look.canonical.module for look in looks if look.canonical is not None]
    return [each for module in found for each in module.modules() if isinstance(each, Folding)]


def test_what_is_kept_goes_with_the_weight(looks: list[Look]) -> None:
    users = Normed("conv2d", centred).eval()
    model = bnrewrite.optimize(copy.deepcopy(users))
    the_same(model, users)
    (each,) = foldings(looks)
    assert len(each._known) == 1
    by_a_new_parameter(model)
    by_a_new_parameter(users)
    the_same(model, users)
    gc.collect()
    assert len(each._known) == 1
    assert list(each.state_dict()) == []


def test_several_threads() -> None:
    models = [Normed("conv2d", centred, seed=seed).eval() for seed in range(2)]
    fast = [bnrewrite.optimize(copy.deepcopy(models[0]))]
    fast.append(copy.deepcopy(fast[0]))
    fast[1].load_state_dict(models[1].state_dict())
    x = models[0].inputs()
    with torch.no_grad():
        expected = [model(x) for model in models]
        fast[0](x)

    def call(number: int) -> Tensor:
        with torch.no_grad():
            return fast[number % 2](x)

    with ThreadPoolExecutor(4) as pool:
        for number, found in enumerate(pool.map(call, range(64))):
            torch.testing.assert_close(found, expected[number % 2])


def test_a_batch_too_small_to_look_at_the_weight(
    monkeypatch: pytest.MonkeyPatch, computed: list[bool]
) -> None:
    monkeypatch.setattr("bnrewrite.passes.costs.WEIGHTS", 4)
    users = Normed("conv2d", centred).eval()  # 216 numbers in the weight, 120 in each result
    model = bnrewrite.optimize(copy.deepcopy(users), dynamic=True)
    sizes = (8, 7, 8)
    for size, changes in itertools.product(sizes, (False, True)):
        for each in (model, users) if changes else ():
            in_place(each)
        x = torch.randn(size, 4, 7, 6)
        with torch.no_grad():
            assert broken_promise(users, model(x), x) is None
    assert computed == [True] * 4  # not at a batch of seven
    assert notes(Normed("conv2d", centred).eval(), torch.randn(7, 4, 7, 6)) == [
        "not folded into the conv2d before it: comparing its weight of 216 elements costs more "
        "than it saves on 840"
    ]


class Doubled(torch.autograd.Function):
    """Opaque: what stands around it is captured in two parts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        return cotangents[0] * 2


class Around(Layer):
    """Foldable norms around code that is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (Normed("conv2d", centred, seed=seed) for seed in range(2))
        self.between = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = Doubled.apply(self.first(x))  # type: ignore[no-untyped-call]
        return self.second(self.between(y))


def test_around_code_that_is_kept(computed: list[bool]) -> None:
    users = Around().eval().requires_grad_(False)
    model = bnrewrite.optimize(copy.deepcopy(users))
    gradients = []
    for each in (model, users):
        x = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(0)).requires_grad_()
        gradients.append(torch.autograd.grad(each(x).square().mean(), x)[0])
    torch.testing.assert_close(*gradients)
    assert computed == [True, True]


@pytest.mark.parametrize("norm", NORMS)
def test_through_torch_compile(norm: str, computed: list[bool]) -> None:
    users = Normed("linear", NORMS[norm]).eval()
    model = torch.compile(copy.deepcopy(users), backend="bnrewrite", options={"backend": "eager"})
    x = users.inputs()
    with torch.no_grad():
        assert broken_promise(users, model(x), x) is None
    assert computed == [True]


@pytest.mark.parametrize("large", [0, 1000])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "odd", "cut"])
def test_values_are_compared(layout: str, large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "LARGE", large)
    tensor = torch.randn(2, 4, 3, 4)
    if layout == "channels_last":
        tensor = tensor.to(memory_format=torch.channels_last)
    if layout == "odd":
        tensor = torch.randn(3, 5)
    if layout == "cut":
        tensor = torch.randn(99)[1:97].view(2, 4, 3, 4)
    kept = tensor.clone()
    assert is_same(tensor, kept)
    tensor[-1, ..., -1].add_(1.0)
    assert not is_same(tensor, kept)
    assert not is_same(kept, kept[:1])
