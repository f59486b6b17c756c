"""Checks that run on several gloo processes: one start of them runs all checks of a module.

A module of checks has `CHECKS`, functions by name. Every process runs all of them in order, and a
check fails where it raises on any of them.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

TESTS = Path(__file__).parent
PATIENCE = 60  # seconds for which a process waits for the others
LIMIT = 240  # seconds for all checks of a module


def outcomes(module: str, count: int, folder: Path) -> dict[str, str]:
    """The error of each check on its first rank that has one; an empty text for none.

    Args:
        module: its name, in this folder.
        count: of processes.
        folder: for the store through which they meet, and what they write.
    """
    program = [sys.executable, str(TESTS / "processes.py"), module, str(count), str(folder)]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
    }
    ranks = [
        subprocess.Popen([*program, str(rank)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(count)
    ]
    found: dict[str, str] = {}
    try:
        for rank, process in enumerate(ranks):
            _, errors = process.communicate(timeout=LIMIT)
            assert process.returncode == 0, f"rank {rank}: {errors[-4000:]}"
            for name, error in json.loads((folder / f"{rank}.json").read_text("utf-8")).items():
                text = f"rank {rank}: {error}" if error else ""
                found[name] = found.get(name) or text
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    return found


def main(module: str, count: str, folder: str, rank: str) -> None:
    """One process."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=int(rank),
        world_size=int(count),
        timeout=timedelta(seconds=PATIENCE),
    )
    found = {}
    for name, check in importlib.import_module(module).CHECKS.items():
        torch._dynamo.reset()
        torch.manual_seed(0)
        try:
            check()
            found[name] = ""
        except Exception:  # told by the test of this check; the others are run too
            found[name] = traceback.format_exc()
    Path(folder, f"{rank}.json").write_text(json.dumps(found), "utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
