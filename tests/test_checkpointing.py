"""Norms in a checkpointed region: statistics as often as the user's, the policy of the user's."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hand_written import Running
from kept_regions import (
    SIZE,
    Body,
    Two,
    checkpointing,
    checkpointing_at_the_end,
    checkpointing_twice,
    compare,
    recomputed,
    reentrant_checkpointing,
    statuses,
)
from torch import Tensor
from torch.utils.checkpoint import create_selective_checkpoint_contexts

import bnrewrite

pytestmark = pytest.mark.filterwarnings("error::bnrewrite.BnrewriteWarning")

CHECKPOINTING = (
    checkpointing,
    checkpointing_at_the_end,
    checkpointing_twice,
    reentrant_checkpointing,
)


@pytest.mark.parametrize("at_the_end", [True, False])
@pytest.mark.parametrize("body", CHECKPOINTING)
def test_statistics_in_a_checkpoint_are_updated_as_often_as_the_users(
    body: Body, at_the_end: bool
) -> None:
    compare(Two(body, partial(Running, at_the_end=at_the_end)))
    compare(Two(body, partial(Running, at_the_end=at_the_end)), grad_enabled=False)


def test_a_norm_with_statistics_in_a_checkpoint_stays_and_is_found() -> None:
    model = Two(checkpointing, Running)
    report = bnrewrite.explain(model, torch.randn(4, SIZE, requires_grad=True))
    assert [(site.module, site.status) for site in report.sites] == [
        ("first", "rewritten"),
        ("second", "left"),
        ("first", "rewritten"),
    ]
    assert "runs it again for the backward" in str(report.sites[1].reason)
    found = [each.message for each in report.findings if each.name == "two-updates-per-step"]
    assert len(found) == 1
    assert found[0].startswith("second.mean: ")
    with torch.no_grad():  # it runs once
        assert {status for _, status in statuses(model)} == {"rewritten"}
    assert bnrewrite.explain(model.eval(), torch.randn(4, SIZE)).findings == []
    assert {status for _, status in statuses(model)} == {"rewritten"}


def test_a_policy_of_what_is_saved_is_the_users() -> None:
    products = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    context = partial(create_selective_checkpoint_contexts, products)

    def body(model: Two, x: Tensor) -> Tensor:
        return recomputed(
            lambda y: model.linear(model.second(y)), model.first(x), context_fn=context
        )

    compare(Two(body))
    assert statuses(Two(body)) == [("first", "rewritten"), ("second", "left")]
    (site,) = bnrewrite.explain(Two(body), torch.randn(4, SIZE, requires_grad=True)).refusals
    assert site.reason == (
        "a policy of the user's chooses by operation what activation checkpointing saves"
    )
