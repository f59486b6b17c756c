"""What replaced norms run on where no single native operator is right for every value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .batched import batch_norm
from .folding import folded
from .frozen import frozen_batch_norm
from .generated import (
    FLOATING,
    check_program,
    may_follow_residual,
    never_kept,
    norm,
    norm_with_updates,
    operator_of,
    why_no_kernels,
)
from .grouped import group_norm
from .layout import has_dense_channels
from .rows import layer_norm
from .synchronised import synchronised_moments
from .triton import why_no_triton

__all__ = [
    "FLOATING",
    "KERNELS",
    "batch_norm",
    "check_program",
    "folded",
    "frozen_batch_norm",
    "group_norm",
    "has_dense_channels",
    "layer_norm",
    "may_follow_residual",
    "never_kept",
    "norm",
    "norm_with_updates",
    "operator_of",
    "synchronised_moments",
    "why_no_kernels",
    "why_no_triton",
]

# Each returns a new tensor, and a backward needs its inputs alone.
KERNELS: frozenset[Callable[..., Any]] = frozenset(
    {
        batch_norm,
        folded,
        frozen_batch_norm,
        group_norm,
        layer_norm,
        norm,
        norm_with_updates,
        synchronised_moments,
    }
)
