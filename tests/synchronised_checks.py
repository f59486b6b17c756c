"""What several processes check of synchronised statistics: they are those of one process.

Every process has the whole batch and takes its own part of it. The user's own code, in float64 and
on the whole batch, says what outputs, gradients and buffers have to be.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from contract import forget_history
from hand_written import BatchNorm, Layer
from spellings import batch, nameless, running
from spellings.family import Spelling
from torch import Tensor, nn
from wrapped_checks import watched

import bnrewrite

GATHER = "all_gather_into_tensor"
REDUCE = "all_reduce"


COUNT = 6  # samples of all processes
PARTS = {2: ((5, 1), (6, 0)), 4: ((3, 2, 1, 0), (0, 1, 1, 4))}  # of each process, by step


def equals_whole(
    model: nn.Module,
    batches: Sequence[Tensor],
    sizes: Sequence[Sequence[int]],
    backend: str = "eager",
    group: Any = True,
    sites: int = 1,
) -> None:
    """A model on a part of a batch on each rank does what its own code does on the whole."""
    rank = dist.get_rank(None if group is True else group)
    users, own = copy.deepcopy(model).double(), copy.deepcopy(model).double()
    looks: list[Any] = []
    with warnings.catch_warnings(), watched(looks):
        warnings.simplefilter("error", bnrewrite.BnrewriteWarning)
        bnrewrite.optimize(own, backend=backend, sync_stats=group)
        for each, extents in zip(batches, sizes, strict=True):
            start = sum(extents[:rank])
            mine = slice(start, start + extents[rank])
            whole, part = (x.double().requires_grad_() for x in (each, each[mine]))
            source = torch.Generator().manual_seed(5)
            wanted, found = users(whole), own(part)
            assert wanted.shape[0] == each.shape[0]
            cotangent = torch.randn(wanted.shape, generator=source, dtype=torch.double)
            torch.autograd.backward(wanted, cotangent)
            torch.autograd.backward(found, cotangent[mine])
            assert whole.grad is not None
            torch.testing.assert_close(found, wanted[mine])
            torch.testing.assert_close(part.grad, whole.grad[mine])
            forget_history(users)
    for value, other in zip(own.parameters(), users.parameters(), strict=True):
        assert value.grad is not None
        dist.all_reduce(value.grad, group=None if group is True else group)
        torch.testing.assert_close(value.grad, other.grad)
    torch.testing.assert_close(dict(own.named_buffers()), dict(users.named_buffers()))
    lowerings = [site.lowering for look in looks for site in look.sites]
    assert lowerings.count("synchronised") >= sites, lowerings


def spelled(formula: Callable[..., Any]) -> Spelling:
    table = (*batch.TABLE, *running.TABLE, *nameless.TABLE)
    return next(row for row in table if row.formula is formula)


def spelling(row: Spelling, backend: str = "eager") -> None:
    """Two steps of a row of the spelling table, on unequal parts, one of them empty."""
    source = torch.cat(row.batches(2 * COUNT))
    batches = [source[:COUNT], source[COUNT : 2 * COUNT]]
    equals_whole(row.build(), batches, PARTS[dist.get_world_size()], backend)


CHECKS: dict[str, Callable[[], None]] = {}
