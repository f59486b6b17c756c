"""The passes that turn a canonical graph into one with fast norms.

Each is usable alone on a ``Rewriting``; ``PIPELINE`` is their order, with the reason for it.
"""

from __future__ import annotations

if __name__ != "bnrewrite.passes":
    raise ImportError(
        f"imported as {__name__!r}: a second copy of the passes; import bnrewrite.passes instead"
    )

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from bnrewrite.capture.canonical import Canonical
from bnrewrite.options import Options
from bnrewrite.report.site import Site

from .cleanup import Cleanup
from .diagnose import Diagnose
from .epilogue import TakeEpilogues
from .fold import Fold
from .layout import Layout
from .lower import Lower
from .plan import Plan
from .recognise import Recognise
from .rewriting import Pass, Rewriting

PIPELINE: tuple[Pass, ...] = (
    Recognise(),  # the algebra's verdicts; nothing changed yet
    Diagnose(),  # while the formulas are still the user's; for `explain` alone
    TakeEpilogues(),  # before Plan: it says what a kernel would have to carry
    Plan(),  # the last decision: what each site becomes, or why it stays
    Layout(),  # before Lower: it keeps how what it replaces lies in memory
    Lower(),  # writes what was planned
    Fold(),  # needs what was written: a folded norm falls back on it where values forbid
    Cleanup(),  # drops what the replaced formulas leave behind
)


def rewrite(
    canonical: Canonical, options: Options, constants: Mapping[str, Tensor] | None = None
) -> tuple[Site, ...]:
    """Run the pipeline on a canonical graph, which is changed in place.

    Args:
        canonical: the graph, with fake values in ``meta["val"]``.
        options: what may be rewritten, and for which stage.
        constants: values of parameters and buffers by the names of their placeholders, for a
            graph in which they never change any more, as in an export. Folded ones become buffers
            ``folded_weight_0``, ``folded_bias_0``, ... of the graph's module.

    Returns:
        One record per norm site, rewritten or left, in graph order.
    """
    rewriting = Rewriting(canonical, options, constants)
    with _without_garbage_collection():
        for one in PIPELINE:
            if one.name not in options.disable:
                one.run(rewriting)
    return rewriting.records()


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Formulas are many small objects: the collector would go through all of Dynamo's for them.

    A third of the time at 400 sites, and more the larger the model.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
