"""One thread, fresh compiler caches for each test, and the option that rewrites golden texts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch._dynamo
from hypothesis import Phase, settings

# Without shrinking: an example compiles a model, and a failing one already names its words.
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],
)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-golden",
        action="store_true",
        help="write spellings/golden.txt from what the rewriter does now (not with -n)",
    )


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Dynamo keeps code per function: without a reset one test would run another one's graph."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Small tensors: more threads only make the order of a sum, and the time, less certain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
