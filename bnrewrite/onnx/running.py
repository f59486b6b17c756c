"""An exported file as a function with the call and the result of the user's model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, SymIntArgument, TensorArgument
from torch.utils._pytree import tree_flatten, tree_unflatten

from .session import Session


class Exported:
    """Calls a session with a model's arguments; gives its results in the model's structure.

    Results have the dtypes of the model's, and are on the device of its first argument.
    """

    def __init__(self, program: ExportedProgram, session: Session) -> None:
        self.program = program
        self.session = session

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's result, by the file."""
        leaves, _ = tree_flatten((args, kwargs))
        ports = {port.name: port for port in self.session.inputs}
        given: dict[str, Tensor] = {}
        for name, value in zip(self.program.graph_signature.user_inputs, leaves, strict=True):
            if isinstance(name, str) and name in ports and isinstance(value, Tensor):
                given[name] = value.to(ports[name].dtype)
        device = next((x.device for x in leaves if isinstance(x, Tensor)), torch.device("cpu"))
        results = iter(self.session.run(given).values())
        values = [
            self._value(spec.arg, results, device)
            for spec in self.program.graph_signature.output_specs
        ]
        spec = self.program.call_spec.out_spec
        assert spec is not None
        return tree_unflatten(values, spec)

    def _value(self, argument: Any, results: Any, device: torch.device) -> Any:
        if isinstance(argument, ConstantArgument):
            return argument.value
        found = next(results)
        if isinstance(argument, SymIntArgument):
            return int(found)
        assert isinstance(argument, TensorArgument)
        dtypes = {n.name: n.meta.get("val") for n in self.program.graph.nodes}
        return found.to(device, dtypes[argument.name].dtype)


def has_brain_floats(model: ir.Model) -> bool:
    """Whether a model computes in bfloat16, which onnxruntime's CPU provider does not."""
    return any(value.dtype == ir.DataType.BFLOAT16 for value in _values(model))


def save_in_float32(model: ir.Model, path: Path) -> None:
    """Write a model with float32 in the place of bfloat16: the same operations, more digits."""
    wide = model.clone()
    for value in _values(wide):
        if value.dtype == ir.DataType.BFLOAT16:
            value.dtype = ir.DataType.FLOAT
        if value.const_value is not None:
            value.const_value = _widened(value.const_value)
    for node in ir.traversal.RecursiveGraphIterator(wide.graph):
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR:
                node.attributes[name] = ir.AttrTensor(name, _widened(attribute.as_tensor()))
            elif name in ("to", "dtype") and attribute.value == ir.DataType.BFLOAT16:
                node.attributes[name] = ir.AttrInt64(name, ir.DataType.FLOAT)
    ir.save(wide, path, external_data=path.name + ".data")


def _widened(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    if tensor.dtype != ir.DataType.BFLOAT16:
        return tensor
    return ir.tensor(tensor.numpy().astype("float32"), name=tensor.name)


def _values(model: ir.Model) -> list[ir.Value]:
    found = [*model.graph.inputs, *model.graph.initializers.values()]
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        found += node.outputs
    return found
