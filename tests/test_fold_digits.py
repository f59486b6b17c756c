"""What a fold does to digits: other dtypes, large means, values out of range."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from behind_linear_maps import (
    Normed,
    broken_promise,
    centred,
    folded_as_constants,
    scaled_and_shifted,
)

import bnrewrite
from bnrewrite.kernels import folding

PREFIX = "not folded into the {} before it: "


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["conv2d", "linear of a sequence"])
def test_other_dtypes(kind: str, dtype: torch.dtype, computed: list[bool]) -> None:
    users = Normed(kind, centred).eval().to(dtype)
    x = users.inputs().to(dtype)
    sites, found, _ = folded_as_constants(users, x)
    half = [note for note in sites[0].notes if note.startswith("more accurate than the source")]
    assert (sites[0].lowering, len(half)) == ("fold", int(dtype != torch.float64))
    assert broken_promise(users, found, x) is None
    model = bnrewrite.optimize(copy.deepcopy(users))
    with torch.no_grad():
        assert broken_promise(users, model(x), x) is None
    assert computed[-1]
    if half:
        sites, _, _ = folded_as_constants(users, x, strict=True)
        assert "strict=True leaves a site whose replacement is more accurate" in sites[0].notes[0]
        assert "the result before the affine is rounded to" in sites[0].notes[0]


def with_large_means(limit: float) -> Normed:
    """Exact sums, means of many deviations: every rounding of the fold would show."""
    model = Normed("conv2d", centred, bias=False).eval()
    with torch.no_grad():
        model.filters.zero_()[:, 0, 0, 0] = 1.0
        model.mean.fill_(limit)
        model.variance.fill_(1.0)
    return model


def test_large_means_are_not_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_large_means(4096.0)
    x = (model.inputs() * 16).round() / 16 + 4096.0
    sites, found, _ = folded_as_constants(model, x)
    assert sites[0].lowering == "composite"
    assert sites[0].notes == (
        "not folded into the conv2d before it: "
        "a stored mean is 4.09e+03 deviations large, beyond 8 a folded weight loses digits",
    )
    with torch.no_grad():
        expected, exact = model(x), copy.deepcopy(model).double()(x.double())
    slip = (expected - exact).abs().max()
    assert (found - exact).abs().max() <= 3 * slip
    monkeypatch.setattr(folding, "LARGEST_MEAN", math.inf)
    sites, found, _ = folded_as_constants(model, x)
    assert sites[0].lowering == "fold"
    assert (found - exact).abs().max() > 100 * slip  # the limit is there for a reason


def test_means_up_to_the_limit_are_folded() -> None:
    model = with_large_means(7.9)
    x = (model.inputs() * 16).round() / 16 + 7.875
    sites, found, _ = folded_as_constants(model, x)
    assert sites[0].lowering == "fold"
    assert broken_promise(model, found, x) is None


@pytest.mark.parametrize(
    ("name", "value"), [("weight", 1e6), ("weight", 1e-9), ("weight", math.nan), ("bias", math.inf)]
)
def test_values_out_of_range_are_not_folded(name: str, value: float) -> None:
    model = Normed("conv2d", scaled_and_shifted).eval().half()
    model.get_parameter(name).data[1] = value
    sites, found, _ = folded_as_constants(model, model.inputs().half())
    reason = "a folded weight is out of the range of its dtype"
    if value == 1e-9:  # which is zero in float16 already
        assert sites[0].lowering == "fold"
    else:
        assert sites[0].notes == (PREFIX.format("conv2d") + reason,)
    with torch.no_grad():
        expected = model(model.inputs().half())
    torch.testing.assert_close(found.isfinite(), expected.isfinite())


def test_an_empty_weight_cannot_be_folded() -> None:
    ones = torch.ones(6, dtype=torch.float64)
    parts = folding.Parts(torch.empty(6, 0), None, ones, ones, None, None)
    with pytest.raises(folding.Unfoldable, match="the weight is empty"):
        folding.folded_parameters(parts, folding.Outputs(0), torch.float32)
