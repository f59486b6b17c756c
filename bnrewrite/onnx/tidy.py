"""Drop what the exporter leaves behind, by rules that change no value.

Before:  constants that are cast, shapes that are computed, views of views, unused values
After:   the same function in fewer nodes
Leaves alone: arithmetic. The exporter's own optimiser (`optimize=True`) compares with a tolerance
of 1e-8 and so takes `variance + 1e-9` for `variance`; it is not used.
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript import optimizer, rewriter
from onnxscript.rewriter.rules import common as rules

# Each is an identity of indices, dtypes or shapes. Rules that match numbers or fold weights are
# left out; so is `cast_cast_rule`, which forgets the rounding of the inner cast.
RULES = (
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.no_op_transpose_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.materialize_reshape_shape_rule,
    rules.reshape_reshape_rule,
    rules.squeeze_reshape_1d_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.cast_constant_of_shape_rule,
    rules.cast_constant_of_shape_without_value_rule,
    rules.no_op_static_scatter_nd_rule,
    rules.no_op_dynamic_scatter_nd_rule,
)
ROUNDS = 3
CONVOLUTIONS = ("Conv", "ConvTranspose")


def tidy(model: ir.Model) -> None:
    """Change a model in place, until nothing changes any more."""
    stored = set(model.graph.initializers)
    common.InlinePass()(model)
    for _ in range(ROUNDS):
        before = _count(model)
        optimizer.fold_constants(model, onnx_shape_inference=True)
        rewriter.rewrite(model, RULES)
        common.IdentityEliminationPass()(model)
        common.RemoveUnusedNodesPass()(model)
        if _count(model) == before:
            break
    _drop_added_biases(model, stored)
    common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.LiftSubgraphInitializersToMainGraphPass()(model)
    common.DeduplicateInitializersPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    common.OutputFixPass()(model)
    common.NameFixPass()(model)


def _drop_added_biases(model: ir.Model, stored: set[str]) -> None:
    """Zeros for the bias of a convolution that has none; those of volumes have a wrong shape."""
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_type not in CONVOLUTIONS or len(node.inputs) < 3:
            continue
        bias = node.inputs[2]
        value = None if bias is None else ir.convenience.get_const_tensor(bias)
        is_added = bias is not None and bias.name not in stored
        if is_added and value is not None and not value.numpy().any():
            node.resize_inputs(2)


def _count(model: ir.Model) -> int:
    return sum(1 for _ in ir.traversal.RecursiveGraphIterator(model.graph))
