"""How a tensor lies in memory, as the native operators of a CPU ask it."""

from __future__ import annotations

import torch
from torch import Tensor

_DENSE = {4: torch.channels_last, 5: torch.channels_last_3d}


def has_dense_channels(x: Tensor) -> bool:
    """Whether the channels of an image or volume on a CPU are its dense dimension."""
    if x.dim() not in _DENSE or x.device.type != "cpu" or x.is_contiguous():
        return False
    return x.is_contiguous(memory_format=_DENSE[x.dim()])
