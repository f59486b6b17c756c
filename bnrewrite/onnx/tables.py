"""Which operations a file has, what onnxruntime makes of them, and where each of them runs."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir
import onnxruntime

from .providers import Place
from .refusal import SessionError
from .saving import data_path
from .session import opened

NORMS = (
    "LayerNormalization",
    "RMSNormalization",
    "InstanceNormalization",
    "BatchNormalization",
    "GroupNormalization",
)
Table = dict[str, int]


def operations(model: ir.Model) -> Table:
    """How many nodes of each operation a model has, the most frequent first."""
    counts = Counter(node.op_type for node in ir.traversal.RecursiveGraphIterator(model.graph))
    return dict(counts.most_common())


def optimised_operations(path: Path, place: Place) -> Table | None:
    """The same of what onnxruntime's own optimiser makes of a file; None where it does not load."""
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "optimised.onnx"
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(written)
        # weights beside it: a protobuf ends at 2 GiB
        for key, value in {
            "session.optimized_model_external_initializers_file_name": data_path(written).name,
            "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
        }.items():
            options.add_session_config_entry(key, value)
        try:
            opened(path, place, options)
        except SessionError:
            return None
        return operations(ir.load(written))


def placement(path: Path, place: Place) -> dict[str, Table]:
    """How many nodes of each operation run on each provider, after onnxruntime's optimiser."""
    found: dict[str, Counter[str]] = {}
    for provider, operation in _assignments(path, place):
        found.setdefault(provider, Counter())[operation] += 1
    return {provider: dict(counts.most_common()) for provider, counts in found.items()}


def norms_elsewhere(placed: dict[str, Table], place: Place) -> list[str]:
    """Norms that do not run where the file was meant to run."""
    accelerators = {place.provider, Place("cuda").provider} if place.name != "cpu" else None
    if accelerators is None:
        return []
    return [
        f"{count} {operation} on {provider}"
        for provider, table in placed.items()
        if provider not in accelerators
        for operation, count in table.items()
        if operation in NORMS
    ]


def _assignments(path: Path, place: Place) -> Iterator[tuple[str, str]]:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = opened(path, place, options)
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return  # an older onnxruntime
    for part in session.get_provider_graph_assignment_info():
        for node in part.get_nodes():
            yield part.ep_name, node.op_type
