"""Export a model to ONNX and run the file: `bnrewrite.export_onnx`, `bnrewrite.Session`."""

from bnrewrite.onnx.export import export_onnx
from bnrewrite.onnx.record import OnnxExport
from bnrewrite.onnx.refusal import ExportError, MismatchError, SessionError
from bnrewrite.onnx.session import Port, Session

__all__ = [
    "ExportError",
    "MismatchError",
    "OnnxExport",
    "Port",
    "Session",
    "SessionError",
    "export_onnx",
]
