"""Why a graph stays the user's."""

from __future__ import annotations

from torch import fx

from bnrewrite.errors import with_its_name


class CaptureError(Exception):
    """A graph that has no canonical form; the message is a sentence for the user."""


class Untraceable(CaptureError):
    """Tracing a graph failed.

    Attributes:
        node: the node of the Dynamo graph that it failed at; None where it failed outside of one.
    """

    def __init__(self, message: str, node: fx.Node | None) -> None:
        super().__init__(message)
        self.node = node


class Inexact(Untraceable):
    """A node whose functional form is known not to be the same function; nothing has failed."""


def sentence(error: Exception) -> str:
    """An exception in one line."""
    return str(error) if isinstance(error, CaptureError) else with_its_name(error)
