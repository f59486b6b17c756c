"""Compiles sources: once for each formula, layout and machine, into a cache that processes share.

A library is written under another name and moved to its own, so that a reader finds a whole one or
none; a lock keeps processes from compiling the same source at the same time. OpenMP has the name of
torch's own, which is loaded already: there is one set of threads.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import filelock
import torch

PRELUDE = (Path(__file__).parent / "prelude.h").read_text()
FLAGS = (
    "-std=c++20", "-O3", "-march=native", "-fPIC", "-shared", "-fno-math-errno",
    "-fno-trapping-math", "-ffp-contract=fast", "-fopenmp", "-w",
)  # fmt: skip


class NoCompiler(Exception):
    """There is no C++ compiler that works; the text says what it said."""


def library(body: str, single: str) -> ctypes.CDLL:
    """The compiled library of a source.

    Args:
        body: its functions.
        single: the type that is computed in, "float" or "double".

    Raises:
        NoCompiler: it could not be compiled.
    """
    path = compiled(f"typedef {single} acc;\n{PRELUDE}\n{body}\n", FLAGS, "norm")
    return ctypes.CDLL(str(path))


def compiled(text: str, flags: Sequence[str], name: str, links: Sequence[str] = ()) -> Path:
    """The file of a compiled source, made now if it is not there.

    Raises:
        NoCompiler: it could not be compiled.
    """
    command = [compiler(), *flags]
    key = hashlib.sha256("\0".join([text, *command, *links, _machine()]).encode()).hexdigest()[:32]
    path = folder() / f"{name}_{key}.so"
    if not path.exists():
        with filelock.FileLock(f"{path}.lock"):
            if not path.exists():
                _compile(text, command, links, path)
    return path


def folder() -> Path:
    """Where libraries are kept: ``BNREWRITE_CACHE``, or the user's cache."""
    given = os.environ.get("BNREWRITE_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = Path(given) if given else home / "bnrewrite"
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path


def has_compiler() -> bool:
    """Whether there is a compiler."""
    try:
        return bool(compiler())
    except NoCompiler:
        return False


@cache
def compiler() -> str:
    """The compiler: ``CXX``, g++ or clang++."""
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and shutil.which(name):
            return name
    raise NoCompiler("there is no C++ compiler (CXX, g++ or clang++)")


def _compile(text: str, command: list[str], links: Sequence[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as place:
        source, made = Path(place) / "norm.cpp", Path(place) / "norm.so"
        source.write_text(text)
        try:
            run = subprocess.run(
                [*command, "-o", str(made), str(source), *links],
                capture_output=True, text=True, timeout=600, check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NoCompiler(f"{command[0]} did not run: {error}") from error
        if run.returncode:
            raise NoCompiler(f"{command[0]} failed: {run.stderr.strip()[-2000:]}")
        os.replace(made, path)


@cache
def _machine() -> str:
    """What ``-march=native`` stands for here."""
    flags = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {flags} {torch.__version__}"
