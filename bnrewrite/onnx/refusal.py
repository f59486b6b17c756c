"""What export and sessions raise: each names what is wrong, and what to do about it."""

from __future__ import annotations

from bnrewrite.errors import with_its_name

LONGEST = 300  # characters


class ExportError(RuntimeError):
    """A model that cannot become an ONNX file."""


class MismatchError(ExportError):
    """An exported file that does not compute what the user's model computes; it was removed."""


class SessionError(RuntimeError):
    """A file, a provider or an input with which a session cannot run."""


def in_a_line(error: BaseException) -> str:
    """An exception of another library; onnxruntime's may be long."""
    return with_its_name(error, LONGEST)
