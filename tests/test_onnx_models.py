"""Whole models: each norm of the file is one operation, and nothing of a norm is left beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
from onnx_checks import exported
from onnx_models import ARITHMETIC, CASES, NORMS


@pytest.mark.parametrize("name", CASES)
def test_every_norm_is_one_operation(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model, arguments = case.build()
    dynamic = {key: case.dynamic.get(key) for key in arguments}
    outcome = exported(model, tmp_path, kwargs=arguments, dynamic=dynamic)
    assert [site.reason for site in outcome.sites if site.status == "left"] == []
    found = outcome.operations
    assert {each: found[each] for each in found if each in NORMS} == case.norms
    assert {each: found[each] for each in found if each in ARITHMETIC} == case.arithmetic
    # other sizes than the traced ones were run too
    assert len(outcome.checked.verifications) > 1, outcome.checked
    assert outcome.checked.notes == ()
