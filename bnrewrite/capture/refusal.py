"""Why a graph stays the user's."""

from __future__ import annotations


class CaptureError(Exception):
    """A graph that has no canonical form; the message is a sentence for the user."""
