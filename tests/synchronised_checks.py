"""What several processes check of synchronised statistics: they are those of one process.

Every process has the whole batch and takes its own part of it. The user's own code, in float64 and
on the whole batch, says what outputs, gradients and buffers have to be.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from contract import forget_history
from hand_written import BatchNorm, Layer, RowNorm, Running
from spellings import batch, nameless, running
from spellings.family import Spelling
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from wrapped_checks import watched

import bnrewrite
from bnrewrite.kernels import synchronised
from bnrewrite.parallel import merge_statistics, track_statistics
from examples import domain_norms

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


class Counted(nn.Module):
    """A net with the norm of `hand_written`, with running statistics; returns its input's rows."""

    def __init__(self, update: str, checkpointed: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = BatchNorm(4, update)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.first(x)))


class Broken(Counted):
    """A graph break in front of the norm."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        torch._dynamo.graph_break()
        return torch.relu(self.norm(y))


def images(count: int = COUNT) -> list[Tensor]:
    return [torch.randn(count, 3, 4, 4) for _ in range(2)]


def updates_buffers(update: str, kind: type[Counted] = Counted, backend: str = "eager") -> None:
    equals_whole(kind(update), images(), PARTS[dist.get_world_size()], backend)


def far_from_zero() -> None:
    """Single precision, mean 4096, parts with other means: E[x^2] - E[x]^2 would keep no digit."""
    sizes = PARTS[dist.get_world_size()][0]
    x = 4096 + torch.arange(COUNT)[:, None, None, None] + torch.randn(COUNT, 4, 4, 4)
    start = sum(sizes[: dist.get_rank()])
    part = x[start : start + sizes[dist.get_rank()]]
    users = BatchNorm(4, "in place")
    exact = copy.deepcopy(users).double()
    own = bnrewrite.optimize(copy.deepcopy(users), backend="eager", sync_stats=True)
    right, plain, found = exact(x.double()), users(x), own(part)
    for name, truth in exact.named_buffers():
        slack = 3 * (users.get_buffer(name) - truth).abs().max()
        floor = torch.finfo(torch.float32).eps * truth.abs().max()
        assert (own.get_buffer(name) - truth).abs().max() <= slack + floor
    slack, truth = 3 * (plain - right).abs().max(), right[start : start + len(part)]
    floor = torch.finfo(torch.float32).eps * right.abs().max()
    assert not len(part) or (found - truth).abs().max() <= slack + floor


def counts_collectives() -> None:
    """Two norms: one gather each forward, one reduction each backward."""
    calls: list[str] = []

    original = synchronised.c10d

    class Counting:
        def __getattr__(self, name: str) -> Any:
            calls.append(name)
            return getattr(original, name)

    model = nn.Sequential(BatchNorm(4, "rebind"), BatchNorm(4, "in place"))
    bnrewrite.optimize(model, backend="eager", sync_stats=True)
    x = torch.randn(2 + dist.get_rank(), 4, 3, 3, requires_grad=True)
    torch.autograd.backward(model(x).pow(3).mean())
    with mock.patch.object(synchronised, "c10d", Counting()):
        torch.autograd.backward(model(x).pow(3).mean())
    assert Counter(calls) == {GATHER: 2, REDUCE: 2, "wait_tensor": 4}, calls


def rows_stay_apart() -> None:
    """A layer norm takes no statistics over samples: no collective, whatever each process has."""
    x = torch.randn(3 + dist.get_rank(), 6)
    users = RowNorm(6)
    own = bnrewrite.optimize(copy.deepcopy(users), backend="eager", sync_stats=True)
    looks: list[Any] = []
    with watched(looks):
        torch.testing.assert_close(own(x), users(x))
    assert [site.lowering for look in looks for site in look.sites] == ["native"]


def second_derivatives() -> None:
    """A gradient penalty over all processes."""
    sizes = PARTS[dist.get_world_size()][0]
    start = sum(sizes[: dist.get_rank()])
    mine = slice(start, start + sizes[dist.get_rank()])
    users = BatchNorm(4, "in place").double()
    own = bnrewrite.optimize(copy.deepcopy(users), backend="eager", sync_stats=True)
    x = torch.randn(COUNT, 4, 3, 3, dtype=torch.double)
    cotangent = torch.randn(COUNT, 4, 3, 3, dtype=torch.double)
    results = []
    for model, part in ((users, slice(None)), (own, mine)):
        given = x[part].clone().requires_grad_()
        y = model(given)
        (first,) = torch.autograd.grad(y, given, cotangent[part], create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), given)
        results.append(second)
    torch.testing.assert_close(results[1], results[0][mine])


def of_a_group() -> None:
    """Statistics of the first two processes; the others are no part of it."""
    group: Any = dist.new_group([0, 1])
    if dist.get_rank() < 2:
        model = Counted("in place")
        equals_whole(model, images(), ((2, 4), (6, 0)), group=group)
    else:
        with pytest.raises(ValueError, match="does not belong to"):
            bnrewrite.optimize(Counted("in place"), sync_stats=group)


class Half(Layer):
    """Statistics of a half of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        part = x[: x.shape[0] // 2]
        return (x - part.mean(0)) / (part.var(0, unbiased=False) + 1e-5).sqrt()


class Largest(Layer):
    """The largest value of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.abs().amax(0) + 1e-5)


class Twice(Layer):
    """The variance is used beside the norm."""

    def forward(self, x: Tensor) -> Tensor:
        variance = x.var(0, unbiased=False)
        return (x - x.mean(0)) / (variance + 1e-5).sqrt() * torch.exp(x * variance)


class Pairs(Layer):
    """Statistics over pairs of samples."""

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.exp(x[:, None] - x[None])
        return (pairs - pairs.mean((0, 1))) / (pairs.var((0, 1)) + 1e-5).sqrt()


class Peak(Layer):
    """A buffer that follows the mean and the largest value."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("peak", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(0)
        self.peak.lerp_(mean.detach() * x.detach().amax(0), 0.1)  # type: ignore[operator]
        return (x - mean) / (x.var(0, unbiased=False) + 1e-5).sqrt()


class Recomputed(Layer):
    """A norm with running statistics in an activation checkpoint, which stays the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.norm = Running(4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.norm, x * self.weight, use_reentrant=False)
        return y


class Fixed(Layer):
    """A batch of six samples and no other."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(6, 4)
        return (x - x.mean(0)) / (x.var(0) + 1e-5).sqrt()


class Other(Layer):
    """A factor that is the size of another batch."""

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        y = other.shape[0] * (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
        return torch.cat([y.flatten(), other.flatten()])


def is_left(model: nn.Module, text: str, *more: Tensor) -> None:
    """What cannot be synchronised is said."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bnrewrite.optimize(model, backend="eager", sync_stats=True)
        model(torch.randn(6, 4), *more)
    said = [str(each.message) for each in caught if each.category is bnrewrite.BnrewriteWarning]
    assert any(text in each for each in said), said


def explained() -> None:
    """One process alone may explain a model: no collective is called."""
    model = bnrewrite.optimize(Counted("in place"), backend="eager", sync_stats=True)
    if dist.get_rank() == 0:
        (site,) = bnrewrite.explain(model, torch.randn(1, 3, 4, 4)).sites
        assert (site.kind, site.lowering) == ("batch_norm", "synchronised")


class Domains(nn.Module):
    """One norm for each process, with or without a counter of its own."""

    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(norm() for _ in range(dist.get_world_size()))

    def forward(self, x: Tensor, domain: int) -> Tensor:
        y: Tensor = self.norms[domain](x)
        return y


def merges_domains() -> None:
    """Every process gets the statistics that each domain's own process has."""
    rank = dist.get_rank()
    model = Domains(lambda: BatchNorm(3, "rebind detached"))
    own = bnrewrite.optimize(model, backend="eager")
    keys = list(own.state_dict())
    track_statistics(own)
    alone = copy.deepcopy(own.norms[rank])
    identities = [id(buffer) for buffer in own.norms.buffers()]
    for _ in range(rank + 1):
        x = rank + torch.randn(8, 3)
        own(x, rank)
        alone(x)
    merge_statistics(own)
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, {k: v for k, v in alone.state_dict().items() if "running" in k})
    for domain, state in enumerate(every):
        for name, value in state.items():
            torch.testing.assert_close(own.norms[domain].state_dict()[name], value.detach())
        assert int(own.norms[domain].num_batches_tracked) == domain + 1  # type: ignore[arg-type]
    assert list(own.state_dict()) == keys
    assert identities == [id(buffer) for buffer in own.norms.buffers()]


def merges_by_number_of_updates() -> None:
    """A shared norm: the mean of what the processes have, by how often each updated it."""
    rank, count = dist.get_rank(), dist.get_world_size()
    norm = nn.BatchNorm1d(2, momentum=0.1).double()
    track_statistics(norm)
    for _ in range(rank):
        norm(torch.randn(5, 2, dtype=torch.double))
    own: list[Any] = [None] * count
    dist.all_gather_object(own, norm.running_mean)
    merge_statistics(norm)
    weights = torch.arange(count, dtype=torch.double)
    right = sum(w * mean for w, mean in zip(weights, own, strict=True)) / weights.sum()
    torch.testing.assert_close(norm.running_mean, right)
    assert int(norm.num_batches_tracked) == weights.sum()  # type: ignore[arg-type]
    before = copy.deepcopy(norm.state_dict())
    merge_statistics(norm)
    for name, value in norm.state_dict().items():
        assert torch.equal(value, before[name])


def merges_under_ddp() -> None:
    """The example: domain norms that DDP does not overwrite with those of rank 0."""
    with mock.patch.object(domain_norms, "STEPS", 3):
        lost, kept = (domain_norms.train(merged) for merged in (False, True))
    for domain, norm in enumerate(kept.norms.children()):
        source = torch.Generator().manual_seed(domain)
        right = torch.zeros(domain_norms.WIDTH)
        for _ in range(3):
            right = 0.9 * right + 0.1 * domain_norms.samples(domain, source).mean(0)
        torch.testing.assert_close(norm.running_mean, right)
        if domain and domain != dist.get_rank():
            assert not lost.norms.get_buffer(f"{domain}.running_mean").any()


FORMULAS = (
    batch.second_moment_less_squared_mean,
    running.rebound_under_no_grad,
    nameless.updated_statistics_spelled_out,
)
ON_TWO: dict[str, Callable[[], None]] = {
    **{each.__name__: partial(spelling, spelled(each)) for each in FORMULAS},
    "a traced backward": partial(updates_buffers, "in place", backend="aot_eager"),
    "behind a graph break": partial(updates_buffers, "rebind detached", Broken),
    "second derivatives": second_derivatives,
    "one collective per norm and direction": counts_collectives,
    "rows stay apart": rows_stay_apart,
    "a mean that is large": far_from_zero,
    "domains": merges_domains,
    "explained by one process": explained,
    "statistics of a part": partial(is_left, Half(), "they are not of the whole tensor"),
    "the largest value": partial(is_left, Largest(), "they are not the mean and the variance"),
    "pairs": partial(is_left, Pairs(), "the batch is no factor of what they are taken over"),
    "a further buffer": partial(
        is_left,
        Peak(),
        "its statistics stay those of this process: peak is not computed from them alone",
    ),
    "a checkpointed norm": partial(is_left, Recomputed(), "runs it again for the backward"),
    "a fixed batch": partial(is_left, Fixed(), "the batch has a fixed size in this graph"),
    "another batch": partial(is_left, Other(), "in them is none of the batch", torch.randn(5, 2)),
    "used elsewhere": partial(is_left, Twice(), "a statistic of it is used elsewhere too"),
}
ON_FOUR: dict[str, Callable[[], None]] = {
    "updates in place": partial(updates_buffers, "in place"),
    "a group": of_a_group,
    "domains under DDP": merges_under_ddp,
    "a norm of all": merges_by_number_of_updates,
}
