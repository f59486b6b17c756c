"""Every spelling of a norm is found, ends in its family's golden graph, and keeps the contract."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from contract import contract_violations, exact_trace, trace, user_errors, violation
from golden import RECORDED, Golden, read_golden, recorder
from spellings import TABLE, Spelling
from torch import nn

from bnrewrite import explain, optimize

DTYPES = {
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@pytest.fixture(scope="module")
def golden(request: pytest.FixtureRequest) -> Iterator[Golden]:
    texts = Golden(write=bool(request.config.getoption("--write-golden")))
    yield texts
    texts.save()


def rows(way: str) -> pytest.MarkDecorator:
    """The rows of the table that are also checked in some further way."""
    return pytest.mark.parametrize(
        "row", [pytest.param(row, id=row.name) for row in TABLE if way in row.also]
    )


def recording(model: nn.Module, dynamic: bool | None = None) -> Any:
    """Optimises; the texts of the graphs that run are then in ``RECORDED``."""
    return optimize(model, backend=recorder(), dynamic=dynamic)


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in TABLE])
def test_a_spelling(row: Spelling, golden: Golden) -> None:
    def recorded(model: nn.Module) -> Any:
        return optimize(model, backend=recorder(row.family.full_size))

    assert contract_violations(row.build(), recorded, row.batches(4)) == []
    text = RECORDED[0]  # of the training step
    (site,) = explain(row.build(), row.batches(1)[0]).sites
    assert site.kind in row.family.kinds
    axes = row.axes or row.family.axes
    assert axes is None or site.axes == axes
    assert site.eps == pytest.approx(row.family.eps) or row.family.eps is None
    assert site.source.split(":")[0].endswith(".py")
    if row.family.may_stay and site.status == "left":
        assert site.reason
        return
    assert site.status == "rewritten", site.reason
    assert text == golden.expected(row.family.name, text)


@pytest.mark.parametrize(
    ("row", "dtype"),
    [
        pytest.param(row, dtype, id=f"{row.name}, {dtype}")
        for dtype in DTYPES
        for row in TABLE
        if dtype in row.also
    ],
)
def test_a_spelling_in_another_dtype(row: Spelling, dtype: str) -> None:
    model, batches = row.build().to(DTYPES[dtype]), row.batches(4, DTYPES[dtype])
    assert contract_violations(model, lambda m: optimize(m, backend="eager"), batches) == []
    assert [site.status for site in explain(model, batches[0]).sites] == ["rewritten"]


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in TABLE])
def test_a_spelling_with_symbolic_sizes_and_a_batch_that_grows(row: Spelling) -> None:
    batches = row.batches(4, grow=1)
    assert contract_violations(row.build(), lambda m: recording(m, True), batches) == []
    assert len(RECORDED) <= 2  # one of training, one of evaluation


@rows("backend")
def test_a_spelling_through_torch_compile(row: Spelling) -> None:
    def compiled(model: nn.Module) -> Any:
        return torch.compile(model, backend="bnrewrite", options={"backend": "eager"})

    assert contract_violations(row.build(), compiled, row.batches(4)) == []


@rows("inductor")
def test_a_spelling_through_inductor(row: Spelling) -> None:
    """In a form that it fuses; its kernels are in ``test_inductor_kernels.py``."""

    def compiled(model: nn.Module) -> Any:
        return torch.compile(model, backend="bnrewrite")

    assert contract_violations(row.build(), compiled, row.batches(3)) == []


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in TABLE])
def test_a_spelling_is_its_familys_formula(row: Spelling) -> None:
    """The table's own claim, without the rewriter: native code keeps the contract too."""
    written, batches = row.build(), row.batches(4)
    exact = exact_trace(written, batches)
    user = trace_of(row.build(), batches)
    native = trace_of(row.build_native(), batches)
    slip = user_errors(written, batches, user, exact)
    assert native.keys() == exact.keys()
    for name, value in exact.items():
        found = native[name].reshape(value.shape)
        assert violation(name, found, user[name], value, slip[name]) is None


def trace_of(model: nn.Module, batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return trace(model, model, batches)


def test_the_table_is_large_and_its_golden_texts_are_used() -> None:
    families = Counter(row.family.name for row in TABLE)
    assert len(TABLE) >= 100
    alone = {row.family.name for row in TABLE if row.family.alone}
    assert alone == {name for name, count in families.items() if count == 1}
    assert read_golden().keys() <= families.keys()
