"""One thread, fresh compiler caches, what is compiled, and the option that writes golden texts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from hypothesis import Phase, settings

from bnrewrite.capture.backend import Compiler
from bnrewrite.capture.look import Look
from bnrewrite.kernels import folding
from bnrewrite.passes.generated import write_generated
from bnrewrite.passes.nodes import Unwritable

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
def unwritable(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the reason of each formula that turns out to have no kernel."""
    reasons: list[str] = []

    def watched(*given: Any) -> Any:
        try:
            return write_generated(*given)
        except Unwritable as raised:
            reasons.append(str(raised))
            raise

    monkeypatch.setattr("bnrewrite.passes.lower.write_generated", watched)
    return reasons


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


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Affines behind linear maps are folded however small the tensors are."""
    monkeypatch.setattr("bnrewrite.passes.costs.SMALLEST_FOLD", 0)
    monkeypatch.setattr("bnrewrite.passes.costs.WEIGHTS", 0)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Grows at each time that a kernel folds a weight: whether it could."""
    seen: list[bool] = []
    compute = folding.folded_parameters

    def watching(*args: Any) -> Any:
        seen.append(False)
        result = compute(*args)
        seen[-1] = True
        return result

    monkeypatch.setattr(folding, "folded_parameters", watching)
    return seen
