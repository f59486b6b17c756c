"""Single changes to a norm: refused with a sentence or reproduced exactly, never a wrong number."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from contract import contract_violations, exact_trace, trace, user_errors, violation
from near_misses import REFUSED, TABLE, NearMiss, Setting
from spellings import Formula
from torch import nn

from bnrewrite import Site, explain, optimize

ROWS = pytest.mark.parametrize("row", [pytest.param(row, id=row.change) for row in TABLE])
Signature = tuple[Any, ...]


@ROWS
def test_a_near_miss(row: NearMiss) -> None:
    model, batches = row.setting.build(row.formula), row.setting.batches(4)
    assert contract_violations(model, optimised, batches) == []
    sites = explain(row.setting.build(row.formula), batches[0].requires_grad_()).sites
    reasons = {site.reason for site in sites if site.status == "left"}
    assert reasons == ({REFUSED[row.change]} if row.change in REFUSED else set())
    for site in sites:
        if site.status == "rewritten" and not row.norm_stays:
            assert signature(site) not in twin_signatures(row.twin, row.setting)


@ROWS
def test_the_contract_sees_the_change(row: NearMiss) -> None:
    """Were the twin put in the near miss's place, the contract would say so."""
    changed, batches = row.setting.build(row.formula), row.setting.batches(4)
    exact = exact_trace(changed, batches)
    user = trace(changed, changed, batches)
    slip = user_errors(row.setting.build(row.formula), batches, user, exact)
    twin = row.setting.build(row.twin)
    wrong = trace(twin, twin, batches)
    assert wrong.keys() != exact.keys() or any(
        violation(name, wrong[name], user[name], exact[name], slip[name]) for name in exact
    )


def optimised(model: nn.Module) -> Any:
    return optimize(model, backend="eager")


@cache
def twin_signatures(twin: Formula, setting: Setting) -> frozenset[Signature]:
    report = explain(setting.build(twin), setting.batches(1)[0].requires_grad_())
    found = frozenset(signature(site) for site in report.sites if site.status == "rewritten")
    assert found, "the twin itself must be rewritten, else the near miss shows nothing"
    return found


def signature(site: Site) -> Signature:
    """What a report says that the site computes."""
    return site.kind, site.axes, site.eps, str(site.formula), site.lowering, site.notes


def test_the_table_is_large_and_every_change_is_named_once() -> None:
    changes = [row.change for row in TABLE]
    assert len(changes) >= 80
    assert len(set(changes)) == len(changes)
    assert set(changes) >= set(REFUSED)
