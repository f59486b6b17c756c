"""The same formulas on a GPU: kernels printed for Triton from the texts of ``kernels.generated``.

``program.py``, ``gradients.py``, ``layout.py`` and ``reference.py`` there say what a text means, how
it is differentiated, what its loops are and what is right; here it is printed, tiled and launched.
Triton comes with PyTorch for CUDA and is imported when the first kernel is.
"""

from __future__ import annotations

import importlib.util
from functools import cache

__all__ = ["why_no_triton"]


@cache
def why_no_triton() -> str | None:
    """Why nothing can be compiled for a GPU here; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None
