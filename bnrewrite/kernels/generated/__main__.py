"""Builds the runtime ahead: ``python -m bnrewrite.kernels.generated``."""

from __future__ import annotations

import sys

from .build import NoCompiler
from .runtime import build

try:
    build()
except NoCompiler as reason:
    print(f"norms run without kernels of their own: {reason}", file=sys.stderr)
