"""The switches of `optimize`, checked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bnrewrite.options import KERNELS, KINDS, Options


def checked_options(
    *,
    strict: bool = False,
    disable: Iterable[str] = (),
    only: Iterable[str | int] | str | int | None = None,
    kernels: str = "auto",
    **unknown: Any,
) -> Options:
    """Options from what a user wrote.

    Raises:
        TypeError: a switch that does not exist.
        ValueError: a value that does not exist, named with those that do.
    """
    if unknown:
        raise TypeError(
            f"bnrewrite has no option {', '.join(map(repr, sorted(unknown)))}; "
            "it has backend, strict, disable, only, kernels"
        )
    if kernels not in KERNELS:
        raise ValueError(f"kernels is {kernels!r}; it is one of {', '.join(map(repr, KERNELS))}")
    disabled = frozenset([disable] if isinstance(disable, str) else disable)
    known = _passes() | set(KINDS)
    for name in disabled - known:
        raise ValueError(
            f"disable names {name!r}, which is no pass and no kind of norm; "
            f"there are {', '.join(sorted(known))}"
        )
    return Options(
        strict=bool(strict),
        disable=disabled,
        only=None if only is None else _checked_sites(only),
        kernels=kernels,
    )


def _checked_sites(only: Iterable[str | int] | str | int) -> frozenset[str | int]:
    chosen = frozenset([only] if isinstance(only, str | int) else only)
    for each in chosen:
        if isinstance(each, bool) or not (
            each in KINDS if isinstance(each, str) else isinstance(each, int) and each >= 0
        ):
            raise ValueError(
                f"only names {each!r}; it takes site numbers from 0 on, or kinds of norm: "
                f"{', '.join(KINDS)}"
            )
    return chosen


def _passes() -> set[str]:
    from bnrewrite.passes import PIPELINE

    return {each.name for each in PIPELINE}
