"""A user's model -> canonical graph (functional, pre-autograd ATen)."""

from bnrewrite.capture.canonical import Canonical, Input, canonicalise
from bnrewrite.capture.convenience import capture
from bnrewrite.capture.refusal import CaptureError

__all__ = ["Canonical", "CaptureError", "Input", "canonicalise", "capture"]
