"""What each tensor of a graph means, and which norms that makes."""

from .accuracy import cancels, centre, chain, remarks, shares_its_errors, squares_in_half
from .formula import formula
from .match import Match
from .meaning import Meaning, Reading, read
from .selection import find, further

__all__ = [
    "Match",
    "Meaning",
    "Reading",
    "cancels",
    "centre",
    "chain",
    "find",
    "formula",
    "further",
    "read",
    "remarks",
    "shares_its_errors",
    "squares_in_half",
]
