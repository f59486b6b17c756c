"""The pathologies of hand-written norms: a code, the cause in one line, and the fix.

Raised nowhere: whoever notices one (a capture, a pass) adds ``pathology(code, source)`` to the
report.
"""

from __future__ import annotations

from dataclasses import dataclass

from .site import Finding


@dataclass(frozen=True)
class Pathology:
    """Why code of this kind goes wrong, and what to write instead."""

    cause: str
    fix: str


PATHOLOGIES: dict[str, Pathology] = {
    "buffer-rebound": Pathology(
        "the buffer is bound to a new tensor instead of updated, so DataParallel, DDP and a strict "
        "export lose the update",
        "write self.buffer.copy_(value.detach())",
    ),
    "statistic-with-history": Pathology(
        "the running statistic keeps its autograd history: memory grows with every step, or the "
        "second backward raises",
        "update it from statistic.detach()",
    ),
    "statistic-not-a-buffer": Pathology(
        "the running statistic is a plain attribute: state_dict() does not save it and .to() does "
        "not move it",
        "use self.register_buffer(name, tensor)",
    ),
    "normalises-with-running-statistics": Pathology(
        "training normalises with running instead of batch statistics, so the output is not "
        "normalised and gradients are scaled by the momentum",
        "normalise with the batch statistics while self.training",
    ),
    "variance-corrected-twice": Pathology(
        "var() is unbiased already and is multiplied by n / (n - 1) once more",
        "drop the factor, or use var(correction=0)",
    ),
    "variance-corrected-by-batch-size": Pathology(
        "the variance is corrected by the batch size, but it was taken over more elements",
        "use n = x.numel() / x.size(1)",
    ),
    "momentum-inverted": Pathology(
        "momentum weighs the old value here; in torch it weighs the new one",
        "pass 1 - momentum when moving to or from nn.BatchNorm",
    ),
    "no-eps": Pathology(
        "nothing keeps the denominator from zero: a zero vector or constant channel gives NaN",
        "add an eps under the root",
    ),
    "cancellation": Pathology(
        "E[x^2] - E[x]^2 cancels where the mean is large against the deviation, and may turn "
        "negative",
        "use var(correction=0), or the mean of (x - mean)^2",
    ),
    "float16-overflow": Pathology(
        "a square in float16 overflows from 256 on",
        "take the statistics of x.float()",
    ),
    "statistics-never-updated": Pathology(
        "the running statistics are read in eval mode but never updated",
        "update them while self.training",
    ),
    "two-updates-per-step": Pathology(
        "under activation checkpointing the forward runs twice and updates the statistics twice",
        "keep the norm outside the checkpointed block",
    ),
}


def pathology(code: str, source: str, detail: str = "") -> Finding:
    """The finding of a known pathology.

    Args:
        code: a key of ``PATHOLOGIES``.
        source: ``"file.py:123"``.
        detail: what it was seen on, such as the name of a buffer; leads the message.

    Raises:
        KeyError: the code is not a known one.
    """
    known = PATHOLOGIES[code]
    lead = f"{detail}: " if detail else ""
    return Finding(code, f"{lead}{known.cause}; {known.fix}", source)
