"""A constant affine behind a linear map goes into its weight, and comes out when values change."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from behind_linear_maps import KINDS, NORMS, Normed, broken_promise, folded_as_constants

import bnrewrite
from bnrewrite.kernels import folding

pytestmark = pytest.mark.filterwarnings("error::bnrewrite.BnrewriteWarning")

PAIRS = [
    *((kind, "centred", bias) for kind in KINDS for bias in (True, False)),
    *(("conv2d", norm, False) for norm in NORMS if norm != "centred"),
    *(("conv_transpose2d in groups", norm, True) for norm in NORMS if norm != "centred"),
    *(("linear", norm, True) for norm in NORMS if norm != "centred"),
]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors are folded too."""
    monkeypatch.setattr("bnrewrite.passes.fold.SMALLEST", 0)
    monkeypatch.setattr("bnrewrite.passes.fold.TIMES", 0)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Grows at each time that a folded weight is computed: whether it could be."""
    seen: list[bool] = []
    compute = folding.folded_parameters

    def watching(*args: object) -> object:
        seen.append(False)
        result = compute(*args)  # type: ignore[arg-type]
        seen[-1] = True
        return result

    monkeypatch.setattr(folding, "folded_parameters", watching)
    return seen


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
