"""Kernels that are printed from formulas: a program is a text, its C++ is compiled once."""

from __future__ import annotations

from .build import has_compiler
from .call import norm, norm_with_updates
from .check import check_program

__all__ = ["check_program", "has_compiler", "norm", "norm_with_updates"]
