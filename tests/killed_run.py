"""Training on two processes, of which one is killed in mid-step; run by `test_killed.py`.

    python killed_run.py FOLDER

Processes are forked off one that has imported everything, and write what happened into FOLDER: as
"whole-RANK.json" a run of which nobody dies, as "alone-RANK.json" and "synchronised-RANK.json" runs
of which the second process does, as "restarted-RANK.json" new processes that go on from the
checkpoints of these.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hand_written import Net
from processes import join
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import bnrewrite

PATIENCE = 10  # seconds for which torch.distributed waits for a process that is alive
RANKS = 2
STEPS, SAVED, KILLED = 5, 2, 3  # all; those that are in the checkpoint; the one that is not ended
WAYS = {"alone": "backward", "synchronised": "forward"}  # before what of a step a process dies
SHAPE = (3, 5, 5)


class Run:
    """A model in training, and its checkpoint."""

    def __init__(self, way: str, folder: Path) -> None:
        torch.manual_seed(0)
        torch._dynamo.reset()
        self.path = folder / f"{way}.pt"
        net = nn.Sequential(Net(4, "rebind detached"), nn.Flatten(), nn.Linear(36, 1)).double()
        synchronised = way == "synchronised"
        self.model = bnrewrite.optimize(net, backend="eager", sync_stats=synchronised)
        # a broadcast of buffers would be the first to notice that a process is gone
        self.call = DistributedDataParallel(self.model, broadcast_buffers=not synchronised)
        self.optimiser = torch.optim.SGD(self.model.parameters(), 0.05, momentum=0.9)

    def train(self, first: int, dies_before: str = "") -> dict[str, Any]:
        """The steps from one on, of which the second process may not end one; the state."""
        for step in range(first, STEPS):
            source = torch.Generator().manual_seed(RANKS * step + dist.get_rank())
            x = torch.randn(3, *SHAPE, generator=source, dtype=torch.double)
            last = dies_before if dist.get_rank() and step == KILLED else ""
            self.optimiser.zero_grad()
            if last == "forward":
                os.kill(os.getpid(), signal.SIGKILL)
            loss = self.call(x).square().mean()
            if last == "backward":
                os.kill(os.getpid(), signal.SIGKILL)
            torch.autograd.backward(loss)
            self.optimiser.step()
            if step + 1 == SAVED and not dist.get_rank():
                torch.save([self.model.state_dict(), self.optimiser.state_dict()], self.path)
        return {name: value.tolist() for name, value in self.model.state_dict().items()}

    def restart(self) -> dict[str, Any]:
        """Go on from the checkpoint."""
        model, optimiser = torch.load(self.path)
        self.model.load_state_dict(model)
        self.optimiser.load_state_dict(optimiser)
        return self.train(SAVED)


def whole(folder: Path) -> dict[str, Any]:
    """Nobody dies: the states at the end."""
    return {way: Run(way, folder).train(0) for way in WAYS}


def restarted(folder: Path) -> dict[str, Any]:
    """From the checkpoints on: the states at the end."""
    return {way: Run(way, folder).restart() for way in WAYS}


def killed(way: str, folder: Path) -> dict[str, Any]:
    """What a process gets whose neighbour dies, and after how many seconds."""
    run = Run(way, folder)
    start = time.monotonic()
    try:
        run.train(0, WAYS[way])
    except Exception as error:
        seconds = time.monotonic() - start
        return {"kind": type(error).__name__, "text": str(error), "seconds": seconds}
    return {}


def main(folder: Path) -> int:
    """One run after the other; 1 where a process that nobody killed does not end well."""
    torch.set_num_threads(1)
    runs: dict[str, Callable[[Path], dict[str, Any]]] = {
        "whole": whole,
        **{way: partial(killed, way) for way in WAYS},
        "restarted": restarted,
    }
    code = 0
    for name, run in runs.items():
        own = folder / ("whole" if name == "whole" else "killed")
        own.mkdir(exist_ok=True)
        children = [_fork(run, name, rank, own) for rank in range(RANKS)]
        ends = [os.waitstatus_to_exitcode(os.waitpid(each, 0)[1]) for each in children]
        code = code or ends[0] or (ends[1] if name not in WAYS else ends[1] + signal.SIGKILL)
    return int(code != 0)


def _fork(run: Callable[[Path], dict[str, Any]], name: str, rank: int, folder: Path) -> int:
    child = os.fork()
    if child:
        return child
    try:
        warnings.simplefilter("ignore", FutureWarning)  # of `broadcast_buffers`, for a later name
        warnings.simplefilter("error", bnrewrite.BnrewriteWarning)
        join(folder / f"{name}.store", rank, RANKS, PATIENCE)
        found = json.dumps(run(folder))
        (folder.parent / f"{name}-{rank}.json").write_text(found, "utf-8")
    except BaseException:  # what would leave a forked process has to end it
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # without a word to a neighbour that may be dead


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
