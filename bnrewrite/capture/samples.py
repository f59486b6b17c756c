"""The batch of a call as a size that differs between processes.

A graph whose statistics are synchronised holds for every batch, one of no sample or of a single one
too: processes of one call may not run different formulas. So the leading dimension of every
argument is symbolic from the first call on, and stands for no value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental import _config
from torch.utils._pytree import tree_leaves

from bnrewrite.capture.aliases import outputs_of

CALLS = "bnrewrite.capture.hook"  # where the code is through which an optimised model is called
Run = Callable[..., Any]


@contextmanager
def sizes_without_meaning() -> Iterator[None]:
    """Trace a batch of none or one as one of any size."""
    with _config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        yield


def mark_samples(frame: Any) -> None:
    """Make the leading dimensions of the arguments of a model's call symbolic.

    Where the call was broken, a later frame begins with tensors that code outside of graphs has
    made, as FSDP2 does around each of its modules. All of those count: which of them belong to the
    batch cannot be told from sizes, and every process has to come to the same graph.
    """
    given = frame.f_locals
    if frame.f_globals.get("__name__") == CALLS:
        given = given.get("args"), given.get("kwargs")
    for each in tree_leaves(given):
        if not isinstance(each, torch.Tensor) or isinstance(each, nn.Parameter):
            continue
        if each.dim() and not each.is_nested:
            torch._dynamo.maybe_mark_dynamic(each, 0)


def marks_results(graph: fx.GraphModule, run: Run) -> Run:
    """A run whose results keep their symbolic dimensions where the graph was broken behind it."""
    dims = {
        i: found
        for i, node in enumerate(outputs_of(graph))
        if isinstance(node, fx.Node) and (found := _symbolic(node.meta.get("example_value")))
    }

    def marking(*args: Any) -> Any:
        results = run(*args)
        for i, found in dims.items():
            torch._dynamo.maybe_mark_dynamic(results[i], found)
        return results

    return marking if dims else run


def _symbolic(value: Any) -> list[int]:
    if not isinstance(value, torch.Tensor):
        return []
    return [i for i, extent in enumerate(value.shape) if isinstance(extent, torch.SymInt)]
