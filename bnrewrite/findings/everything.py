"""Everything that the formulas of one graph say."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from torch import fx

from bnrewrite.algebra import Match, Reading
from bnrewrite.algebra.axes import Opaque
from bnrewrite.algebra.stored import path_of
from bnrewrite.report.site import Finding

from .averages import averages
from .norms import batch_statistics, of_norm, stored_statistics
from .noticed import Noticed
from .updates import of_update

logger = logging.getLogger(__name__)


def notice(
    reading: Reading, norms: Sequence[Match], updates: Sequence[tuple[fx.Node, fx.Node]]
) -> Noticed:
    """What is wrong with the norms and the running statistics of a graph.

    Args:
        reading: the meanings of a canonical graph; its placeholders say in ``meta`` what they are.
        norms: the norms that were found in it.
        updates: placeholders that get a new value, and the values.
    """
    running = averages(reading, updates)
    whole = [each for each in norms if not each.left]
    findings = [finding for each in running for finding in _read(of_update(reading, each))]
    findings += [finding for each in whole for finding in _read(of_norm(reading, each, running))]
    stored = (stored_statistics(reading, norm) for norm in whole)
    batches = (batch_statistics(norm) for norm in whole)
    return Noticed(
        tuple(dict.fromkeys(findings)),
        tuple(each for each in stored if each is not None),
        tuple(each for each in batches if each is not None),
        tuple(path_of(node) for node, _ in updates if node.meta.get("stored")),
    )


def _read(findings: Iterator[Finding]) -> list[Finding]:
    """The findings, as far as formulas can be computed with: they may grow beyond the algebra."""
    found: list[Finding] = []
    try:
        found.extend(findings)
    except Opaque:
        logger.debug("a formula is too long to be looked at further", exc_info=True)
    return found
