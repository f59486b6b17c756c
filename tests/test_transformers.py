"""Models that nobody here wrote: every norm that they write by hand is found, and none is wrong."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers_models import MODELS, Model, made

from bnrewrite import explain, optimize, verify

pytestmark = pytest.mark.filterwarnings("error::bnrewrite.BnrewriteWarning")

HALVES = ("llama", "gemma", "deberta")

# What is not found yet, and why: these tests fail the day it is.
MISSED: dict[str, str] = {}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.xfail(strict=True, reason=MISSED[n]))
        if n in MISSED
        else n
        for n in MODELS
    ],
)
def test_every_hand_written_norm_is_found(name: str) -> None:
    model = MODELS[name]
    module, arguments = made(model)
    called = places(module, arguments, model)
    assert Counter(norm for norm, _ in called) == {
        norm: count for norm, (_, count) in model.modules.items()
    }
    for training in (True, False):
        report = explain(module.train(training), **arguments)
        assert Counter(site.kind for site in report.sites) == model.kinds, report
        assert [site.reason for site in report.refusals] == []
        assert Counter(site.module for site in report.sites) >= Counter(
            place for _, place in called
        ), report


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_wrong(name: str) -> None:
    module, arguments = made(MODELS[name])
    original = copy.deepcopy(module)
    verdict = verify(original, optimize(module, backend="eager"), steps=1, kwargs=arguments)
    assert verdict.failures == ()


@pytest.mark.parametrize("name", HALVES)
def test_nothing_is_wrong_in_bfloat16(name: str) -> None:
    module, arguments = made(MODELS[name], torch.bfloat16)
    original = copy.deepcopy(module)
    report = explain(module, **arguments)
    assert Counter(site.kind for site in report.sites) == MODELS[name].kinds, report
    verdict = verify(original, optimize(module, backend="eager"), steps=1, kwargs=arguments)
    assert verdict.failures == ()


def places(
    module: nn.Module, arguments: dict[str, torch.Tensor], model: Model
) -> list[tuple[str, str]]:
    """Every call of one of its norms when a copy of the model runs: class and qualified name."""
    subject = copy.deepcopy(module)
    found: list[tuple[str, str]] = []

    def record(norm: str, place: str) -> Callable[..., None]:
        return lambda *_: found.append((norm, place))

    for place, each in subject.named_modules():
        norm = type(each).__name__
        if norm in model.modules:
            each.register_forward_hook(record(norm, place))
    with torch.no_grad():
        subject(**arguments)
    return found
