"""A constant affine inside the linear map before it: ``(W x + b) a + s = (a W) x + (a b + s)``.

The folded weight is computed in float64 and kept. Whether it is still right is seen by value:
``.data``, numpy and other processes change values and no version. Comparing reads the weight and
its copy once, which the pass weighs against the elements that an affine would read and write.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.utils.weak import WeakIdKeyDictionary

from .frozen import LARGEST_MEAN


class Unfoldable(Exception):
    """Values that a folded weight would not keep; a sentence."""


PLAIN = (Tensor, nn.Parameter)  # fake and distributed ones have no values to compare here
LARGE = 16384  # elements, from which on the view as integers costs less than it saves
Each = TypeVar("Each")


class Parts(NamedTuple, Generic[Each]):
    """What is folded, as tensors or as the nodes that compute them.

    Attributes:
        weight: of the linear map.
        bias: of shape (C,), or None.
        scale: of shape (C,), float64.
        shift: of shape (C,), float64.
        centre: of shape (C,), float64: what the user's code subtracts first, None where it scales
            first.
        divisor: of shape (C,), float64: the part of the scale that makes deviations one; with a
            centre only.
    """

    weight: Each
    bias: Each | None
    scale: Each
    shift: Each
    centre: Each | None
    divisor: Each | None


@dataclass(frozen=True)
class Outputs:
    """Where the outputs of a linear map stand in its weight.

    Attributes:
        dim: 0 in (outputs, ...), 1 in (inputs, outputs of a group, ...).
        groups: of a transposed convolution, else 1.
    """

    dim: int
    groups: int = 1

    def spread(self, vector: Tensor, weight: Tensor) -> Tensor:
        """A vector over the outputs in a shape that broadcasts against the weight."""
        inner = (1,) * (weight.dim() - 2)
        if self.dim == 0:
            return vector.view(-1, 1, *inner)
        rows = vector.view(self.groups, -1).repeat_interleave(weight.shape[0] // self.groups, 0)
        return rows.view(*rows.shape, *inner)

    def largest(self, weight: Tensor) -> Tensor:
        """The largest magnitude that leads to each output, of shape (C,)."""
        if self.dim == 0:
            return weight.abs().flatten(1).amax(1)
        rows, outputs = weight.shape[:2]
        cut = weight.abs().reshape(self.groups, rows // self.groups, outputs, -1)
        return cut.amax((1, 3)).flatten()


@torch.no_grad()
def folded_parameters(
    parts: Parts[Tensor], outputs: Outputs, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The weight and the bias that compute linear map and affine in one.

    Args:
        parts: what is folded.
        outputs: where the outputs stand in the weight.
        dtype: of the result.

    Raises:
        Unfoldable: values at which the folded parameters lose digits or range.
    """
    if not parts.weight.numel():
        raise Unfoldable("the weight is empty")
    weight, scale = parts.weight.double(), parts.scale
    bias = torch.zeros_like(scale) if parts.bias is None else parts.bias.double()
    if parts.centre is not None:
        _check_centre(parts, bias)
    exact = weight * outputs.spread(scale, weight)
    rounded = exact.to(dtype)  # laid out as the weight: the result's layout follows it
    limit = torch.finfo(dtype).eps * outputs.spread(outputs.largest(exact), exact)
    shift = (bias * scale + parts.shift).to(dtype)
    if not bool(((rounded - exact).abs() <= limit).all()) or not bool(shift.isfinite().all()):
        raise Unfoldable("a folded weight is out of the range of its dtype")
    return rounded, shift


def _check_centre(parts: Parts[Tensor], bias: Tensor) -> None:
    """Digits: ``x a - m a`` is exact to an ulp of ``m a``, ``(x - m) a`` to one of the result.

    The yardstick is the largest result: a channel of small weight may have a mean that is large
    beside its own deviation.
    """
    assert parts.centre is not None
    assert parts.divisor is not None
    moved = float(((parts.centre - bias) * parts.scale).abs().amax())
    reach = float((parts.scale / parts.divisor).abs().amax())
    if not moved <= LARGEST_MEAN * reach:
        raise Unfoldable(
            f"a stored mean is {moved / reach if reach else moved:.3g} deviations large, beyond "
            f"{LARGEST_MEAN:g} a folded weight loses digits"
        )


class _Kept(NamedTuple):
    stored: tuple[Tensor, ...]  # copies
    found: tuple[Tensor, Tensor] | None


class Folding(nn.Module):
    """A linear map and its affine, in the form that is right for the values when it runs.

    Args:
        parts: from the stored tensors, the fields of ``Parts``.
        plain: linear map and affine as they would run one after the other.
        joined: the linear map, of (x, weight, bias).
        count: how many of the inputs behind x are stored tensors.
        outputs: where the outputs stand in the weight.
        dtype: of the result.
        share: elements of the result per element of x.
        fewest: elements of the result from which on comparing the stored tensors pays.
    """

    def __init__(
        self,
        parts: Callable[[Sequence[Tensor]], Sequence[Any]],
        plain: fx.GraphModule,
        joined: fx.GraphModule,
        count: int,
        outputs: Outputs,
        dtype: torch.dtype,
        share: float,
        fewest: int,
    ) -> None:
        super().__init__()
        self._parts, self.plain, self.joined = parts, plain, joined
        self.count, self.outputs, self.dtype = count, outputs, dtype
        self.share, self.fewest = share, fewest
        self._known: MutableMapping[Tensor, _Kept] = WeakIdKeyDictionary()

    def run(self, x: Tensor, given: Sequence[Tensor]) -> Tensor:
        """The result, by the folded weight where it is as good and faster."""
        is_large = x.numel() * self.share >= self.fewest
        found = self.folded(given[: self.count]) if is_large else None
        result: Tensor = (
            self.plain.forward(x, *given) if found is None else self.joined.forward(x, *found)
        )
        return result

    def folded(self, stored: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
        """Weight and bias for these values, None where they cannot be folded.

        Kept per weight, the first stored tensor, as long as that lives: copies of a model run
        through the same graph. An entry is never changed, so threads may share it.
        """
        if any(type(each) not in PLAIN for each in stored):
            return None
        known = self._known.get(stored[0])
        if known is None or not all(map(is_same, stored, known.stored)):
            with torch.inference_mode(False), torch.no_grad():
                known = _Kept(tuple(each.detach().clone() for each in stored), self._fold(stored))
            self._known[stored[0]] = known
        return known.found

    def _fold(self, stored: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
        try:
            parts = Parts(*self._parts(stored))
            return folded_parameters(parts, self.outputs, self.dtype)
        except Unfoldable:
            return None


def folded(folding: Folding, x: Tensor, *given: Tensor) -> Tensor:
    """Linear map and affine of x.

    Args:
        folding: how.
        x: the input of the linear map.
        given: the stored tensors, the weight first, then what else the plain form needs.
    """
    return folding.run(x, given)


def is_same(tensor: Tensor, copy: Tensor) -> bool:
    """Whether a tensor has the values of its copy, of the same dtype; NaN has none.

    Large ones are compared as 64-bit integers where they can be, which takes half the time: 590,000
    float32 numbers 0.13 ms.
    """
    if tensor.numel() >= LARGE and tensor.is_contiguous() and copy.is_contiguous():
        size = tensor.element_size()
        if not (tensor.numel() * size % 8 or tensor.storage_offset() * size % 8):
            tensor, copy = (each.detach().view(-1).view(torch.int64) for each in (tensor, copy))
    return torch.equal(tensor, copy)
