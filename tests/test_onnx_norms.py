"""Which operations each norm becomes, by opset, dtype and provider, and that they are right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from onnx_checks import Formula, exported
from onnx_models import ARITHMETIC, NORMS, ChannelNorm
from torch import Tensor, nn
from torch.nn import functional

CHANNELS, FEATURES, EPS = 6, 8, 1e-5


class Layer(nn.Module):
    """A norm over the last axis; `centre` makes it a LayerNorm, else it is an RMS norm."""

    def __init__(self, centre: bool, affine: str = "") -> None:
        super().__init__()
        self.centre, self.affine = centre, affine
        self.weight = nn.Parameter(torch.rand(FEATURES) + 0.5)
        self.bias = nn.Parameter(torch.randn(FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float() if self.affine else x
        if self.centre:
            y = y - y.mean(-1, keepdim=True)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS)
        if self.affine == "wide":  # Gemma: the scale is 1 + w, in float32
            return (y * (1 + self.weight.float())).to(x.dtype)
        y = self.weight * y.to(x.dtype)
        return y + self.bias if self.centre else y


class Groups(nn.Module):
    """A GroupNorm by a view, with an affine."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.rand(CHANNELS))
        self.bias = nn.Parameter(torch.rand(CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        y = x.view(x.size(0), self.groups, -1)
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, unbiased=False) + EPS).sqrt()
        return y.view_as(x) * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


class ChannelsFirst(nn.Module):
    """A LayerNorm over the channels of images."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        return (x - mean) / torch.sqrt((x - mean).pow(2).mean(1, keepdim=True) + EPS)


class Norms(nn.Module):
    """One of each, side by side."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.rms = Layer(centre=True), Layer(centre=False)
        self.groups, self.instances = Groups(2), Groups(CHANNELS)
        self.first, self.stored = ChannelsFirst(), ChannelNorm(CHANNELS)

    def forward(self, rows: Tensor, images: Tensor) -> dict[str, Tensor]:
        return {
            "layer": self.layer(rows),
            "rms": self.rms(rows),
            "unit": rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-6),
            "groups": self.groups(images),
            "instances": self.instances(images),
            "first": self.first(images),
            "stored": self.stored(images),
        }


ROWS, IMAGES = torch.randn(3, 5, FEATURES), torch.randn(2, CHANNELS, 4, 4)
VARYING = {"rows": {0: "n", 1: "t"}, "images": {0: "n2", 2: "h"}}
# the affine of the groups is a batch norm too: one pass, where a product and a sum are two
SHARED = {"LayerNormalization": 2, "BatchNormalization": 2, "InstanceNormalization": 2}


@pytest.mark.parametrize(
    ("opset", "target", "norms", "arithmetic"),
    [
        (24, "cpu", {**SHARED, "RMSNormalization": 1},
         {"ReduceL2": 1, "Clip": 1, "Div": 1}),  # x / max(|x|, eps)
        (23, "tensorrt",
         {"LayerNormalization": 2, "BatchNormalization": 1, "InstanceNormalization": 1,
          "GroupNormalization": 1, "RMSNormalization": 1},
         {"ReduceL2": 1, "Clip": 1, "Div": 1}),
        # five nodes that onnxruntime fuses when it loads them, and the scale
        (17, "cuda", SHARED,
         {"ReduceL2": 1, "Clip": 1, "Div": 2, "Mul": 1, "Add": 1, "Pow": 1, "ReduceMean": 1,
          "Sqrt": 1}),
    ],
)  # fmt: skip
def test_each_norm_is_its_operation(
    opset: int, target: str, norms: dict[str, int], arithmetic: dict[str, int], tmp_path: Path
) -> None:
    arguments = {"rows": ROWS, "images": IMAGES}
    outcome = exported(
        Norms(), tmp_path, kwargs=arguments, dynamic=VARYING, opset=opset, target=target
    )
    found = outcome.operations
    assert {each: found[each] for each in found if each in NORMS} == norms
    assert {each: found[each] for each in found if each in ARITHMETIC} == arithmetic
    assert len(outcome.checked.verifications) == 3


def test_half_precision_keeps_its_casts_where_they_are_part_of_the_formula(tmp_path: Path) -> None:
    """Llama's and DeBERTa's norms are the operations as defined; Gemma's scale is in float32."""
    torch.manual_seed(0)
    norms = [Layer(False, "narrow"), Layer(True, "narrow"), Layer(False, "wide")]
    model = nn.Sequential(*norms).half().eval()
    outcome = exported(model, tmp_path, ROWS.half(), dynamic=({0: "n"},))
    assert outcome.operations == {"RMSNormalization": 2, "Cast": 2, "LayerNormalization": 1}


def test_bfloat16_is_checked_in_float32(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(FEATURES, FEATURES), Layer(False, "narrow")).bfloat16().eval()
    outcome = exported(model, tmp_path, ROWS.bfloat16(), target="cuda")
    assert outcome.operations == {"MatMul": 1, "Add": 1, "RMSNormalization": 1}
    told = "bfloat16 was checked in float32: the CPU provider has no kernels for it"
    assert told in outcome.checked.notes or outcome.checked.device == "cuda"


def test_float64_is_written_out_because_eps_is_a_float32_number(tmp_path: Path) -> None:
    model = nn.Sequential(Layer(True), nn.GroupNorm(5, 5), nn.RMSNorm(FEATURES)).double().eval()
    outcome = exported(model, tmp_path, ROWS.double())
    assert not NORMS & set(outcome.operations)


def test_numbers_of_float64_keep_their_digits(tmp_path: Path) -> None:
    """The correction of the variance is in a weight, which the exporter would round to float32."""

    def with_correction(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + EPS).sqrt()

    outcome = exported(Formula(with_correction), tmp_path, ROWS.double(), dynamic=({0: "n"},))
    assert [each.lowering for each in outcome.sites] == ["native"]


def own_statistics(x: Tensor) -> Tensor:
    mean = x.mean((0, 2, 3), keepdim=True)
    return (x - mean) / torch.sqrt(x.var((0, 2, 3), keepdim=True, unbiased=False) + EPS)


@pytest.mark.parametrize(
    "model",
    [Formula(own_statistics), nn.BatchNorm2d(CHANNELS, track_running_stats=False)],
    ids=["written by hand", "native"],
)
def test_statistics_of_the_batch_are_moments(model: nn.Module, tmp_path: Path) -> None:
    outcome = exported(model, tmp_path, IMAGES, dynamic=({0: "n"},))
    assert "BatchNormalization" not in outcome.operations  # it would need training_mode
    assert outcome.operations["ReduceMean"] == 2


def with_statistics(norm: nn.Module, mean: float) -> nn.Module:
    torch.manual_seed(0)
    norm.running_mean.normal_(mean)  # type: ignore[operator]
    norm.running_var.uniform_(0.5, 1.5)  # type: ignore[operator]
    return norm.eval()


def test_a_batch_norm_of_a_matrix_is_a_scale_and_a_shift(tmp_path: Path) -> None:
    model = nn.Sequential(nn.ReLU(), with_statistics(nn.BatchNorm1d(FEATURES), 0.0)).eval()
    outcome = exported(model, tmp_path, ROWS[0], dynamic=({0: "n"},))
    assert outcome.operations == {"Relu": 1, "Mul": 1, "Add": 1}


def test_native_batch_norms_are_folded_too(tmp_path: Path) -> None:
    """As the exporter's own optimiser does; one that stands elsewhere is one operation."""
    norms = [with_statistics(nn.BatchNorm2d(CHANNELS), 0.0) for _ in range(3)]
    model = nn.Sequential(
        norms[0], nn.ConvTranspose2d(CHANNELS, CHANNELS, 3, groups=2), norms[1], nn.ReLU(), norms[2]
    )
    outcome = exported(model.half(), tmp_path, IMAGES.half(), dynamic=({0: "n"},))
    assert outcome.operations == {"BatchNormalization": 2, "ConvTranspose": 1, "Relu": 1}


def by_scale_and_shift(norm: ChannelNorm, x: Tensor) -> Tensor:
    scale = norm.gamma * torch.rsqrt(norm.spread + EPS)
    return x * scale.view(-1, 1, 1) + (norm.beta - norm.mean * scale).view(-1, 1, 1)


def by_product_first(norm: ChannelNorm, x: Tensor) -> Tensor:
    return norm.beta.view(-1, 1, 1) + norm.gamma.view(-1, 1, 1) * (x - norm.mean.view(-1, 1, 1))


def without_shift(norm: ChannelNorm, x: Tensor) -> Tensor:
    return (x - norm.mean.view(-1, 1, 1)) * torch.rsqrt(norm.spread + EPS).view(-1, 1, 1)


def other_way_round(norm: ChannelNorm, x: Tensor) -> Tensor:
    return (norm.mean.view(-1, 1, 1) - x) * norm.gamma.view(-1, 1, 1)


def used_twice(norm: ChannelNorm, x: Tensor) -> Tensor:
    y = x * norm.gamma.view(-1, 1, 1)
    return y + norm.beta.view(-1, 1, 1) + y.relu()


def of_rows(norm: ChannelNorm, x: Tensor) -> Tensor:
    return x * norm.gamma[:, None] + norm.beta[:, None]


class Frozen(ChannelNorm):
    """A formula of stored statistics behind an activation."""

    def __init__(self, formula: Callable[[ChannelNorm, Tensor], Tensor]) -> None:
        super().__init__(CHANNELS)
        self.formula = formula

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(self, x.relu())


@pytest.mark.parametrize(
    ("formula", "dtype", "is_one"),
    [
        (ChannelNorm.forward, torch.float16, True),
        (by_scale_and_shift, torch.float16, True),
        (by_product_first, torch.float16, True),
        (without_shift, torch.float16, True),
        (other_way_round, torch.float16, True),
        (used_twice, torch.float16, False),
        (of_rows, torch.float16, False),  # along the height
        (by_scale_and_shift, torch.bfloat16, False),  # for which no provider has a kernel
    ],
)
def test_stored_statistics_in_half_precision_are_one_operation(
    formula: Callable[[ChannelNorm, Tensor], Tensor],
    dtype: torch.dtype,
    is_one: bool,
    tmp_path: Path,
) -> None:
    x = torch.randn(2, CHANNELS, CHANNELS, 3).to(dtype)
    outcome = exported(Frozen(formula).to(dtype), tmp_path, x, dynamic=({0: "n"},), target="cuda")
    found = {"Relu": 1, "BatchNormalization": 1}
    assert (outcome.operations == found) == is_one
    assert is_one or "BatchNormalization" not in outcome.operations


def test_large_stored_means_are_subtracted_first(tmp_path: Path) -> None:
    """As `x a + b` the digits that x and the mean share would be lost: 5e-4 for 3e-7."""
    matrix = with_statistics(nn.BatchNorm1d(FEATURES), 4000.0)
    outcome = exported(matrix, tmp_path, ROWS[0] + 4000)
    assert outcome.operations == {"Sub": 1, "Mul": 1, "Add": 1}
    images = ChannelNorm(CHANNELS).eval()
    images.mean += 4000
    outcome = exported(images, tmp_path, IMAGES + 4000)
    assert outcome.operations == {"Sub": 1, "Mul": 1, "Add": 1}


@pytest.mark.parametrize(
    ("formula", "kept"),
    [
        (lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-10), {"RMSNormalization"}),
        (lambda x: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-9),
         {"ReduceMean", "Sub", "Mul", "Sqrt", "Add", "Div"}),
    ],
    ids=["rms", "std + eps"],
)  # fmt: skip
def test_a_tiny_eps_stays(
    formula: Callable[[Tensor], Tensor], kept: set[str], tmp_path: Path
) -> None:
    """The exporter's optimiser drops it, and then a constant row gives NaN."""
    rows = 1e-6 * torch.randn(4, FEATURES)
    rows[1] = 0
    outcome = exported(Formula(formula), tmp_path, rows)
    assert set(outcome.operations) == kept


class Standardised(nn.Conv2d):
    """Weight standardisation."""

    def forward(self, input: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        w = w / (w.var((1, 2, 3), keepdim=True) + EPS).sqrt()
        return functional.conv2d(input, w, self.bias)


def test_what_is_made_of_parameters_is_a_constant(tmp_path: Path) -> None:
    tied = nn.utils.parametrizations.weight_norm(nn.Linear(2, 3))
    model = nn.Sequential(Standardised(CHANNELS, 4, 3), tied).eval()
    outcome = exported(model, tmp_path, IMAGES, dynamic=({0: "n"},))
    assert set(outcome.operations) == {"Conv", "MatMul", "Add"}


def test_a_view_of_a_large_parameter_is_not_stored_twice(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(512, 64)

        def forward(self, x: Tensor) -> Tensor:
            words: Tensor = self.words(x)
            return words @ self.words.weight.t()

    outcome = exported(Tied(), tmp_path, torch.tensor([1, 2, 3]))
    assert outcome.path.stat().st_size < 1.5 * 512 * 64 * 4
