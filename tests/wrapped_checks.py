"""What two processes check of optimised models under DDP and FSDP2, beside native ones."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from hand_written import BatchNorm, Layer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import bnrewrite
from bnrewrite.capture.backend import Compiler

Wrap = Callable[[nn.Module], Any]
LAYERS = 2


class Net(Layer):
    """Convolutions, batch norms and ReLUs; the second block is checkpointed where that is asked."""

    def __init__(self, norm: Callable[[int], nn.Module], checkpointed: bool = False) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(LAYERS))
        self.norms = nn.ModuleList(norm(3) for _ in range(LAYERS))
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for i in range(LAYERS):
            if i and self.checkpointed:
                x = checkpoint(self.block, x, i, use_reentrant=False)
            else:
                x = self.block(x, i)
        return x

    def block(self, x: Tensor, i: int) -> Tensor:
        normalised: Tensor = self.norms[i](self.convs[i](x))
        return torch.relu(normalised)


def whole(value: Tensor) -> Tensor:
    """A tensor that may be sharded, on this rank."""
    full: Tensor = getattr(value, "full_tensor", value.detach)()
    return full.clone()


def steps(call: Any, model: nn.Module, way: str, width: int = 8) -> list[Tensor]:
    """Losses, gradients and buffers of three steps, on other batches on each rank."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    source = torch.Generator().manual_seed(dist.get_rank())
    dtype = next(model.parameters()).dtype
    for _ in range(3):
        first, second = torch.randn(2, 4, 3, width, width, generator=source, dtype=torch.double).to(
            dtype
        )
        loss = torch.zeros((), dtype=dtype)
        if way == "accumulated":
            with call.no_sync():
                torch.autograd.backward(call(first).square().mean())
        elif way == "two forwards":
            loss = loss + call(first).square().mean()
        loss = loss + call(second).pow(3).mean()
        torch.autograd.backward(loss)
        seen += [loss.detach(), *(whole(each) for each in gradients(model))]
        seen += [whole(each) for each in model.buffers()]
        optimiser.step()
        optimiser.zero_grad()
    return seen


def gradients(model: nn.Module) -> list[Tensor]:
    return [each.grad for each in model.parameters() if each.grad is not None]


def agrees(
    wrap: Wrap,
    way: str = "plain",
    *,
    outside: bool = False,
    update: str = "rebind",
    checkpointed: bool = False,
    backend: str = "eager",
    sites: int = LAYERS,
) -> None:
    """An optimised hand-written model does what the native one does, wrapped by the same."""
    users = Net(partial(BatchNorm, update=update), checkpointed).double()
    native = Net(nn.BatchNorm2d, checkpointed).double()
    native.load_state_dict(users.state_dict())
    expected = steps(wrap(native), native, way)
    optimise = partial(bnrewrite.optimize, backend=backend)
    looks: list[Any] = []
    with warnings.catch_warnings(), watched(looks):
        warnings.simplefilter("error", bnrewrite.BnrewriteWarning)
        call = optimise(wrap(users)) if outside else wrap(optimise(users))
        before = [id(each) for each in users.buffers()]
        found = steps(call, users, way)
    torch.testing.assert_close(found, expected)
    assert before == [id(each) for each in users.buffers()]
    statuses = [site.status for look in looks for site in look.sites]
    assert statuses.count("rewritten") >= sites, statuses
    assert all(each.dtype in (torch.double, torch.long) for each in users.buffers())


def watched(looks: list[Any]) -> Any:
    compile_graph = Compiler.__call__

    def watching(self: Compiler, *args: Any) -> Any:
        self.observe = looks.append
        return compile_graph(self, *args)

    return mock.patch.object(Compiler, "__call__", watching)


def sharded(model: Any, **settings: Any) -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for conv in model.convs:
        fully_shard(conv, mesh=mesh, **settings)
    return fully_shard(model, mesh=mesh, **settings)


def agrees_in_small_buckets() -> None:
    """Dynamo cuts the graph of a compiler where a bucket ends: buffers are told apart in each."""
    with mock.patch.object(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 256):
        agrees(
            partial(DistributedDataParallel, bucket_cap_mb=0.0005),
            backend="aot_eager",
            update="rebind detached",
        )


def keeps_buffers_whole_and_wide() -> None:
    """Under mixed precision parameters are bfloat16 in a forward; statistics stay float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    runs = []
    users = Net(partial(BatchNorm, update="in place"))
    exact = copy.deepcopy(users).double()
    for optimise in (bnrewrite.optimize, nn.Identity()):
        model = copy.deepcopy(users)
        before = [id(each) for each in model.buffers()]
        runs.append(steps(sharded(optimise(model), mp_policy=policy), model, "plain"))
        assert before == [id(each) for each in model.buffers()]
        assert {each.dtype for each in model.buffers()} == {torch.float32, torch.long}
        assert all(type(each) is Tensor for each in model.buffers())
    right = steps(sharded(exact), exact, "plain")
    largest = max(float(each.abs().max()) for each in right)  # a bias before a norm: no gradient
    floor = torch.finfo(torch.bfloat16).eps * largest
    for value, own, truth in zip(*runs, right, strict=True):
        assert (value - truth).abs().max() <= 3 * (own - truth).abs().max() + floor


def wraps_differently() -> dict[str, Callable[[], None]]:
    found: dict[str, Callable[[], None]] = {}
    for outside, broadcast in ((False, True), (True, False)):
        wrap = partial(DistributedDataParallel, broadcast_buffers=broadcast)
        name = f"{'optimize(DDP)' if outside else 'DDP(optimize)'} broadcast={broadcast}"
        found[name] = partial(agrees, wrap, outside=outside)
    return found


DDP = partial(DistributedDataParallel, broadcast_buffers=False)
ON_TWO: dict[str, Callable[[], None]] = {
    **wraps_differently(),
    "two forwards before a backward": partial(agrees, DDP, "two forwards"),
    "gradients accumulated without sync": partial(
        agrees, DistributedDataParallel, "accumulated", update="in place"
    ),
    "a checkpointed block": partial(agrees, DDP, update="in place", checkpointed=True, sites=1),
    "buckets inside": agrees_in_small_buckets,
    "FSDP2 of an optimised model": partial(agrees, sharded, sites=1),
    "an optimised FSDP2 model": partial(agrees, sharded, outside=True, sites=1),
    "FSDP2 in mixed precision": keeps_buffers_whole_and_wide,
}
