"""bnrewrite: reads normalisations out of a model's graph by algebra and gives them native speed.

`optimize(model)` returns the same model; `explain(model, *inputs)` tells what is found in it;
`verify(original, optimized, *inputs)` checks that both compute the same. `export_onnx` writes the
model as an ONNX file, `Session` runs one.
"""

from typing import TYPE_CHECKING, Any

from bnrewrite.capture.explain import explain
from bnrewrite.capture.optimize import optimize
from bnrewrite.conversion import Conversion, convert
from bnrewrite.options import BnrewriteWarning
from bnrewrite.report import Finding, Report, Site, Verification
from bnrewrite.verification import verify

if TYPE_CHECKING:
    from bnrewrite.onnx import OnnxExport, Session, export_onnx

__all__ = [
    "BnrewriteWarning",
    "Conversion",
    "Finding",
    "OnnxExport",
    "Report",
    "Session",
    "Site",
    "Verification",
    "convert",
    "explain",
    "export_onnx",
    "optimize",
    "verify",
]


def __getattr__(name: str) -> Any:
    """What needs onnx and onnxruntime is imported when it is first asked for: half a second."""
    if name in ("OnnxExport", "Session", "export_onnx"):
        from bnrewrite import onnx

        return getattr(onnx, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
