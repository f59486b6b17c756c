"""Capture without optimising: the canonical graphs of one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from bnrewrite.capture.canonical import Canonical, canonicalise
from bnrewrite.capture.rebinding import find_rebindings


def capture(model: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Canonical]:
    """Canonical graphs of `model(*args, **kwargs)`, one per Dynamo graph, in order.

    The user's code runs once on the arguments as it is, so its buffers move.
    """
    found: list[Canonical] = []

    def keep(graph: fx.GraphModule, example_inputs: list[torch.Tensor]) -> Callable[..., Any]:
        found.append(canonicalise(graph, example_inputs, find_rebindings(graph)))
        return graph.forward

    torch._dynamo.reset()
    torch.compile(model, backend=keep)(*args, **kwargs)
    return found
