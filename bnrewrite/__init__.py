"""bnrewrite: reads normalisations out of a model's graph by algebra and gives them native speed.

`optimize(model)` returns the same model; `explain(model, *inputs)` tells what is found in it;
`verify(original, optimized, *inputs)` checks that both compute the same.
"""

from bnrewrite.capture.explain import explain
from bnrewrite.capture.optimize import optimize
from bnrewrite.options import BnrewriteWarning
from bnrewrite.report import Finding, Report, Site, Verification
from bnrewrite.verification import verify

__all__ = [
    "BnrewriteWarning",
    "Finding",
    "Report",
    "Site",
    "Verification",
    "explain",
    "optimize",
    "verify",
]
