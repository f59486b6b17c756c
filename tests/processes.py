"""Checks that run on several gloo processes: one start of them runs all checks of a module.

A module of checks has `CHECKS`: for a number of processes, functions by name. Every process runs
all of them in order, and a check fails where it raises on any of them. What they import is
imported once: the processes are forked off one that has it.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from filelock import FileLock

TESTS = Path(__file__).parent
PATIENCE = 60  # seconds for which a process waits for the others
LIMIT = 300  # seconds for all checks of a module
Checks = dict[str, Callable[[], None]]


def outcomes(module: str, folders: pytest.TempPathFactory) -> dict[tuple[int, str], str]:
    """The error of each check on its first rank that has one; an empty text for none.

    Run once for all workers of pytest-xdist.

    Args:
        module: its name, in this folder.
        folders: where the processes meet and write what they found.

    Returns:
        By number of processes and name of the check.
    """
    base = folders.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / module
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            start(__file__, module, str(folder))
    found: dict[tuple[int, str], str] = {}
    for path in sorted(folder.glob("*.json")):
        count, rank = path.stem.split("-")
        for name, error in json.loads(path.read_text("utf-8")).items():
            text = f"rank {rank}: {error}" if error else ""
            found[int(count), name] = found.get((int(count), name)) or text
    return found


def start(*arguments: str, limit: float = LIMIT) -> str:
    """What a run of Python that starts processes prints; it has to end well, in so many seconds."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
    }
    outcome = subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=limit,
    )
    assert outcome.returncode == 0, outcome.stderr[-4000:]
    return outcome.stdout


def join(store: Path, rank: int, count: int, patience: float) -> None:
    """Make this process one of so many that meet in a file and wait for each other."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=patience),
    )


def main(module: str, folder: str) -> int:
    """The process that the others are forked off; the largest of their exit codes."""
    torch.set_num_threads(1)
    plan: dict[int, Checks] = importlib.import_module(module).CHECKS
    code = 0
    for count, checks in plan.items():
        children = []
        for rank in range(count):
            child = os.fork()
            if not child:
                os._exit(_run(checks, count, rank, Path(folder)))
            children.append(child)
        code = max(code, *(os.waitpid(each, 0)[1] for each in children))
    return min(code, 1)


def _run(checks: Checks, count: int, rank: int, folder: Path) -> int:
    """All checks on one rank."""
    try:
        join(folder / f"{count}.store", rank, count, PATIENCE)
        found = {}
        for name, check in checks.items():
            torch._dynamo.reset()
            torch.manual_seed(0)
            try:
                check()
                found[name] = ""
            except Exception:  # told by the test of this check; the others are run too
                found[name] = traceback.format_exc()
        (folder / f"{count}-{rank}.json").write_text(json.dumps(found), "utf-8")
        dist.destroy_process_group()
    except BaseException:  # what would leave a forked process has to end it
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
