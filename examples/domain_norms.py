"""The thread's last question: one norm per domain, one domain per process.

    torchrun --nproc-per-node 4 -m examples.domain_norms

Each process trains on the data of one domain, so each updates one of the norms. DDP broadcasts the
buffers of rank 0, to which the other norms never moved. `merge_under_ddp` gives every process the
statistics of all domains instead.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import bnrewrite
from bnrewrite.parallel import merge_statistics, merge_under_ddp

WIDTH = 8
STEPS = 30


class BatchNorm(nn.Module):
    """A batch norm of rows, written by hand."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """The norm of x, of shape (N, width)."""
        if self.training:
            mean, variance = x.mean(0), x.var(0, unbiased=False)
            self.running_mean = 0.9 * self.running_mean + 0.1 * mean.detach()
            self.running_var = 0.9 * self.running_var + 0.1 * x.var(0).detach()
        else:
            mean, variance = self.running_mean, self.running_var
        return (x - mean) / torch.sqrt(variance + 1e-5) * self.weight + self.bias


class DomainNet(nn.Module):
    """bn_1 to bn_n, and the weights that all domains share."""

    def __init__(self, domains: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(BatchNorm(WIDTH) for _ in range(domains))
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, domain: int) -> Tensor:
        """Scores of x, which comes from one domain."""
        scores: Tensor = self.last(self.norms[domain](x))
        return scores


def samples(domain: int, source: torch.Generator) -> Tensor:
    """Rows around the number of their domain."""
    return domain + torch.randn(32, WIDTH, generator=source)


def train(merged: bool) -> DomainNet:
    """The model after some steps in which each process saw its own domain."""
    torch.manual_seed(0)
    rank, count = dist.get_rank(), dist.get_world_size()
    model = bnrewrite.optimize(DomainNet(count), backend="eager")
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    if merged:
        merge_under_ddp(wrapped)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    source = torch.Generator().manual_seed(rank)
    for _ in range(STEPS):
        optimiser.zero_grad()
        torch.autograd.backward(wrapped(samples(rank, source), rank).square().mean())
        optimiser.step()
    if merged:
        merge_statistics(model)
    return model


def means(model: DomainNet) -> list[float]:
    """The running mean of each domain."""
    buffers = (model.norms.get_buffer(f"{i}.running_mean") for i in range(len(model.norms)))
    return [round(float(each.mean()), 2) for each in buffers]


def main() -> None:
    """Train both ways and print what each process knows of each domain."""
    dist.init_process_group("gloo")
    for merged in (False, True):
        own = means(train(merged))
        every: list[list[float]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(every, own)
        if dist.get_rank() == 0:
            print("merged" if merged else "rank 0's, as DDP broadcasts them")
            for rank, each in enumerate(every):
                print(f"  rank {rank}: running means of the domains {each}")
            right = [domain * (1 - 0.9**STEPS) for domain in range(len(every))]
            print(f"  right:   {[round(each, 2) for each in right]}, about")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
