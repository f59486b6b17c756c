"""A user's model -> canonical graph (functional, pre-autograd ATen)."""

from bnrewrite.capture.canonical import Canonical, CaptureError, Input, canonicalise
from bnrewrite.capture.convenience import capture

__all__ = ["Canonical", "CaptureError", "Input", "canonicalise", "capture"]
