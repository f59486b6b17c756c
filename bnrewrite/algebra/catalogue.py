"""The names of the norms that centre: which axes are reduced, and where the affine runs.

    y = (x - M) (V + eps)^(-1/2) w + b        M = E[x], V = E[x^2] - M^2 over the reduced axes

w and b are free of the moments of x. Norms that do not centre have their name from what they divide
by (``match.py``); any other formula is ``general``. Adding a name is adding a row.
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


CATALOGUE: tuple[tuple[str, Callable[[Roles], bool]], ...] = (
    ("weight_standardization", _is_weight),
    ("batch_norm", _is_batch),
    ("group_norm", _is_group),
    ("instance_norm", _is_instance),
    ("layer_norm", _is_layer),
)


def name_centred(roles: Roles) -> str | None:
    """The first name of the catalogue that applies."""
    return next((name for name, applies in CATALOGUE if applies(roles)), None)
