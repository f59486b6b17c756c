"""Hand-written norm modules become the modules of `torch.nn` that they are equal to."""

from .convert import convert
from .record import Conversion, Outcome

__all__ = ["Conversion", "Outcome", "convert"]
