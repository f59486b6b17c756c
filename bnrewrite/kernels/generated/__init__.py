"""Kernels that are printed from formulas: a program is a text, its C++ is compiled once."""

from __future__ import annotations

from .arranged import FLOATING
from .build import why_no_kernels
from .call import norm, norm_with_updates, operator_of
from .check import check_program, may_follow_residual, never_kept

__all__ = [
    "FLOATING",
    "check_program",
    "may_follow_residual",
    "never_kept",
    "norm",
    "norm_with_updates",
    "operator_of",
    "why_no_kernels",
]
