"""A constant affine behind a linear map goes into its weight, or the report says why not."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from behind_linear_maps import (
    EPS,
    KINDS,
    NORMS,
    Formula,
    Normed,
    broken_promise,
    centred,
    folded_as_constants,
    notes,
)
from hand_written import Layer
from torch import Tensor, nn

import bnrewrite
from bnrewrite.capture import capture
from bnrewrite.options import Options
from bnrewrite.passes import rewrite

pytestmark = pytest.mark.filterwarnings("error::bnrewrite.BnrewriteWarning")

BOTH = ("conv2d", "conv_transpose2d in groups", "linear", "product and sum")  # biases
PAIRS = [
    *((kind, "centred", True) for kind in KINDS),
    *((kind, "centred", False) for kind in BOTH),
    *(("conv2d", norm, False) for norm in NORMS if norm != "centred"),
    *(("conv_transpose2d in groups", norm, True) for norm in NORMS if norm != "centred"),
]


@pytest.mark.parametrize(("kind", "norm", "bias"), PAIRS)
def test_a_norm_is_folded_into_constants(kind: str, norm: str, bias: bool) -> None:
    model = Normed(kind, NORMS[norm], bias).eval()
    x = model.inputs()
    sites, found, graph = folded_as_constants(model, x)
    assert [(site.kind, site.status, site.lowering) for site in sites] == [
        ("affine", "rewritten", "fold")
    ], sites
    assert broken_promise(model, found, x) is None
    for name in ("sqrt", "add", "mul", "sub", "div", "batch_norm", "addcmul"):
        assert f"aten.{name}" not in graph


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("kind", "norm", "bias"), PAIRS)
def test_a_norm_is_folded_in_eager_mode(
    kind: str, norm: str, bias: bool, computed: list[bool]
) -> None:
    users = Normed(kind, NORMS[norm], bias).eval()
    model = bnrewrite.optimize(copy.deepcopy(users))
    for seed, _ in itertools.product((1, 2), range(2)):
        x = users.inputs(seed)
        with torch.no_grad():
            found = model(x)
        assert found.stride() == users(x).stride()
        assert broken_promise(users, found, x) is None
    assert computed == [True]


class Grouped(Normed):
    """One mean and one variance for each pair of channels, a weight for each channel."""

    def __init__(self) -> None:
        super().__init__("conv2d", by_pairs)
        self.pair_mean: Tensor
        self.pair_variance: Tensor
        self.register_buffer("pair_mean", torch.tensor([0.5, -1.0, 2.0]))
        self.register_buffer("pair_variance", torch.tensor([0.5, 1.0, 2.0]))


def by_pairs(m: Normed, y: Tensor) -> Tensor:
    assert isinstance(m, Grouped)
    mean, variance = (each.view(3, 1, 1, 1) for each in (m.pair_mean, m.pair_variance))
    pairs = (y.view(len(y), 3, 2, *y.shape[2:]) - mean) * torch.rsqrt(variance + EPS)
    return pairs.flatten(1, 2) * m.along(m.weight) + m.along(m.bias)


@pytest.mark.usefixtures("small")
def test_an_affine_of_groups_of_channels(computed: list[bool]) -> None:
    users = Grouped().eval()
    sites, found, _ = folded_as_constants(users, users.inputs())
    assert sites[0].lowering == "fold"
    assert broken_promise(users, found, users.inputs()) is None
    model = bnrewrite.optimize(copy.deepcopy(users))
    with torch.no_grad():
        assert broken_promise(users, model(users.inputs()), users.inputs()) is None
    assert computed[-1]


@pytest.mark.usefixtures("small")
def test_under_autocast_the_affine_has_another_dtype() -> None:
    users = Normed("conv2d", centred).eval()
    model, x = bnrewrite.optimize(copy.deepcopy(users)), users.inputs()
    with torch.autocast("cpu", torch.bfloat16):
        (note,) = notes(users, x)
        with torch.no_grad():
            found, expected = model(x), users(x)
    assert note == (
        "not folded into the conv2d before it: its result is bfloat16, that of the affine float32"
    )
    assert found.dtype == expected.dtype == torch.float32
    assert (found - expected).abs().max() <= torch.finfo(torch.float32).eps * expected.abs().max()


class Chain(Layer):
    """Shared weights, a shared norm, results that are read twice, sizes that are read."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        self.second = nn.Conv2d(8, 8, 3, bias=False)
        self.mean: Tensor
        self.variance: Tensor
        for name in ("mean", "variance"):
            self.register_buffer(name, torch.rand(8) + 0.5)
        self.weight = nn.Parameter(torch.rand(8) + 0.5)
        self.bias = nn.Parameter(torch.rand(8))

    def normed(self, y: Tensor) -> Tensor:
        mean, variance, weight, bias = (
            each.view(-1, 1, 1) for each in (self.mean, self.variance, self.weight, self.bias)
        )
        return (y - mean) / torch.sqrt(variance + 1e-3) * weight + bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        height, width = y.shape[-2:]
        y = torch.relu_(self.normed(y))
        once = self.normed(self.second(y))
        again = self.normed(self.second(once))
        return F.interpolate(again, (height, width)) + y + once.mean()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dynamic", [False, True])
def test_shared_weights_norms_and_sizes(dynamic: bool, computed: list[bool]) -> None:
    users = Chain().eval()
    model = bnrewrite.optimize(copy.deepcopy(users), dynamic=dynamic)
    for size in (9, 9, 11, 8):
        x = torch.randn(2, 3, size, size + 1)
        with torch.no_grad():
            assert broken_promise(users, model(x), x) is None
    graphs = 1 if dynamic else 3
    assert computed == [True] * 3 * graphs
    with torch.no_grad():
        sites = bnrewrite.explain(model, x).sites
    assert [site.lowering for site in sites] == ["fold"] * 3


def test_a_shared_norm_as_constants() -> None:
    model, x = Chain().eval(), torch.randn(2, 3, 9, 8)
    sites, found, graph = folded_as_constants(model, x)
    assert [site.lowering for site in sites] == ["fold"] * 3
    assert "folded_weight_2" in graph
    assert broken_promise(model, found, x) is None


def moved_to_rows(m: Normed, y: Tensor) -> Tensor:
    rows = y.flatten(2).transpose(1, 2)
    return (rows - m.mean) / torch.sqrt(m.variance + 1e-3) * m.weight + m.bias


def transposed(m: Normed, y: Tensor) -> Tensor:
    return centred(m, y.transpose(2, 3).contiguous())


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("norm", [moved_to_rows, transposed])
def test_a_result_that_is_rearranged_is_folded_into_constants(norm: Formula) -> None:
    model = Normed("conv2d", norm).eval()
    x = torch.randn(2, 4, 7, 7)  # square: only the axes tell one side from the other
    sites, found, graph = folded_as_constants(model, x)
    assert sites[0].lowering == "fold"
    assert broken_promise(model, found, x) is None
    assert "aten.div" not in graph
    assert notes(copy.deepcopy(model), x)[0].endswith("its result is rearranged before the affine")


def used_elsewhere(m: Normed, y: Tensor) -> Tensor:
    return centred(m, y) + y.tanh()


def along_another_axis(m: Normed, y: Tensor) -> Tensor:
    return (y - m.other_mean[:, None]) / torch.sqrt(m.other_variance[:, None] + EPS)


def by_its_own_scale(m: Normed, y: Tensor) -> Tensor:
    return (y + m.along(m.mean)) * m.along(m.weight)


def updated(m: Normed, y: Tensor) -> Tensor:
    m.all_mean.add_(1.0)
    return (y - m.all_mean) / torch.sqrt(m.along(m.variance) + EPS)


def widened(m: Normed, y: Tensor) -> Tensor:
    return centred(m, y.double())


PREFIX = "not folded into the {} before it: "


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("kind", "norm", "reason"),
    [
        ("conv2d", used_elsewhere, "its result is used elsewhere too"),
        ("linear", used_elsewhere, "its result is used elsewhere too"),
        (
            "linear of a sequence",
            along_another_axis,
            "the affine runs along other axes than its outputs",
        ),
        ("conv2d", updated, "the graph itself updates all_mean"),
        ("conv2d", widened, "its result is float32, that of the affine float64"),
        ("conv2d", by_its_own_scale, "its centre is of unknown size beside the deviation"),
        ("conv2d", moved_to_rows, "its result is rearranged before the affine"),
    ],
)
def test_what_is_not_folded(kind: str, norm: Formula, reason: str) -> None:
    users = Normed(kind, norm).eval()
    x = users.inputs()
    expected = PREFIX.format(kind.split()[0]) + reason
    assert notes(copy.deepcopy(users), x) == [expected]
    model = bnrewrite.optimize(copy.deepcopy(users))
    with torch.no_grad():
        torch.testing.assert_close(model(x), copy.deepcopy(users)(x))
    if norm not in (moved_to_rows, updated):
        sites, found, _ = folded_as_constants(users, x)
        assert (sites[0].lowering, sites[0].notes) == ("composite", (expected,))
        assert broken_promise(users, found, x) is None


@pytest.mark.parametrize(
    ("switches", "reason"),
    [
        ({}, "comparing its weight of 216 elements costs more than it saves on 240"),
        ({"backend": "aot_eager"}, "its parameters may change between two calls"),
        ({"backend": "inductor"}, "its parameters may change between two calls"),
        ({"kernels": "native"}, 'kernels="native" asks for another lowering'),
    ],
)
def test_where_nothing_is_folded(switches: dict[str, str], reason: str) -> None:
    model = Normed("conv2d", centred).eval()
    assert notes(model, model.inputs(), **switches) == [PREFIX.format("conv2d") + reason]


def test_on_a_device_that_would_have_to_be_waited_for() -> None:
    model = Normed("conv2d", centred).eval().to("meta")
    assert notes(model, model.inputs().to("meta")) == [
        PREFIX.format("conv2d") + "looking at its weight would wait for the meta device"
    ]


@pytest.mark.usefixtures("small")
def test_parameters_with_gradients_are_not_folded(computed: list[bool]) -> None:
    users = Normed("conv2d", centred).eval()
    model, x = bnrewrite.optimize(copy.deepcopy(users)), users.inputs()
    (site,) = bnrewrite.explain(model, x).sites
    assert site.notes == (PREFIX.format("conv2d") + "filters requires a gradient here",)
    for call in (model, users):
        torch.autograd.backward(call(x).square().sum())
    assert model.filters.grad is not None
    torch.testing.assert_close(model.filters.grad, users.filters.grad)
    assert not computed


@pytest.mark.usefixtures("small")
def test_the_gradient_of_the_input_alone(computed: list[bool]) -> None:
    users = Normed("conv2d", centred).eval().requires_grad_(False)
    model, wide = bnrewrite.optimize(copy.deepcopy(users)), copy.deepcopy(users).double()
    grads: list[Tensor] = []
    for call, dtype in ((wide, torch.float64), (users, torch.float32), (model, torch.float32)):
        x = users.inputs().to(dtype).requires_grad_()
        y = call(x)
        cotangent = torch.linspace(-1, 1, y.numel()).to(dtype).view(y.shape)
        grads += torch.autograd.grad(y, x, cotangent)
    exact, expected, found = grads
    floor = torch.finfo(torch.float32).eps * exact.abs().max()
    assert (found - exact).abs().max() <= 3 * (expected - exact).abs().max() + floor
    assert computed == [True]


def partly_without_gradients(m: Normed, y: Tensor) -> Tensor:
    with torch.no_grad():
        y = centred(m, y)
    return y * 2


def test_gradients_that_are_switched_off_inside() -> None:
    model = Normed("conv2d", partly_without_gradients).eval().requires_grad_(False)
    (site,) = bnrewrite.explain(model, model.inputs().requires_grad_()).sites
    assert site.notes == (
        PREFIX.format("conv2d") + "gradients are switched off for a part of the graph",
    )


class Given(Layer):
    """A linear map whose weight is an input, or whose affine is."""

    mean: Tensor
    variance: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.rand(6))
        self.register_buffer("variance", torch.rand(6))

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return (F.linear(x, weight) - self.mean) / torch.sqrt(self.variance + EPS)


def test_a_weight_that_is_an_input() -> None:
    reason = PREFIX.format("linear") + "it is not made of parameters and buffers alone"
    assert notes(Given().eval(), torch.randn(5, 4), torch.randn(6, 4)) == [reason]


def test_a_norm_before_the_linear_map_stays() -> None:
    norm = Normed("linear", centred).eval()
    model = nn.Sequential(nn.Tanh(), Before(norm), nn.Linear(6, 4)).eval()
    assert notes(model, torch.randn(5, 6)) == []


class Before(Layer):
    def __init__(self, norm: Normed) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return centred(self.norm, x)


def test_disabled() -> None:
    model = Normed("conv2d", centred).eval()
    assert notes(model, model.inputs(), disable="fold") == []


def test_constants_without_values() -> None:
    model = Normed("conv2d", centred).eval()
    with torch.no_grad():
        (canonical,) = capture(model, model.inputs())
        (site,) = rewrite(canonical, Options(stage="export"), {})
    assert site.notes == (PREFIX.format("conv2d") + "its parameters have no values here",)
