"""Random sentences of the grammar: equal spellings end alike, wrong words never do."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from contract import contract_violations
from golden import RECORDED, recorder
from hypothesis import given, settings
from hypothesis import strategies as st
from spellings import random_input
from spellings.grammar import (
    AFFINES,
    EXACT_AFFINES,
    FRAMES,
    MEANS,
    NORMS,
    QUOTIENTS,
    VARIANCES,
    WRONG_WORDS,
    Norm,
    Sentence,
)
from torch import Tensor, nn

from bnrewrite import explain, optimize

EXAMPLES = 20

sentences = st.builds(
    Sentence,
    norm=st.sampled_from(NORMS),
    mean=st.sampled_from(sorted(MEANS)),
    variance=st.sampled_from(sorted(VARIANCES)),
    quotient=st.sampled_from(sorted(QUOTIENTS)),
    affine=st.sampled_from(sorted(AFFINES)),
    frame=st.sampled_from(FRAMES),
)


def batches(norm: Norm, count: int = 3) -> list[Tensor]:
    source = torch.Generator().manual_seed(23)
    return [random_input(norm.shape, source) for _ in range(count)]


def check(sentence: Sentence) -> str:
    """Asserts the contract; returns the text of the rewritten graph."""
    torch._dynamo.reset()
    assert contract_violations(sentence.build(), recording, batches(sentence.norm)) == []
    return RECORDED[0]


@cache
def plain_text(norm: Norm) -> str:
    """The rewritten graph of a norm in the plainest words."""
    return check(Sentence(norm))


def recording(model: nn.Module) -> Any:
    return optimize(model, backend=recorder())


@settings(max_examples=EXAMPLES)
@given(sentence=sentences)
def test_every_sentence_of_a_norm_ends_in_one_graph(sentence: Sentence) -> None:
    text = check(sentence)
    (site,) = explain(sentence.build(), batches(sentence.norm)[0]).sites
    assert site.kind in sentence.norm.kinds
    assert site.status == "rewritten", site.reason
    if sentence.affine in EXACT_AFFINES:
        assert text == plain_text(sentence.norm)


@settings(max_examples=EXAMPLES)
@given(sentence=sentences, wrong=st.sampled_from(WRONG_WORDS))
def test_a_wrong_word_is_refused_or_reproduced(sentence: Sentence, wrong: tuple[str, str]) -> None:
    part, word = wrong
    changed: Sentence = replace(sentence, **{part: word})  # type: ignore[arg-type]
    assert check(changed) != plain_text(sentence.norm)
