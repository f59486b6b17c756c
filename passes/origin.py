"""Where in the user's code a node comes from."""

from __future__ import annotations

import re

from torch import fx

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def source_of(node: fx.Node) -> str:
    """``file.py:123``: the innermost line of the user's code, "" where none is known."""
    frames: list[tuple[str, str]] = _FRAME.findall(node.meta.get("stack_trace") or "")
    if not frames:
        return ""
    path, line = frames[-1]
    return f"{path.rpartition('/')[2]}:{line}"


def module_of(node: fx.Node) -> str:
    """The qualified name of the module whose code made a node, "" for the root."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    path = re.sub(r"^L\['\w+'\]\.?", "", path)
    path = re.sub(r"_modules\['([^']+)'\]", r"\1", path)
    path = re.sub(r"\[(['\"]?)([^\]'\"]+)\1\]", r".\2", path)
    return path.replace("..", ".").strip(".")
