"""Compiles sources: once for each formula, layout and machine, into a cache that processes share.

A library is written under another name and moved to its own, so that a reader finds a whole one or
none; a lock keeps processes from compiling the same source at the same time. Behind its last byte
stands its digest: what is damaged is compiled again, not loaded. A folder that others may write to
is not used, since what lies in it is run.

OpenMP is the one that torch has loaded, where its file is found: two of them would each keep
threads.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import filelock
import torch

PRELUDE = (Path(__file__).parent / "prelude.h").read_text()
FLAGS = (
    "-std=c++20", "-O3", "-march=native", "-fPIC", "-shared", "-fno-math-errno",
    "-fno-trapping-math", "-ffp-contract=fast", "-fopenmp", "-w",
)  # fmt: skip
PROBE = 'extern "C" int64_t probe() { return omp_get_max_threads() > 0 ? W : 0; }'
DIGEST = 32  # bytes


class NoCompiler(Exception):
    """Nothing can be compiled here; the text says why."""


def library(body: str, single: str) -> ctypes.CDLL:
    """The compiled library of a source.

    Args:
        body: its functions.
        single: the type that is computed in, "float" or "double".

    Raises:
        NoCompiler: it could not be compiled, kept or loaded.
    """
    text = f"typedef {single} acc;\n{PRELUDE}\n{body}\n"
    command = [compiler(), *FLAGS]
    key = hashlib.sha256("\0".join([text, *command, *_openmp(), _machine()]).encode())
    path = folder() / f"{key.hexdigest()[:32]}.so"
    try:
        if not _is_whole(path):
            with filelock.FileLock(f"{path}.lock"):
                if not _is_whole(path):
                    _compile(text, command, path)
        return ctypes.CDLL(str(path))
    except (OSError, NotImplementedError) as error:
        raise NoCompiler(f"{path} is of no use: {error}") from error


def folder() -> Path:
    """Where libraries are kept: ``BNREWRITE_CACHE``, or the user's cache.

    Raises:
        NoCompiler: it cannot be made or written to, or others may write to it.
    """
    if not hasattr(os, "geteuid"):
        raise NoCompiler("kernels are compiled where files have an owner, on Linux or macOS")
    given = os.environ.get("BNREWRITE_CACHE")
    remedy = "set BNREWRITE_CACHE to a folder of your own"
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        path = Path(given) if given else home / "bnrewrite"
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = path.stat()
    except (OSError, RuntimeError) as error:  # no home
        raise NoCompiler(f"there is no folder for compiled kernels ({error}); {remedy}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise NoCompiler(f"compiled kernels cannot be kept in {path}; {remedy}")
    if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise NoCompiler(f"{path} may be written by other users; {remedy}")
    return path.absolute()


@cache
def why_no_kernels() -> str | None:
    """Why none can be compiled and run here, found by trying; None if they can."""
    try:
        probe = library(PROBE, "float").probe
    except NoCompiler as reason:
        return str(reason)
    return None if probe() else "OpenMP has no threads"


@cache
def compiler() -> str:
    """The compiler: ``CXX``, g++ or clang++."""
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and shutil.which(name):
            return name
    raise NoCompiler("there is no C++ compiler (CXX, g++ or clang++)")


def _is_whole(path: Path) -> bool:
    """Whether a library is there, with its own digest behind it."""
    if not path.exists():
        return False
    content = path.read_bytes()
    return hashlib.sha256(content[:-DIGEST]).digest() == content[-DIGEST:]


def _compile(text: str, command: list[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, ignore_cleanup_errors=True) as place:
        source, made = Path(place) / "norm.cpp", Path(place) / "norm.so"
        source.write_text(text)
        try:
            run = subprocess.run(
                [*command, "-o", str(made), str(source), *_openmp()],
                capture_output=True, text=True, errors="replace", timeout=120, check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NoCompiler(f"{command[0]} did not run: {error}") from error
        if run.returncode or not made.exists():
            said = run.stderr.strip()[-2000:] or f"exit status {run.returncode}"
            raise NoCompiler(f"{command[0]} failed: {said}")
        with made.open("ab") as file:
            file.write(hashlib.sha256(made.read_bytes()).digest())
        os.replace(made, path)


@cache
def _openmp() -> tuple[str, ...]:
    """The file of torch's own OpenMP, linked by name in place of the compiler's."""
    root = Path(torch.__file__).parent
    for place in (root / "lib", root.parent / "torch.libs"):
        for found in sorted(place.glob("libgomp*.so*")):
            own = ("-nodefaultlibs", str(found), f"-Wl,-rpath,{place}")
            return (*own, "-lstdc++", "-lm", "-lc", "-lgcc_s", "-lgcc")
    return ()


@cache
def _machine() -> str:
    """What ``-march=native`` stands for here."""
    flags = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {flags} {torch.__version__}"
