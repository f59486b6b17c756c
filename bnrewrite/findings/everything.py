"""Everything that the formulas of one graph say."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from bnrewrite.algebra import Match, Reading
from bnrewrite.report.site import Finding

from .averages import averages
from .norms import batch_statistics, of_norm, stored_statistics
from .noticed import Noticed
from .updates import of_updates, path_of


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
    findings: list[Finding] = list(of_updates(reading, running))
    for norm in whole:
        findings += of_norm(reading, norm, running)
    stored = (stored_statistics(reading, norm) for norm in whole)
    batches = (batch_statistics(norm) for norm in whole)
    return Noticed(
        tuple(dict.fromkeys(findings)),
        tuple(each for each in stored if each is not None),
        tuple(each for each in batches if each is not None),
        tuple(path_of(node) for node, _ in updates if node.meta.get("stored")),
    )
