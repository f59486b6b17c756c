"""What export and sessions raise: each names what is wrong, and what to do about it."""

from __future__ import annotations


class ExportError(RuntimeError):
    """A model that cannot become an ONNX file."""


class MismatchError(ExportError):
    """An exported file that does not compute what the user's model computes; it was removed."""


class SessionError(RuntimeError):
    """A file, a provider or an input with which a session cannot run."""


def first_line(error: BaseException) -> str:
    """An exception in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
