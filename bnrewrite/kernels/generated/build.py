"""Compiles sources: once for each formula, layout and machine, into a cache that processes share.

A library is written under another name and moved to its own, so that a reader finds a whole one or
none; a lock keeps processes from compiling the same source at the same time. Behind its last byte
stands its digest: what is damaged is compiled again, not loaded. A folder that others may write to
is not used, since what lies in it is run.

OpenMP has the name of torch's own, which is loaded already: there is one set of threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import filelock
import sympy
import torch

PRELUDE = (Path(__file__).parent / "prelude.h").read_text()
# Compilers for ARM have another name for the processor that they run on; some lack the usual one.
NATIVE = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
FLAGS = (
    "-std=c++20", "-O3", NATIVE, "-fPIC", "-shared", "-fno-math-errno",
    "-fno-trapping-math", "-ffp-contract=fast", "-fopenmp", "-w",
)  # fmt: skip
PROBE = 'extern "C" int64_t probe() { return omp_get_max_threads() > 0 ? W : 0; }'
DIGEST = 32  # bytes

REMEDY = "set BNREWRITE_CACHE to a folder of your own"


class NoCompiler(Exception):
    """Nothing can be compiled here; the text says why."""


def library(key: str, single: str, write: Callable[[], str]) -> ctypes.CDLL:
    """The compiled library of a source, which is written only if it is not there.

    Args:
        key: what the source depends on besides this package.
        single: the type that is computed in, "float" or "double".
        write: makes the functions of the source.

    Raises:
        NoCompiler: it could not be compiled, kept or loaded.
    """

    def whole() -> str:
        return f"typedef {single} acc;\n{PRELUDE}\n{write()}\n"

    path = compiled("\0".join([key, single, _printers()]), whole, FLAGS, "norm")
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NoCompiler(f"{path} is of no use: {error}") from error


def compiled(
    key: str, write: Callable[[], str], flags: Sequence[str], name: str, links: Sequence[str] = ()
) -> Path:
    """The file of a compiled source, made now if it is not there.

    Args:
        key: what the source depends on.
        write: makes the source.
        flags: of the compiler.
        name: how the file's name begins.
        links: what it is linked with.

    Raises:
        NoCompiler: it could not be compiled or kept.
    """
    command = [compiler(), *flags]
    digest = hashlib.sha256("\0".join([key, *command, *links, _machine()]).encode())
    path = folder() / f"{name}_{digest.hexdigest()[:32]}.so"
    try:
        if not _is_whole(path):
            with filelock.FileLock(f"{path}.lock"):
                if not _is_whole(path):
                    _compile(write(), command, links, path)
    except (OSError, NotImplementedError) as error:
        raise NoCompiler(f"{path} cannot be made: {error}") from error
    return path


def folder() -> Path:
    """Where files are kept: ``BNREWRITE_CACHE``, the virtual environment, the user's cache.

    Raises:
        NoCompiler: it cannot be made or written to, or others may write to it.
    """
    if not hasattr(os, "geteuid"):
        raise NoCompiler("kernels are compiled where files have an owner, on Linux or macOS")
    given = os.environ.get("BNREWRITE_CACHE")
    if given:
        return _own(Path(given))
    if sys.prefix != sys.base_prefix:
        with contextlib.suppress(NoCompiler):
            return _own(Path(sys.prefix) / ".cache" / "bnrewrite")
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise NoCompiler(f"there is no folder for compiled kernels ({error}); {REMEDY}") from error
    return _own(home / "bnrewrite")


def _own(path: Path) -> Path:
    """A folder that this user alone writes to."""
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = path.stat()
    except OSError as error:
        raise NoCompiler(f"there is no folder for compiled kernels ({error}); {REMEDY}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise NoCompiler(f"compiled kernels cannot be kept in {path}; {REMEDY}")
    if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise NoCompiler(f"{path} may be written by other users; {REMEDY}")
    return path.absolute()


@cache
def why_no_kernels() -> str | None:
    """Why none can be compiled and run here, found by trying; None if they can."""
    try:
        probe = library(PROBE, "float", lambda: PROBE).probe
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


def _compile(text: str, command: list[str], links: Sequence[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, ignore_cleanup_errors=True) as place:
        source, made = Path(place) / "norm.cpp", Path(place) / "norm.so"
        source.write_text(text)
        try:
            run = subprocess.run(
                [*command, "-o", str(made), str(source), *links],
                capture_output=True, text=True, errors="replace", timeout=600, check=False,
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
def _printers() -> str:
    """A digest of what prints sources: this folder, and what it prints with."""
    digest = hashlib.sha256(sympy.__version__.encode())
    for path in sorted(Path(__file__).parent.iterdir()):
        if path.suffix in (".py", ".h"):
            digest.update(path.read_bytes())
    return digest.hexdigest()


@cache
def _machine() -> str:
    """What the name of this processor stands for."""
    flags = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {flags} {torch.__version__}"
