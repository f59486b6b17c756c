"""Exceptions in a line."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of an exception's message that is not blank; "" where there is none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")


def with_its_name(error: BaseException, most: int | None = None) -> str:
    """The same, of so many characters at most, behind the name of its class."""
    name, line = type(error).__name__, first_line(error)[:most]
    return f"{name}: {line}" if line else name
