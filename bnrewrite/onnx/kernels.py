"""Which standard operation a provider has a kernel for: the table that the choice is made from.

Read from the documentation of onnxruntime's kernels and held against the installed onnxruntime by
`tests/test_onnx_kernels.py` (the CPU provider; CUDA and TensorRT on a machine that has them: until
then their rows are what the documentation says, TensorRT's all of them unverified).

Left out on purpose:

- `LpNormalization` has no eps: x / max(|x|, eps) differs from it at every short row, and the CUDA
  provider has no kernel. A norm by a length is `ReduceL2`, `Max`, `Div`.
- `GroupNormalization` has a kernel in TensorRT alone; onnxruntime expands it to 29 nodes (11.5 ms
  at 8x64x56x56 on a CPU, where `InstanceNormalization` over reshaped groups takes 0.74).
- `BatchNormalization` of a matrix: 8.1 ms on a CPU where a multiply-add takes 0.4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

Target = Literal["cuda", "cpu", "tensorrt"]
TARGETS: tuple[str, ...] = get_args(Target)
PROVIDERS: dict[str, str] = {
    "cuda": "CUDAExecutionProvider",
    "cpu": "CPUExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
OPSETS = range(17, 25)

FLOAT, DOUBLE, HALF, BRAIN = torch.float32, torch.float64, torch.float16, torch.bfloat16
Dtypes = frozenset[torch.dtype]


@dataclass(frozen=True)
class Kernel:
    """One operation and where it runs as one kernel.

    Attributes:
        since: the first opset whose definition of the operation is meant.
        dtypes: for each target, of the tensor that is normalised.
    """

    since: int
    dtypes: dict[str, Dtypes]


def _dtypes(*found: torch.dtype) -> Dtypes:
    return frozenset(found)


KERNELS: dict[str, Kernel] = {
    "LayerNormalization": Kernel(
        17,
        {
            "cuda": _dtypes(FLOAT, DOUBLE, HALF, BRAIN),
            "cpu": _dtypes(FLOAT, DOUBLE, HALF, BRAIN),
            "tensorrt": _dtypes(FLOAT, HALF, BRAIN),
        },
    ),
    "RMSNormalization": Kernel(
        23,
        {
            "cuda": _dtypes(FLOAT, DOUBLE, HALF, BRAIN),
            "cpu": _dtypes(FLOAT, DOUBLE, HALF),
            "tensorrt": _dtypes(FLOAT, HALF, BRAIN),
        },
    ),
    "InstanceNormalization": Kernel(
        6,
        {
            "cuda": _dtypes(FLOAT, DOUBLE, HALF),
            "cpu": _dtypes(FLOAT),
            "tensorrt": _dtypes(FLOAT, HALF),
        },
    ),
    "BatchNormalization": Kernel(
        15,
        {
            "cuda": _dtypes(FLOAT, DOUBLE, HALF),
            "cpu": _dtypes(FLOAT, DOUBLE),
            "tensorrt": _dtypes(FLOAT, HALF),
        },
    ),
    "GroupNormalization": Kernel(
        21,
        {"cuda": _dtypes(), "cpu": _dtypes(), "tensorrt": _dtypes(FLOAT, HALF)},
    ),
}


def has_kernel(operation: str, target: str, opset: int, dtype: torch.dtype) -> bool:
    """Whether a provider runs an operation of an opset as one kernel, in this dtype.

    A half-precision operation without a kernel of its own on the CPU counts where onnxruntime
    puts casts around the float32 one.
    """
    kernel = KERNELS[operation]
    if opset < kernel.since:
        return False
    found = kernel.dtypes[target]
    return dtype in found or (target == "cpu" and dtype == HALF and FLOAT in found)
