"""The pathologies of hand-written norms: a code, a name, the cause in one line, and the fix.

Raised nowhere: whoever notices one (a capture, a pass) adds ``pathology(name, source)`` to the
report. A code is never given to another pathology; docs/findings.md has a section for each.
"""

from __future__ import annotations

from dataclasses import dataclass

from .site import Finding


@dataclass(frozen=True)
class Pathology:
    """Why code of this kind goes wrong, and what to write instead."""

    code: str
    cause: str
    fix: str


PATHOLOGIES: dict[str, Pathology] = {
    "buffer-rebound": Pathology(
        "BNR001",
        "the buffer is bound to a new tensor instead of updated, so DataParallel, DDP and a strict "
        "export lose the update",
        "write self.buffer.copy_(value.detach())",
    ),
    "statistic-with-history": Pathology(
        "BNR002",
        "the running statistic keeps its autograd history: memory grows with every step, or the "
        "second backward raises",
        "update it from statistic.detach()",
    ),
    "statistic-not-a-buffer": Pathology(
        "BNR003",
        "the running statistic is a plain attribute: state_dict() does not save it and .to() does "
        "not move it",
        "use self.register_buffer(name, tensor)",
    ),
    "normalises-with-running-statistics": Pathology(
        "BNR004",
        "training normalises with running instead of batch statistics, so the output is not "
        "normalised and gradients are scaled by the momentum",
        "normalise with the batch's own statistics while self.training",
    ),
    "variance-corrected-twice": Pathology(
        "BNR005",
        "var() is unbiased already and is multiplied by n / (n - 1) once more",
        "drop the factor, or use var(correction=0)",
    ),
    "variance-corrected-by-batch-size": Pathology(
        "BNR006",
        "the variance is corrected by the batch size, but it was taken over more elements",
        "use n = x.numel() / x.size(1)",
    ),
    "momentum-inverted": Pathology(
        "BNR007",
        "the new batch outweighs all that was seen before, so the running statistic is little more "
        "than the last batch's: momentum weighs the old value here, in torch it weighs the new one",
        "swap momentum and 1 - momentum",
    ),
    "no-eps": Pathology(
        "BNR008",
        "nothing keeps the denominator from zero: a zero vector or constant channel gives NaN",
        "add an eps under the root",
    ),
    "cancellation": Pathology(
        "BNR009",
        "E[x^2] - E[x]^2 cancels where the mean is large against the deviation, and may turn "
        "negative",
        "use var(correction=0), or the mean of (x - mean)^2",
    ),
    "float16-overflow": Pathology(
        "BNR010",
        "a square in float16 overflows from 256 on",
        "take the statistics of x.float()",
    ),
    "statistics-never-updated": Pathology(
        "BNR011",
        "the running statistics are read in eval mode but never updated",
        "update them while self.training",
    ),
    "two-updates-per-step": Pathology(
        "BNR012",
        "under activation checkpointing the forward runs twice and updates the statistics twice",
        "keep the norm outside the checkpointed block",
    ),
    "frozen-but-updated": Pathology(
        "BNR013",
        "the weight and bias of the norm are frozen, but every step in training mode still moves "
        "its running statistics",
        "call .eval() on frozen norms after model.train()",
    ),
    "domain-statistics-broadcast": Pathology(
        "BNR014",
        "only one of several norms is updated in this call, and the wrapper then gives every "
        "process the buffers of the first: statistics of the other domains are lost",
        "merge the statistics of all processes, and switch broadcast_buffers off",
    ),
    "never-updated-statistics-used": Pathology(
        "BNR015",
        "the norm uses stored statistics that still have their first values: nothing has updated "
        "or loaded them",
        "train for a few steps, or load a checkpoint, before model.eval()",
    ),
    "replica-statistics-discarded": Pathology(
        "BNR016",
        "DataParallel keeps the buffers of its first replica and discards what the others update, "
        "so running statistics follow only the first device's part of each batch",
        "use DistributedDataParallel, with optimize(model, sync_stats=True) for the statistics of "
        "all samples",
    ),
}


def pathology(name: str, source: str, detail: str = "") -> Finding:
    """The finding of a known pathology.

    Args:
        name: a key of ``PATHOLOGIES``.
        source: ``"file.py:123"``.
        detail: what it was seen on, such as the name of a buffer; leads the message.

    Raises:
        KeyError: the name is not a known one.
    """
    known = PATHOLOGIES[name]
    lead = f"{detail}: " if detail else ""
    return Finding(known.code, f"{lead}{known.cause}; {known.fix}", source, name)
