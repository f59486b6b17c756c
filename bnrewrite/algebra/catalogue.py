"""The named norms, each declared once: its formula, its native op and its ONNX op.

With M = E[x], V = E[x^2] - M^2 over the reduced axes, w and b free of the moments of x:

    centred     y = (x - M) (V + eps)^(-1/2) w + b
    uncentred   y = x (V + M^2 + eps)^(-1/2) w + b,  or another norm of x in the denominator

Which axes are reduced, and along which the affine runs, gives a centred norm its name.
Adding a norm is adding a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Roles:
    """What happens to each dimension of the normalised tensor.

    Attributes:
        kept: dimensions that no statistic reduces.
        reduced: dimensions that are reduced whole.
        mixed: dimensions of which an inner part is reduced (groups of channels).
        affine: dimensions along which the weight or the bias runs.
        rank: the number of dimensions, those of one element included.
        parameter: the normalised tensor is computed from parameters alone.
    """

    kept: frozenset[int]
    reduced: frozenset[int]
    mixed: frozenset[int]
    affine: frozenset[int]
    rank: int
    parameter: bool


@dataclass(frozen=True)
class Norm:
    """A named norm."""

    kind: str
    centred: bool
    native: str
    onnx: str
    applies: Callable[[Roles], bool]


def _trailing(dims: frozenset[int], rank: int) -> bool:
    return bool(dims) and dims == frozenset(range(min(dims), rank))


def _is_weight(r: Roles) -> bool:
    return r.parameter and r.rank >= 2 and bool(r.reduced)


def _is_batch(r: Roles) -> bool:
    return 0 in r.reduced and bool(r.kept) and not r.mixed and r.affine <= r.kept


def _is_group(r: Roles) -> bool:
    whole = r.kept <= {0} and r.rank >= 3 and bool(r.affine) and r.affine <= {1}
    cut = len(r.mixed) == 1 and r.mixed <= {1, r.rank - 1} and r.kept <= {0}
    return cut or (whole and 1 in r.reduced)


def _is_instance(r: Roles) -> bool:
    if r.mixed or len(r.kept) != 2 or 0 not in r.kept or not r.affine <= r.kept:
        return False
    channel = max(r.kept)
    if channel == 1:
        return r.rank >= 4 or (r.rank == 3 and r.affine == {1})
    return channel == r.rank - 1 and r.rank >= 3


def _is_layer(r: Roles) -> bool:
    return bool(r.reduced | r.mixed) and (0 not in r.reduced or not r.kept)


CATALOGUE = (
    Norm(
        "weight_standardization", True, "aten.native_layer_norm", "LayerNormalization", _is_weight
    ),
    Norm("batch_norm", True, "aten.batch_norm", "BatchNormalization", _is_batch),
    Norm("group_norm", True, "aten.group_norm", "GroupNormalization", _is_group),
    Norm("instance_norm", True, "aten.group_norm", "InstanceNormalization", _is_instance),
    Norm("layer_norm", True, "aten.layer_norm", "LayerNormalization", _is_layer),
    Norm("lp_normalize", False, "aten.linalg_vector_norm", "LpNormalization", lambda r: True),
    Norm("rms_norm", False, "aten.rms_norm", "RMSNormalization", lambda r: True),
)


def name_centred(roles: Roles) -> Norm | None:
    """The first centred norm of the catalogue that applies."""
    return next((n for n in CATALOGUE if n.centred and n.applies(roles)), None)
