"""Kernels that are printed from formulas: a program is a text, its C++ is compiled once."""

from __future__ import annotations

from .build import why_no_kernels
from .call import norm, norm_with_updates
from .check import check_program, copied, may_follow_residual

__all__ = [
    "check_program",
    "copied",
    "may_follow_residual",
    "norm",
    "norm_with_updates",
    "why_no_kernels",
]
