"""Exported programs and scripted modules: through the same passes, and out as they came in."""

from bnrewrite.doors.archive import ArchiveError
from bnrewrite.doors.entry import Opened, open

__all__ = ["ArchiveError", "Opened", "open"]
