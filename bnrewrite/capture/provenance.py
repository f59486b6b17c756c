"""Whose code a node is: the user's line and the qualified name of the module."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import torch
from torch import fx

from bnrewrite.capture.sources import qualified_name

_PACKAGE = str(Path(__file__).resolve().parent.parent)
_TORCH = str(Path(torch.__file__).parent)
_LINE = re.compile(r'File "([^"]+)", line (\d+)')
_FRAME = re.compile(r'(?m)^\s*File "')


def restore_provenance(module: fx.GraphModule) -> None:
    """Leave the user's frames alone in `stack_trace`, and qualified names in `nn_module_stack`.

    A node that PyTorch itself made while tracing (a layer of `nn` called by `nn.Sequential`) has no
    line of the user's; its `stack_trace` would otherwise name this package.
    """
    for node in module.graph.nodes:
        trace = node.meta.get("stack_trace")
        if trace:
            node.meta["stack_trace"] = _users_frames(trace)
        stack = node.meta.get("nn_module_stack")
        if stack:
            node.meta["nn_module_stack"] = {
                key: (qualified_name(str(path)), kind) for key, (path, kind) in stack.items()
            }


def source_line(node: fx.Node) -> str:
    """The innermost line of the user's code, "file.py:123"; "" where none is known."""
    frames = _LINE.findall(_users_frames(node.meta.get("stack_trace") or ""))
    lines = [each for each in frames if not each[0].startswith(_TORCH)] or frames
    return f"{Path(lines[-1][0]).name}:{lines[-1][1]}" if lines else ""


def _users_frames(trace: str) -> str:
    starts = [match.start() for match in _FRAME.finditer(trace)] + [len(trace)]
    frames = [trace[a:b] for a, b in pairwise(starts)]
    return "".join(frame for frame in frames if _PACKAGE not in frame.split("\n", 1)[0])
