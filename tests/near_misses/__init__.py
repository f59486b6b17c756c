"""The near-miss table: single changes after which a norm is another formula, or none."""

from __future__ import annotations

from . import groups, pieces, rows, scales, statistics, updates
from .recipe import EPS, NearMiss, Recipe, Setting

TABLE = (
    *statistics.TABLE,
    *scales.TABLE,
    *updates.TABLE,
    *rows.TABLE,
    *groups.TABLE,
    *pieces.TABLE,
)

__all__ = ["EPS", "TABLE", "NearMiss", "Recipe", "Setting"]
