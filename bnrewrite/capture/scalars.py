"""Numbers that a graph reads out of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from bnrewrite.capture.sources import is_number


def has_captured_scalars(graph_module: fx.GraphModule) -> bool:
    """Whether a graph reads a number out of a tensor: its value is unknown until the graph runs."""
    return any(
        node.target in ("item", "tolist") and not is_number(node.args[0])
        for node in graph_module.graph.nodes
        if node.op == "call_method"
    )


@contextmanager
def scalars_allowed(fakes: Sequence[Any]) -> Iterator[None]:
    """Let fake tensors give symbols for numbers, as they did when Dynamo made the graph."""
    fake = next((each for each in fakes if isinstance(each, torch.Tensor)), None)
    mode: Any = getattr(fake, "fake_mode", None)
    before = getattr(mode, "allow_scalar_outputs", None)
    if before is None:
        yield
        return
    mode.allow_scalar_outputs = True
    try:
        yield
    finally:
        mode.allow_scalar_outputs = before
