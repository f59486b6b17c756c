"""What a user can switch, as plain data: it is copied and pickled with the user's model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

KINDS = (
    "batch_norm",
    "layer_norm",
    "rms_norm",
    "instance_norm",
    "group_norm",
    "lp_normalize",
    "weight_standardization",
    "affine",
    "general",
)
KERNELS = ("auto", "native", "generated", "composite")

Stage = Literal["eager", "inductor", "export", "script"]


class BnrewriteWarning(UserWarning):
    """A part of a model runs as the user wrote it; the text says why."""


@dataclass(frozen=True)
class Options:
    """How a canonical graph is rewritten.

    Attributes:
        strict: leave alone every site whose rewriting is more accurate than its source.
        disable: names of passes and kinds of norm that are switched off.
        only: kinds of norm or site numbers that are rewritten, None for all.
        kernels: "auto" for the fastest lowering that is available; "native" for PyTorch's own
            operators alone; "generated" for kernels printed from the formula wherever it has one
            (on a GPU only then: they have not been measured there);
            "composite" for moments and a multiply-add alone.
        sync_stats: the name of the process group over which statistics of the batch are
            synchronised, "" for all processes, None for none.
        stage: what runs the rewritten graph.
        diagnose: name the pathologies of the graph's norms and statistics, as `explain` does.
    """

    strict: bool = False
    disable: frozenset[str] = frozenset()
    only: frozenset[str | int] | None = None
    kernels: str = "auto"
    sync_stats: str | None = None
    stage: Stage = "eager"
    diagnose: bool = False
