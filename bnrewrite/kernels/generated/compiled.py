"""From a program's loops to its functions: once in a process, whatever the sizes."""

from __future__ import annotations

import ctypes
from functools import cache

from .build import library
from .columns import columns_source
from .printing import Source
from .rows import rows_source


@cache
def compiled(source: Source) -> ctypes.CDLL:
    """The library with the functions ``forward`` and ``backward`` of a source.

    Raises:
        Unprintable: the formula or layout has no kernel.
        NoCompiler: it could not be compiled, kept or loaded.
    """
    body = columns_source(source) if source.layout.columns else rows_source(source)
    return library(body, source.single)
