"""Models that nobody here wrote: every norm that they write by hand is found, and none is wrong."""

from __future__ import annotations

import copy
import warnings
from collections import Counter

import pytest
import torch
from torch import nn
from transformers_models import MODELS, Model, made

from bnrewrite import BnrewriteWarning, explain, optimize, verify

pytestmark = pytest.mark.filterwarnings("error::bnrewrite.BnrewriteWarning")

HALVES = ("llama", "gemma", "deberta")


@pytest.mark.parametrize("name", MODELS)
def test_every_hand_written_norm_is_found(name: str) -> None:
    model = MODELS[name]
    module, arguments = made(model)
    assert calls(module.train(), arguments, model) == {
        norm: count for norm, (_, count) in model.modules.items()
    }
    for training in (True, False):
        report = explain(module.train(training), **arguments)
        assert Counter(site.kind for site in report.sites) == model.kinds, report
        assert [site.reason for site in report.refusals] == []


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


def calls(module: nn.Module, arguments: dict[str, torch.Tensor], model: Model) -> dict[str, int]:
    """How often a copy of the model calls each class of its norms."""
    subject = copy.deepcopy(module)
    counts: Counter[str] = Counter()
    for each in subject.modules():
        name = type(each).__name__
        if name in model.modules:
            each.register_forward_hook(lambda *_, name=name: counts.update([name]))
    with torch.no_grad():
        subject(**arguments)
    return dict(counts)
