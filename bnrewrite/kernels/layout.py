"""What a kernel asks of a tensor: how it lies in memory, and whether it has values at all."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

_DENSE = {4: torch.channels_last, 5: torch.channels_last_3d}


def has_dense_channels(x: Tensor) -> bool:
    """Whether the channels of an image or volume on a CPU are its dense dimension."""
    if x.dim() not in _DENSE or x.device.type != "cpu" or x.is_contiguous():
        return False
    return x.is_contiguous(memory_format=dense_format(x))


def dense_format(x: Tensor) -> torch.memory_format:
    """The memory format of an image or volume whose channels are dense."""
    return _DENSE[x.dim()]


def has_values(x: Tensor) -> bool:
    """Whether a tensor is real: one that is traced has neither values nor always a size."""
    return not isinstance(x, FakeTensor | FunctionalTensor)
