"""Pathologies of how a running statistic is updated."""

from __future__ import annotations

import math
from collections.abc import Iterator

from bnrewrite.algebra import Reading
from bnrewrite.algebra.expression import Number, Polynomial, added, inverse, number, scaled
from bnrewrite.algebra.ring import Ring
from bnrewrite.algebra.stored import path_of
from bnrewrite.capture.provenance import source_line
from bnrewrite.report.findings import pathology
from bnrewrite.report.site import Finding

from .averages import Average

HALF = 0.5  # a statistic that forgets more than half at each step is none of many batches
DIGITS = 1e-9  # relative: weights are products of a few numbers in float64


def of_update(reading: Reading, average: Average) -> Iterator[Finding]:
    """What is wrong with the update of one running statistic."""
    where, name = source_line(average.node), path_of(average.buffer)
    if average.buffer.meta.get("kind") == "attribute":
        yield pathology("statistic-not-a-buffer", where, name)
    weight = 1 - average.kept
    if not 0 < weight <= 1:
        return
    if HALF < weight < 1 - DIGITS:
        detail = f"{name} keeps {_shown(average.kept)} of its old value"
        yield pathology("momentum-inverted", where, detail)
    if average.is_variance:
        for pathology_name in _of_correction(reading.ring, average, weight):
            yield pathology(pathology_name, where, name)


def _of_correction(ring: Ring, average: Average, weight: Number) -> tuple[str, ...]:
    """The pathologies of what a variance is multiplied by, n / (n - 1) where all is right."""
    own, batch = (bessel(ring, each) for each in (average.count, average.batch))
    if own is None or batch is None:
        return ()
    correction = scaled(average.factor, inverse(weight))
    if _close(correction, number(1)) or _close(correction, own):
        return ()
    by_batch = "variance-corrected-by-batch-size"
    if _close(correction, ring.multiply(own, own)):
        return ("variance-corrected-twice",)
    if _close(correction, batch):
        return (by_batch,)
    if _close(correction, ring.multiply(own, batch)):
        return "variance-corrected-twice", by_batch
    return ()


def bessel(ring: Ring, count: Polynomial) -> Polynomial | None:
    """N / (n - 1); None for n = 1."""
    if count.constant == 1:
        return None
    return ring.divide(count, added(count, number(1), -1))


def _close(left: Polynomial, right: Polynomial) -> bool:
    return left.terms.keys() == right.terms.keys() and all(
        math.isclose(float(left.terms[each]), float(right.terms[each]), rel_tol=DIGITS)
        for each in left.terms
    )


def _shown(value: Number) -> str:
    return f"{float(value):.4g}"
