"""Triton kernels without a GPU: interpreted in a process of its own, chosen by the passes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).with_name("triton_interpreted.py")


def test_every_kernel_under_the_interpreter() -> None:
    """The tests of ``triton_interpreted.py``."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(FILE)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    outcome = subprocess.run(
        command, cwd=FILE.parents[1], env=environment, capture_output=True, text=True, timeout=300
    )
    assert outcome.returncode == 0, outcome.stdout[-4000:] + outcome.stderr[-1000:]
    passed = re.search(r"(\d+) passed", outcome.stdout)
    assert passed is not None
    assert int(passed[1]) > 80
