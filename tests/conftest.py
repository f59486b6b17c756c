"""One thread, fresh compiler caches, what is compiled, and the option that writes golden texts."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from hypothesis import Phase, settings

from bnrewrite.capture.backend import Compiler
from bnrewrite.capture.look import Look

# The kernels of a test run are its own; the processes of one run share them.
if "BNREWRITE_CACHE" not in os.environ:
    os.environ["BNREWRITE_CACHE"] = tempfile.mkdtemp(prefix="bnrewrite-tests-")
    atexit.register(shutil.rmtree, os.environ["BNREWRITE_CACHE"], ignore_errors=True)

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


@pytest.fixture
def repeatable() -> None:
    torch.manual_seed(0)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[Look]:
    """Grows by one at each graph that is compiled."""
    seen: list[Look] = []
    compile_graph = Compiler.__call__

    def watching(self: Compiler, *args: Any) -> Any:
        self.observe = seen.append
        return compile_graph(self, *args)

    monkeypatch.setattr(Compiler, "__call__", watching)
    return seen


@pytest.fixture
def compiled_graphs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of rewritten sites at each graph that is compiled."""
    seen: list[int] = []
    compile_graph = Compiler.__call__

    def counting(self: Compiler, *args: Any) -> Any:
        self.observe = lambda look: seen.append(
            sum(site.status == "rewritten" for site in look.sites)
        )
        return compile_graph(self, *args)

    monkeypatch.setattr(Compiler, "__call__", counting)
    return seen
