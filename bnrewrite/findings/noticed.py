"""What the formulas of one graph say: findings, and what is one only for certain values."""

from __future__ import annotations

from dataclasses import dataclass

from bnrewrite.report.site import Finding


@dataclass(frozen=True)
class StoredStatistics:
    """A norm whose mean and variance are buffers that the graph does not update.

    Attributes:
        mean, variance: qualified names of the buffers.
        source: ``"file.py:123"``.
    """

    mean: str
    variance: str
    source: str


@dataclass(frozen=True)
class BatchStatistics:
    """A norm that takes its statistics over the batch.

    Attributes:
        module: qualified name of its module.
        channels: how many statistics of each kind it has; None where the number varies.
        source: ``"file.py:123"``.
    """

    module: str
    channels: int | None
    source: str


@dataclass(frozen=True)
class Noticed:
    """What was noticed in one graph.

    Attributes:
        findings: what is a pathology for every value of the buffers.
        stored: norms with stored statistics.
        batches: norms with statistics over the batch.
        updated: qualified names of the buffers that the graph updates.
    """

    findings: tuple[Finding, ...] = ()
    stored: tuple[StoredStatistics, ...] = ()
    batches: tuple[BatchStatistics, ...] = ()
    updated: tuple[str, ...] = ()
