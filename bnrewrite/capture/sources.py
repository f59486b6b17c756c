"""Where a placeholder of a Dynamo graph comes from: parameter, buffer, attribute or input."""

from __future__ import annotations

import re
from typing import Any, Literal

from torch import fx

Kind = Literal["parameter", "buffer", "attribute", "input"]

ORIGIN = "origin"  # in a placeholder's meta: kind and name, where no source of Dynamo's has them
_REGISTRIES: dict[str, Kind] = {"_parameters": "parameter", "_buffers": "buffer"}
_STEP = re.compile(r"\.?(\w+)|\[(?:'([^']*)'|\"([^\"]*)\"|(-?\d+))\]")


def locate(placeholder: fx.Node) -> tuple[Kind, str | None]:
    """Kind and qualified name of the value behind a placeholder.

    "L['self']._modules['bn']._buffers['running_mean']" is ("buffer", "bn.running_mean").
    """
    known: tuple[Kind, str | None] | None = placeholder.meta.get(ORIGIN)
    if known is not None:
        return known
    name = source_name(placeholder)
    if name is None:
        return "input", None
    steps = _steps(name)
    if len(steps) > 2 and steps[-2] in _REGISTRIES:
        return _REGISTRIES[steps[-2]], ".".join(_below_root([*steps[:-2], steps[-1]]))
    if _is_module(getattr(_source(placeholder), "base", None)):
        return "attribute", ".".join(_below_root(steps))
    return "input", None


def is_number(placeholder: fx.Node) -> bool:
    """Whether a placeholder is a Python number that Dynamo passes as a tensor."""
    return bool(getattr(placeholder.meta.get("grapharg"), "pass_arg_as_tensor", False))


def source_name(placeholder: fx.Node) -> str | None:
    """Dynamo's name of where a placeholder's value lives."""
    return name_of(_source(placeholder))


def name_of(source: Any) -> str | None:
    """The name of a Dynamo source, None where it has none.

    It is a property in newer releases of torch, a method in older ones.
    """
    if source is None:
        return None
    try:
        name = source.name
        return str(name() if callable(name) else name)
    except NotImplementedError:  # the source of a temporary
        return None


def qualified_name(path: str) -> str:
    """Name of a module in its model: "L['self'].layers.0.norm" -> "layers.0.norm", the root ""."""
    return ".".join(_below_root(_steps(path)))


def _source(placeholder: fx.Node) -> Any:
    source = getattr(placeholder.meta.get("grapharg"), "source", None)
    return source if source is not None else getattr(placeholder, "_dynamo_source", None)


def _is_module(source: Any) -> bool:
    return "NNModuleSource" in type(source).__name__


def _steps(name: str) -> list[str]:
    """Split "L['self']._modules['0'].plain" into ["L", "self", "_modules", "0", "plain"]."""
    return ["".join(match) for match in _STEP.findall(name)]


def _below_root(steps: list[str]) -> list[str]:
    """Drop the root ("L", "self") and the registries between the names."""
    return [step for step in steps[2:] if step != "_modules"]
