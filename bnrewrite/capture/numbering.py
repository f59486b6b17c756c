"""Sites are numbered through all graphs of one call, as `explain` lists them.

A graph is rewritten when it is first called, and options may name sites by number. So a graph must
know how many sites stand before it: those of all graphs that the call at hand has run before.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace

from bnrewrite.options import Options
from bnrewrite.report.site import LEFT, Site


class Numbering(threading.local):
    """How many sites the graphs have that the call at hand has run, in each thread."""

    def __init__(self) -> None:
        self._sites: dict[int, int] = {}  # of each graph

    @property
    def count(self) -> int:
        """The number of the next graph's first site."""
        return sum(self._sites.values())

    def begin(self) -> None:
        """A call of the model begins."""
        self._sites.clear()

    def ran(self, graph: int, sites: int) -> None:
        """A graph with so many sites has run; a second time it counts for nothing."""
        self._sites[graph] = sites


def is_numbered(options: Options) -> bool:
    """Whether options name sites by number."""
    return any(isinstance(each, int) for each in options.only or ())


def counted_on(options: Options, count: int) -> Options:
    """The options of a graph, or of a part of one, that begins at site number `count`."""
    if options.only is None:
        return options
    shifted = (each - count if isinstance(each, int) else each for each in options.only)
    return replace(options, only=frozenset(shifted))


def numbered_on(sites: Sequence[Site], options: Options, count: int) -> Iterator[Site]:
    """Its sites, with their numbers in the report where a reason names them.

    Args:
        sites: of a graph that was rewritten with `counted_on(options, count)`.
        options: of the whole.
        count: how many sites stand before.
    """
    for i, site in enumerate(sites):
        if site.status == LEFT and (site.reason or "").startswith(f"site {i} ("):
            only = sorted(map(str, options.only or ()))
            yield replace(site, reason=f"site {i + count} ({site.kind}) is not in {only=}")
        else:
            yield site
