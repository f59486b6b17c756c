"""The operations that the algebra knows, by name."""

from __future__ import annotations

from typing import Any

from .pointwise import POINTWISE
from .reductions import REDUCTIONS
from .shapes import SHAPES

SEMANTICS: dict[str, Any] = {**SHAPES, **POINTWISE, **REDUCTIONS}
