"""The native module that two formulas, in training and in evaluation, belong to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from bnrewrite.algebra.axes import Dim, product
from bnrewrite.algebra.expression import number
from bnrewrite.algebra.ring import Ring
from bnrewrite.findings.updates import bessel

from .proof import Affine, Formula
from .record import Unequal, UnequalSizes

EXACT = 1e-12  # relative: 1 - 0.9 is 0.1 up to the last bit
BATCH = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
INSTANCE = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}


@dataclass(frozen=True)
class Native:
    """A native module, still without its tensors.

    Attributes:
        kind: its class.
        arguments: of its constructor.
        tensors: names that the formula gives to parameters and buffers; all others are no part
            of it.
    """

    kind: type[nn.Module]
    arguments: dict[str, Any] = field(default_factory=dict)
    tensors: frozenset[str] = frozenset()


def native_of(ring: Ring, training: Formula, evaluation: Formula) -> Native:
    """The native module with these formulas.

    Args:
        ring: of the training formula.
        training: in training mode.
        evaluation: in evaluation mode.

    Raises:
        Unequal: there is none.
    """
    if evaluation.running or evaluation.counters:
        raise Unequal("it updates buffers in evaluation")
    for mine, other in ((training.weight, evaluation.weight), (training.bias, evaluation.bias)):
        if (mine and mine.name) != (other and other.name):
            raise Unequal("training and evaluation have different weights or biases")
    if training.eps != evaluation.eps:
        raise Unequal(f"eps is {training.eps:g} in training, {evaluation.eps:g} in evaluation")
    if training.kind == "batch_norm":
        return _batch_norm(ring, training, evaluation)
    if training.kind != evaluation.kind:
        raise Unequal(f"it is a {training.kind} in training and a {evaluation.kind} in evaluation")
    if training.running or training.counters:
        raise Unequal("it updates statistics that it does not use")
    if training.kind not in _OTHERS:
        raise Unequal("its statistics are stored, in training too")
    native = _OTHERS[training.kind](training)
    return Native(native.kind, native.arguments, native.tensors | _names(training))


def _batch_norm(ring: Ring, training: Formula, evaluation: Formula) -> Native:
    _check_channels(training)
    rank = len(training.index)
    if rank not in BATCH:
        raise Unequal(f"torch.nn has no batch norm of {rank} dimensions")
    arguments: dict[str, Any] = {
        "num_features": _size(training.index[1], training.shape[1]),
        "eps": training.eps,
        "affine": training.weight is not None,
        "track_running_stats": bool(training.running),
    }
    names = _names(training)
    if not training.running:
        if evaluation.kind != "batch_norm":
            raise Unequal("evaluation uses statistics that training does not update")
        if training.counters:
            raise Unequal("it counts batches and has no running statistics")
        return Native(BATCH[rank], arguments, names)
    if evaluation.kind != "affine" or evaluation.mean is None or evaluation.variance is None:
        raise Unequal("evaluation does not use the statistics that training updates")
    arguments["momentum"] = _momentum(ring, training)
    counted = frozenset(training.counters)
    if counted - {"num_batches_tracked"}:
        raise Unequal(f"its counter is {sorted(counted)[0]}, the native one num_batches_tracked")
    for name, own in (("running_mean", evaluation.mean), ("running_var", evaluation.variance)):
        if name != own:
            raise Unequal(f"its {own} is {name} in the native module: state_dict would change")
    return Native(BATCH[rank], arguments, names | counted | {"running_mean", "running_var"})


def _momentum(ring: Ring, training: Formula) -> float:
    """The weight of the new batch in both running statistics."""
    by_name = {str(each.buffer.meta["path"]): each for each in training.running}
    if set(by_name) != {"running_mean", "running_var"}:
        raise Unequal(f"it updates {', '.join(sorted(by_name))}, not running_mean and running_var")
    mean, variance = by_name["running_mean"], by_name["running_var"]
    weight = mean.factor.constant
    if mean.is_variance or not variance.is_variance or weight is None:
        raise Unequal("its running statistics are not weighted sums of old and new")
    for each in (mean, variance):
        if not math.isclose(float(each.kept), 1 - float(weight), rel_tol=EXACT, abs_tol=EXACT):
            raise Unequal("old and new value of a running statistic do not weigh 1 together")
    correction = bessel(ring, variance.count)
    expected = None if correction is None else ring.multiply(number(weight), correction)
    if expected is None or variance.factor != expected:
        raise Unequal("its running variance is not corrected by n / (n - 1), as the native one is")
    return float(weight)


def _layer_norm(formula: Formula) -> Native:
    first = _first_reduced(formula)
    _check_free(formula, range(first, len(formula.index)))
    _check_along(formula, tuple(formula.index[first:]))
    if formula.bias is not None and formula.weight is None:
        raise Unequal("it has a bias and no weight")
    arguments = {
        "normalized_shape": _sizes(formula, first),
        "eps": formula.eps,
        "elementwise_affine": formula.weight is not None,
        "bias": formula.bias is not None,
    }
    return Native(nn.LayerNorm, arguments)


def _rms_norm(formula: Formula) -> Native:
    first = _first_reduced(formula)
    _check_free(formula, range(first, len(formula.index)))
    _check_along(formula, tuple(formula.index[first:]))
    if formula.bias is not None:
        raise Unequal("it has a bias, which nn.RMSNorm has not")
    arguments = {
        "normalized_shape": _sizes(formula, first),
        "eps": formula.eps,
        "elementwise_affine": formula.weight is not None,
    }
    return Native(nn.RMSNorm, arguments)


def _group_norm(formula: Formula) -> Native:
    index, over = formula.index, formula.over
    kept = [axis for axis in index[1] if axis not in over]
    inner = [axis for axis in index[1] if axis in over]
    rest = {axis for dim in index[2:] for axis in dim}
    if set(index[0]) & over or not rest <= over or list(index[1]) != [*kept, *inner]:
        raise Unequal("its groups are not neighbouring channels of the second dimension")
    _check_free(formula, range(1, 2))
    _check_along(formula, (index[1],))
    _check_pair(formula)
    arguments = {
        "num_groups": _size(tuple(kept), None),
        "num_channels": _size(index[1], formula.shape[1]),
        "eps": formula.eps,
        "affine": formula.weight is not None,
    }
    return Native(nn.GroupNorm, arguments)


def _instance_norm(formula: Formula) -> Native:
    index, over = formula.index, formula.over
    if set(index[0]) & over or set(index[1]) & over or len(index) not in INSTANCE:
        return _group_norm(formula)
    _check_free(formula, range(1, 2))
    _check_along(formula, (index[1],))
    _check_pair(formula)
    arguments = {
        "num_features": _size(index[1], formula.shape[1]),
        "eps": formula.eps,
        "affine": formula.weight is not None,
    }
    return Native(INSTANCE[len(index)], arguments)


_OTHERS: dict[str, Callable[[Formula], Native]] = {
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "instance_norm": _instance_norm,
}


def _check_channels(formula: Formula) -> None:
    """Refuse a batch norm of other dimensions than the second, or without a pair of parameters."""
    others = {axis for i, dim in enumerate(formula.index) if i != 1 for axis in dim}
    if len(formula.index) < 2 or set(formula.index[1]) & formula.over or others != formula.over:
        raise Unequal("its channels are not the second dimension")
    _check_free(formula, range(1, 2))
    _check_along(formula, (formula.index[1],))
    _check_pair(formula)


def _check_free(formula: Formula, fixed: range) -> None:
    """Refuse what was captured for one size of a dimension only."""
    for i, size in enumerate(formula.shape):
        if i not in fixed and isinstance(size, int):
            raise UnequalSizes(f"it was read for size {size} of dimension {i} alone")


def _check_pair(formula: Formula) -> None:
    if (formula.weight is None) != (formula.bias is None):
        raise Unequal("it has one of weight and bias, the native module both or none")


def _check_along(formula: Formula, dims: tuple[Dim, ...]) -> None:
    for name, affine in (("weight", formula.weight), ("bias", formula.bias)):
        if affine is None:
            continue
        if affine.name != name:
            raise Unequal(
                f"its {affine.name} is {name} in the native module: state_dict would change"
            )
        if affine.dims != dims:
            raise Unequal(f"its {name} has another shape than the native module's")


def _first_reduced(formula: Formula) -> int:
    reduced = [i for i, dim in enumerate(formula.index) if set(dim) & formula.over]
    first = reduced[0] if reduced else 0
    rest = formula.index[first:]
    if not reduced or any(not dim or not set(dim) <= formula.over for dim in rest):
        raise Unequal("it does not reduce the last dimensions")
    return first


def _sizes(formula: Formula, first: int) -> tuple[int, ...]:
    return tuple(
        _size(dim, size)
        for dim, size in zip(formula.index[first:], formula.shape[first:], strict=True)
    )


def _size(dim: Dim, size: object) -> int:
    """How many elements axes have, where no call can change it."""
    extent = product(axis.size for axis in dim)
    if not isinstance(extent, int) or (size is not None and size != extent):
        raise UnequalSizes("it takes any number of channels, the native module a certain one")
    return extent


def _names(formula: Formula) -> frozenset[str]:
    affine: tuple[Affine | None, ...] = (formula.weight, formula.bias)
    return frozenset(each.name for each in affine if each is not None)
