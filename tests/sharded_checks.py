"""What two processes check of synchronised statistics where a wrapper cuts the graph."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from hand_written import BatchNorm
from torch.nn.parallel import DistributedDataParallel
from wrapped_checks import Net, Wrap, sharded, watched, whole

import bnrewrite

SIZES = ([4, 2], [3, 2], [0, 2], [1, 3])  # of each process, by step: they do not vary together


def equals_whole(wrap: Wrap, outside: bool) -> None:
    """On parts of batches a wrapped model does what its own code does on whole ones."""
    users = Net(partial(BatchNorm, update="rebind detached")).double()
    plain = copy.deepcopy(users)
    optimise = partial(bnrewrite.optimize, backend="eager", sync_stats=True)
    looks: list[Any] = []
    with warnings.catch_warnings(), watched(looks):
        warnings.simplefilter("error", bnrewrite.BnrewriteWarning)
        call = optimise(wrap(users)) if outside else wrap(optimise(users))
        for sizes in SIZES:
            x = torch.randn(sum(sizes), 3, 6, 6, dtype=torch.double)
            wanted, found = plain(x), call(torch.split(x, sizes)[dist.get_rank()])
            torch.testing.assert_close(found, torch.split(wanted, sizes)[dist.get_rank()])
            torch.autograd.backward(wanted.pow(3).sum())
            torch.autograd.backward(found.pow(3).sum())
    count = dist.get_world_size()  # wrappers take the mean of gradients over the processes
    for own, right in zip(users.parameters(), plain.parameters(), strict=True):
        assert own.grad is not None
        torch.testing.assert_close(whole(own.grad) * count, right.grad)
    torch.testing.assert_close(dict(users.named_buffers()), dict(plain.named_buffers()))
    assert {site.lowering for look in looks for site in look.sites} == {"synchronised"}


ON_TWO: dict[str, Callable[[], None]] = {
    "synchronised FSDP2": partial(equals_whole, sharded, outside=False),
    "synchronised outside of DDP": partial(equals_whole, DistributedDataParallel, outside=True),
}
