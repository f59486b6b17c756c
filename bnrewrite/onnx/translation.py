"""How PyTorch's norms are written in ONNX: the translations that the exporter is given.

Each norm becomes one standard operation where the provider has a kernel for it (`kernels.py`), else
the shortest sequence of operations with the same formula; in float64 always, since the eps of an
operation is a float32 number. The exporter calls these functions with
`onnx_ir` values for tensors and plain Python values for the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset18, opset21, opset23

from .kernels import has_kernel

aten = torch.ops.aten
op: Any = opset18  # their types are of onnxscript's own language, not of the values here
op21: Any = opset21
op23: Any = opset23
Value = Any  # an onnx_ir.Value, for whose operators there are no types

_DTYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
}


def translation_table(target: str, opset: int) -> dict[Any, Callable[..., Any]]:
    """What the exporter writes for PyTorch's norms, for a provider and an opset."""
    norms = _Norms(target, opset)
    table: dict[Any, Callable[..., Any]] = {
        aten.layer_norm.default: norms.layer_norm,
        aten.rms_norm.default: norms.rms_norm,
        aten.group_norm.default: norms.group_norm,
        aten.instance_norm.default: norms.instance_norm,
        aten.var_mean.correction: norms.var_mean,
        aten.var.correction: norms.variance,
        aten.var.dim: norms.variance,
        aten.std.correction: norms.deviation,
        aten.std.dim: norms.deviation,
        aten.addcmul.default: norms.addcmul,
    }
    return {operator: _function(method) for operator, method in table.items()}


def _function(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method as a function, on which the exporter sets an attribute."""

    def translate(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return translate


class _Norms:
    """Translations of the norms, by the signatures of PyTorch's operators."""

    def __init__(self, target: str, opset: int) -> None:
        self.target = target
        self.opset = opset

    def _has(self, operation: str, x: Value) -> bool:
        """Whether the target has a kernel, and its eps, a float32 number, is the user's."""
        dtype = _DTYPES.get(x.dtype)
        if dtype is None or dtype == torch.float64:
            return False
        return has_kernel(operation, self.target, self.opset, dtype)

    def layer_norm(
        self,
        input: Value,
        normalized_shape: Sequence[Any],
        weight: Value = None,
        bias: Value = None,
        eps: float = 1e-05,
        cudnn_enable: bool = True,
    ) -> Value:
        """(x - E[x]) / sqrt(V[x] + eps) * weight + bias over the last axes."""
        axis = -len(normalized_shape)
        if not self._has("LayerNormalization", input):
            rank = len(input.shape)
            y = _standardised(input, range(rank + axis, rank), eps)
            y = y if weight is None else op.Mul(y, weight)
            return y if bias is None else op.Add(y, bias)
        scale = weight if weight is not None else _ones(input, normalized_shape)
        return _first(op.LayerNormalization(input, scale, bias, axis=axis, epsilon=eps))

    def rms_norm(
        self,
        input: Value,
        normalized_shape: Sequence[Any],
        weight: Value = None,
        eps: float | None = None,
    ) -> Value:
        """X / sqrt(E[x^2] + eps) * weight over the last axes.

        Without the operation: the five nodes that onnxruntime fuses when it loads a file.
        """
        axis = -len(normalized_shape)
        if eps is None:
            # PyTorch's default is that of the dtype it computes in
            wide = torch.float64 if input.dtype == ir.DataType.DOUBLE else torch.float32
            eps = torch.finfo(wide).eps
        if self._has("RMSNormalization", input):
            scale = weight if weight is not None else _ones(input, normalized_shape)
            return op23.RMSNormalization(input, scale, axis=axis, epsilon=eps)
        half = input.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
        x = op.Cast(input, to=ir.DataType.FLOAT) if half else input
        dtype = ir.DataType.FLOAT if half else input.dtype
        axes = op.Constant(value_ints=list(range(axis, 0)))
        # onnxruntime fuses this as a power, and reads a float64 eps as 1e-5 then
        fused = dtype != ir.DataType.DOUBLE
        square = op.Pow(x, _constant([2.0], dtype, ())) if fused else op.Mul(x, x)
        mean = op.ReduceMean(square, axes)
        root = op.Sqrt(op.Add(mean, _constant([eps], dtype, ())))
        y = op.Div(x, root)
        y = op.Cast(y, to=input.dtype) if half else y
        return y if weight is None else op.Mul(y, weight)

    def group_norm(
        self,
        input: Value,
        num_groups: int,
        weight: Value = None,
        bias: Value = None,
        eps: float = 1e-05,
        cudnn_enabled: bool = True,
    ) -> Value:
        """Each group of channels of each sample by its own mean and variance."""
        channels = input.shape[1]
        if num_groups == channels and len(input.shape) >= 3:
            return self.instance_norm(input, weight, bias, eps=eps)
        if self._has("GroupNormalization", input) and isinstance(channels, int):
            scale = weight if weight is not None else _filled(1.0, input, (channels,))
            shift = bias if bias is not None else _filled(0.0, input, (channels,))
            return op21.GroupNormalization(input, scale, shift, num_groups=num_groups, epsilon=eps)
        groups = op.Reshape(input, op.Constant(value_ints=[0, num_groups, -1]))
        groups = self._rows(groups, input, num_groups, eps)
        return self._affine(_shaped_like(groups, input), input, weight, bias)

    def instance_norm(
        self,
        input: Value,
        weight: Value = None,
        bias: Value = None,
        running_mean: Value = None,
        running_var: Value = None,
        use_input_stats: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-05,
        cudnn_enabled: bool = True,
    ) -> Value:
        """Each channel of each sample by its own mean and variance, or by stored ones."""
        channels = input.shape[1]
        size = (channels,)
        if not use_input_stats:
            scale = weight if weight is not None else _filled(1.0, input, size)
            shift = bias if bias is not None else _filled(0.0, input, size)
            return _first(
                op.BatchNormalization(input, scale, shift, running_mean, running_var, epsilon=eps)
            )
        if self._has("InstanceNormalization", input) and isinstance(channels, int):
            scale = weight if weight is not None else _filled(1.0, input, size)
            shift = bias if bias is not None else _filled(0.0, input, size)
            return op.InstanceNormalization(input, scale, shift, epsilon=eps)
        if input.dtype == ir.DataType.DOUBLE:
            y = _standardised(input, range(2, len(input.shape)), eps)
            return self._affine(y, input, weight, bias)
        rows = op.Reshape(input, op.Constant(value_ints=[0, 0, -1]))
        rows = self._rows(rows, input, channels, eps)
        return self._affine(_shaped_like(rows, input), input, weight, bias)

    def _rows(self, rows: Value, like: Value, count: Any, eps: float) -> Value:
        """Each row of (N, G, L) by its own mean and variance."""
        if self._has("InstanceNormalization", like) and isinstance(count, int):
            scale, shift = _filled(1.0, like, (count,)), _filled(0.0, like, (count,))
            return op.InstanceNormalization(rows, scale, shift, epsilon=eps)
        if not self._has("LayerNormalization", like):
            return _standardised(rows, [2], eps, like.dtype)
        length = op.Shape(rows, start=2)
        ones = op.ConstantOfShape(length, value=_tensor([1.0], like.dtype, (1,)))
        return _first(op.LayerNormalization(rows, ones, axis=-1, epsilon=eps))

    def _affine(self, y: Value, x: Value, weight: Value, bias: Value) -> Value:
        """Y * weight + bias along the channels: in one pass where batch norms have a kernel.

        That of a mean of 0, and a variance which an eps of 1e-5, the least that every version of
        cuDNN takes, makes 1.
        """
        channels = x.shape[1]
        one = isinstance(channels, int) and len(x.shape) >= 3 and weight is not None
        if one and bias is not None and self._has("BatchNormalization", x):
            zeros, rest = (_filled(value, x, (channels,)) for value in (0.0, 1 - 1e-5))
            return _first(op.BatchNormalization(y, weight, bias, zeros, rest, epsilon=1e-5))
        shape = op.Constant(value_ints=[-1, *[1] * (len(x.shape) - 2)])
        if weight is not None:
            y = op.Mul(y, op.Reshape(weight, shape))
        return y if bias is None else op.Add(y, op.Reshape(bias, shape))

    def var_mean(
        self,
        x: Value,
        dim: Sequence[int] | None = None,
        *,
        correction: float | None = None,
        keepdim: bool = False,
    ) -> tuple[Value, Value]:
        """V and E[x]: the centred second moment, which loses no digits beside a large mean."""
        axes, mean, variance = _moments(x, dim, 1.0 if correction is None else float(correction))
        if keepdim:
            return variance, mean
        return op.Squeeze(variance, axes), op.Squeeze(mean, axes)

    def variance(self, x: Value, dim: Any = None, *args: Any, **kwargs: Any) -> Value:
        """V in any of its signatures."""
        correction, keepdim = _correction(args, kwargs)
        axes, _, variance = _moments(x, dim, correction)
        return variance if keepdim else op.Squeeze(variance, axes)

    def deviation(self, x: Value, dim: Any = None, *args: Any, **kwargs: Any) -> Value:
        """The root of V in any of its signatures."""
        return op.Sqrt(self.variance(x, dim, *args, **kwargs))

    def addcmul(self, x: Value, first: Value, second: Value, *, value: float = 1) -> Value:
        """X + value * first * second; the exporter's own multiplies by 1 too."""
        product = op.Mul(first, second)
        if value != 1:
            product = op.Mul(product, _constant([value], x.dtype, ()))
        return op.Add(x, product)


def _correction(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, bool]:
    """What is subtracted from the count, and whether dimensions stay."""
    positional = dict(zip(("unbiased", "keepdim"), args, strict=False))
    given = {**positional, **kwargs}
    correction = given.get("correction", given.get("unbiased", True))
    return 1.0 if correction is None else float(correction), bool(given.get("keepdim", False))


def _standardised(
    x: Value, dims: Iterable[int], eps: float, dtype: ir.DataType | None = None
) -> Value:
    """(x - E[x]) / sqrt(V + eps) with an eps of x's own precision."""
    axes = op.Constant(value_ints=list(dims))
    centred = op.Sub(x, op.ReduceMean(x, axes, keepdims=1))
    variance = op.ReduceMean(op.Mul(centred, centred), axes, keepdims=1)
    added = _constant([eps], dtype or x.dtype, ())
    return op.Div(centred, op.Sqrt(op.Add(variance, added)))


def _moments(x: Value, dim: Sequence[int] | None, lost: float) -> tuple[Value, Value, Value]:
    """The axes as a constant, E[x] and V with `lost` subtracted from the count."""
    rank = len(x.shape)
    dims = sorted(d % rank for d in dim) if dim else list(range(rank))
    axes = op.Constant(value_ints=dims)
    mean = op.ReduceMean(x, axes, keepdims=1)
    centred = op.Sub(x, mean)
    variance = op.ReduceMean(op.Mul(centred, centred), axes, keepdims=1)
    if not lost:
        return axes, mean, variance
    sizes = [x.shape[d] for d in dims]
    if all(isinstance(size, int) for size in sizes):
        count = math.prod(sizes)
        factor = count / (count - lost) if count > lost else math.nan if count else 0.0
        return axes, mean, op.Mul(variance, _constant([factor], x.dtype, ()))
    found = op.Cast(op.ReduceProd(op.Gather(op.Shape(x), axes), keepdims=0), to=x.dtype)
    left = op.Sub(found, _constant([lost], x.dtype, ()))
    return axes, mean, op.Div(op.Mul(variance, found), left)


def _first(outputs: Value) -> Value:
    """The result of an operation that may have statistics as further outputs."""
    return outputs[0] if isinstance(outputs, Sequence) else outputs


def _ones(x: Value, shape: Sequence[Any]) -> Value:
    """The neutral weight of a norm over the last axes."""
    if all(isinstance(size, int) for size in shape):
        return _filled(1.0, x, tuple(shape))
    sizes = op.Shape(x, start=-len(shape))
    return op.ConstantOfShape(sizes, value=_tensor([1.0], x.dtype, (1,)))


def _filled(value: float, x: Value, shape: tuple[int, ...]) -> Value:
    count = 1
    for size in shape:
        count *= size
    return _constant([value] * count, x.dtype, shape)


def _constant(values: list[float], dtype: ir.DataType, shape: tuple[int, ...]) -> Value:
    return op.Constant(value=_tensor(values, dtype, shape))


def _tensor(values: list[float], dtype: ir.DataType, shape: tuple[int, ...]) -> ir.TensorProtocol:
    import numpy as np

    return ir.tensor(np.array(values).reshape(shape).astype(dtype.numpy()), dtype=dtype)


def _shaped_like(rows: Value, x: Value) -> Value:
    """Rows as the tensor that they were reshaped from."""
    sizes = list(x.shape)
    unknown = [i for i, size in enumerate(sizes) if not isinstance(size, int)]
    if unknown in ([], [0]):
        return op.Reshape(rows, op.Constant(value_ints=[0, *sizes[1:]]))
    return op.Reshape(rows, op.Shape(x))
