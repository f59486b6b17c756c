"""The spelling table: one row per way to write a norm, grouped by the formula it is."""

from __future__ import annotations

from . import (
    batch,
    batch_last,
    constants,
    groups,
    layer,
    lengths,
    nameless,
    pieces,
    rms,
    running,
)
from .family import Family, Spelling, random_input
from .written import Formula, Shape, Written

TABLE = (
    *batch.TABLE,
    *batch_last.TABLE,
    *running.TABLE,
    *layer.TABLE,
    *rms.TABLE,
    *groups.TABLE,
    *lengths.TABLE,
    *constants.TABLE,
    *nameless.TABLE,
    *pieces.TABLE,
)

__all__ = ["TABLE", "Family", "Formula", "Shape", "Spelling", "Written", "random_input"]
