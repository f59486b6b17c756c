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

OTHER = "it divides by a statistic of another tensor than the one it centres"
DIGITS = "a sum in it would lose digits in another order of operations"
# The near misses that stay the user's code, and why; all others are reproduced exactly.
REFUSED = {
    "batch: x times its own transpose": OTHER,
    "layer: mean and variance swapped": OTHER,
    "packed: one channel off at the end": OTHER,
    "packed: the mean packed twice": OTHER,
    "running: both statistics in one buffer": DIGITS,
    "running: variance around the running mean remembered": DIGITS,
    "group: rows split in the place of channels": "a tensor varies along a part of a dimension",
}

__all__ = ["EPS", "REFUSED", "TABLE", "NearMiss", "Recipe", "Setting"]
