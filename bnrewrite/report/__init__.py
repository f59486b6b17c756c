"""What was found in a model, what became of it, and why."""

from .findings import PATHOLOGIES, pathology
from .report import Report
from .site import LEFT, REWRITTEN, Finding, Kept, Site
from .verdict import Check, Verification

__all__ = [
    "LEFT",
    "PATHOLOGIES",
    "REWRITTEN",
    "Check",
    "Finding",
    "Kept",
    "Report",
    "Site",
    "Verification",
    "pathology",
]
