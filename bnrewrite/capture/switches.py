"""The switches of `optimize`, checked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist

from bnrewrite.options import KERNELS, KINDS, Options


def checked_options(
    *,
    strict: bool = False,
    disable: Iterable[str] = (),
    only: Iterable[str | int] | str | int | None = None,
    kernels: str = "auto",
    sync_stats: Any = False,
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
            "it has backend, strict, disable, only, kernels, sync_stats"
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
        sync_stats=_checked_group(sync_stats),
    )


def _checked_group(sync_stats: Any) -> str | None:
    """The name of a process group, "" for that of all processes."""
    if sync_stats is None or sync_stats is False:
        return None
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            "sync_stats is asked for, and there is no process group; call "
            "torch.distributed.init_process_group first"
        )
    if sync_stats is True:
        return ""
    if sync_stats is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("sync_stats is a process group that this process does not belong to")
    if not isinstance(sync_stats, dist.ProcessGroup):
        raise TypeError(
            f"sync_stats is a {type(sync_stats).__name__}; it is True, False or a "
            "torch.distributed.ProcessGroup"
        )
    return str(sync_stats.group_name)


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
