"""Capture without optimising: the canonical graphs of one call, for tests and for `explain`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from bnrewrite.capture.canonical import Canonical, canonicalise


def capture(model: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Canonical]:
    """Canonical graphs of `model(*args, **kwargs)`, one per Dynamo graph, in order.

    The model runs once, as the user's code does: buffers move. Deep-copy it first where that matters.
    """
    found: list[Canonical] = []

    def keep(graph_module: fx.GraphModule, example_inputs: list[torch.Tensor]) -> Callable[..., Any]:
        found.append(canonicalise(graph_module, example_inputs))
        return graph_module.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=keep)
    compiled(*args, **kwargs)
    return found
