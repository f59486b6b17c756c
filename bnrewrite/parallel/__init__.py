"""Statistics across processes: one merge for norms of which each process updates its own."""

from __future__ import annotations

from .statistics import merge_statistics, merge_under_ddp, track_statistics

__all__ = ["merge_statistics", "merge_under_ddp", "track_statistics"]
