"""Running statistics that every process updates on its own, brought together.

With s the statistics when they were last equal everywhere, s_i those of rank i since, and k_i the
number of its updates since,

    s' = s + sum k_i (s_i - s) / sum k_i

for each module: one that a single process updated becomes that process's, one that nobody updated
stays as it is to the last bit. Counters (buffers of integers) take the updates of all processes.

All of it is one all_reduce per device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel.distributed import _BufferCommHookLocation

MERGED = "_statistics_when_merged"  # in a module's __dict__: buffers by name
UPDATES = "_statistics_updates"  # a buffer that state_dict leaves out


def track_statistics(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Start from the buffers of the first process, and count how often each module updates its own.

    A module counts its calls in training mode. Called again, it starts again.

    Args:
        model: on every process of the group; its state_dict keeps its keys.
        group: of processes, all by default.

    Raises:
        ValueError: there is no process group, or this process is not in it.
    """
    group = _checked(group)
    source = dist.get_global_rank(group, 0)
    with torch.no_grad():
        for module in _owners(model):
            if UPDATES not in module._buffers:
                first = next(iter(_statistics(module).values()))
                updates = torch.zeros((), dtype=torch.long, device=first.device)
                module.register_buffer(UPDATES, updates, persistent=False)
                module.register_forward_hook(_count)
            for buffer in _statistics(module).values():
                dist.broadcast(buffer, source, group=group)
            _remember(module)


def merge_statistics(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Give every process the running statistics of all, weighted by how often each was updated.

    To be called by all processes of the group: before a model is evaluated or saved, or every few
    steps. Buffers are updated in place.

    Args:
        model: or what wraps it, after `track_statistics`.
        group: of processes, all by default.

    Raises:
        ValueError: there is no process group, this process is not in it, or statistics of a module
            were never tracked.
    """
    outside_graphs: Any = torch.compiler.disable(_merge_all)  # type: ignore[no-untyped-call]
    outside_graphs(model, _checked(group))


def merge_under_ddp(model: DistributedDataParallel, group: dist.ProcessGroup | None = None) -> None:
    """Let DDP merge statistics before each forward, where it broadcasts those of rank 0 else.

    Behind the last step `merge_statistics(model)` is left to be called.

    Args:
        model: with ``broadcast_buffers=True``.
        group: of processes, all by default.

    Raises:
        ValueError: DDP was told to leave buffers alone, or there is no such group.
    """
    if not model.forward_sync_buffers:
        raise ValueError(
            "broadcast_buffers is False, so DDP calls nothing for buffers; leave it True, or call "
            "merge_statistics where the statistics are needed"
        )
    track_statistics(model, group)

    def merge(state: Any, buffers: Any) -> None:
        merge_statistics(model, group)

    before = _BufferCommHookLocation.PRE_FORWARD  # behind a forward, its backward needs the buffers
    model._register_buffer_comm_hook(None, merge, before)


def _merge_all(model: nn.Module, group: dist.ProcessGroup) -> None:
    entries = [entry for module in _owners(model) for entry in _entries(model, module)]
    with torch.no_grad():
        for device in dict.fromkeys(entry.buffer.device for entry in entries):
            _merge([entry for entry in entries if entry.buffer.device == device], group)
        for module in _owners(model):
            _remember(module)


@dataclass(frozen=True)
class _Entry:
    """A buffer, its value when it was last merged, and how often its module was called since."""

    buffer: Tensor
    merged: Tensor
    updates: Tensor

    @property
    def contribution(self) -> Tensor:
        """What is summed over the processes: weighted change, weight; or the change of a counter.

        A buffer that did not change has no weight: its module may keep several norms.
        """
        change = self.buffer.double() - self.merged.double()
        if not self.buffer.is_floating_point():
            return torch.cat([change.flatten(), change.new_ones(1)])
        moved = (self.buffer != self.merged).any()
        weight = torch.where(moved, self.updates.clamp(min=1), 0).double()
        return torch.cat([torch.where(moved, change, 0).flatten() * weight, weight.view(1)])

    def merge(self, total: Tensor) -> None:
        """Take the sum over the processes."""
        change, weight = total[:-1].view(self.buffer.shape), total[-1]
        if self.buffer.is_floating_point():
            change = torch.where(weight > 0, change / weight, 0)
        self.buffer.copy_(torch.where(change == 0, self.merged, self.merged.double() + change))


def _merge(entries: list[_Entry], group: dist.ProcessGroup) -> None:
    parts = [entry.contribution for entry in entries]
    total = torch.cat(parts)
    dist.all_reduce(total, group=group)
    for entry, own in zip(entries, torch.split(total, [len(part) for part in parts]), strict=True):
        entry.merge(own)


def _entries(model: nn.Module, module: nn.Module) -> Iterator[_Entry]:
    merged = module.__dict__.get(MERGED)
    if merged is None:
        name = next(path for path, each in model.named_modules() if each is module)
        raise ValueError(
            f"the statistics of {name or 'the model'} are not tracked; call "
            "track_statistics(model) before training"
        )
    for name, buffer in _statistics(module).items():
        updates = module._buffers[UPDATES]
        assert updates is not None
        yield _Entry(buffer, merged[name].to(buffer.device), updates)


def _owners(model: nn.Module) -> list[nn.Module]:
    """The modules that hold buffers which may be running statistics."""
    return [each for each in model.modules() if any(True for _ in _floating(each))]


def _floating(module: nn.Module) -> Iterator[Tensor]:
    return (each for each in _statistics(module).values() if each.is_floating_point())


def _statistics(module: nn.Module) -> dict[str, Tensor]:
    """Buffers of real numbers and of integers."""
    return {
        name: buffer
        for name, buffer in module._buffers.items()
        if buffer is not None
        and name != UPDATES
        and not buffer.is_complex()
        and buffer.dtype != torch.bool
    }


def _remember(module: nn.Module) -> None:
    module.__dict__[MERGED] = {
        name: buffer.detach().clone() for name, buffer in _statistics(module).items()
    }
    updates = module._buffers[UPDATES]
    assert updates is not None
    updates.zero_()


def _count(module: nn.Module, arguments: Any, result: Any) -> None:
    """A forward hook."""
    updates = module._buffers[UPDATES]
    if module.training and updates is not None:
        updates.add_(1)


def _checked(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            "there is no process group; call torch.distributed.init_process_group first"
        )
    if group is not None and not isinstance(group, dist.ProcessGroup):  # NON_GROUP_MEMBER
        raise ValueError("this process does not belong to the process group")
    if group is not None:
        return group
    everybody = dist.group.WORLD
    assert everybody is not None
    return everybody
