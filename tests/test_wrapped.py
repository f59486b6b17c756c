"""Optimised models under DDP and FSDP2, in two processes."""

from __future__ import annotations

import pytest
from processes import outcomes
from wrapped_checks import ON_TWO


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], str]:
    return outcomes("wrapped_checks", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("check", ON_TWO)
def test_a_wrapped_model_does_what_the_native_one_does(
    check: str, found: dict[tuple[int, str], str]
) -> None:
    assert found[2, check] == ""
