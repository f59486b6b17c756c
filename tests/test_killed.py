"""A process is killed in mid-step: the others are told, and a checkpoint gives the same run."""

from __future__ import annotations

import json
from typing import Any

import killed_run
import pytest
from processes import start

LIMIT = 120  # seconds for all runs

Outcomes = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """What each rank of each run wrote; nothing of one that was killed."""
    folder = tmp_path_factory.mktemp("killed")
    start(killed_run.__file__, str(folder), limit=LIMIT)
    written: Outcomes = {}
    for path in sorted(folder.glob("*.json")):
        written.setdefault(path.stem.rpartition("-")[0], []).append(json.loads(path.read_text()))
    return written


@pytest.mark.parametrize("way", killed_run.WAYS)
def test_the_others_get_the_error_of_torch_distributed(way: str, found: Outcomes) -> None:
    (survivor,) = found[way]
    assert survivor["kind"] in ("RuntimeError", "DistBackendError", "DistNetworkError")
    assert "gloo" in survivor["text"]
    assert survivor["seconds"] < killed_run.PATIENCE


@pytest.mark.parametrize("way", killed_run.WAYS)
def test_the_run_goes_on_as_if_nothing_had_happened(way: str, found: Outcomes) -> None:
    for rank in range(killed_run.RANKS):
        wanted, own = (found[name][rank][way] for name in ("whole", "restarted"))
        assert own == wanted  # to the last bit
        assert len(own) > 5
