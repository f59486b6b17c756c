"""Kernels as programs of an ARM processor, run by an emulator.

It needs two Debian packages, `g++-aarch64-linux-gnu` and `qemu-user`. Whole files of tests run so
as well, but for those of the C++ runtime and those that change how kernels are compiled:

    export PYTHONPATH=tests SOME="not (compiled or processors or past)"
    python -m pytest -p emulated tests/test_generated_kernels.py -k "$SOME"

Instead of being loaded, a kernel becomes a program that reads the tensors and numbers of a call
from a file and writes the tensors back.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bnrewrite.kernels.generated import build, call, kernel, runtime

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
FLAGS = [flag for flag in build.FLAGS if flag not in ("-shared", "-fPIC", build.NATIVE)]
MAIN = """
#include <cstdio>
#include <cstdlib>

template <class T>
std::vector<T> numbers(FILE *file, int64_t bytes) {
  std::vector<T> found(bytes / sizeof(T));
  if (fread(found.data(), 1, bytes, file) != size_t(bytes)) abort();
  return found;
}

int main(int, char **given) {
  FILE *file = fopen(given[2], "rb");
  const auto list = [&] { return numbers<int64_t>(file, 8 * numbers<int64_t>(file, 8)[0]); };
  const auto sizes = list(), loops = list();
  const auto extents = numbers<double>(file, 8 * numbers<int64_t>(file, 8)[0]);
  const auto threads = numbers<int64_t>(file, 8)[0];
  std::vector<std::vector<char>> tensors;
  std::vector<void *> pointers;
  for (int64_t size : sizes) {
    tensors.push_back(numbers<char>(file, std::max<int64_t>(size, 0)));
    pointers.push_back(size < 0 ? nullptr : tensors.back().data());
  }
  fclose(file);
  (given[1][0] == 'f' ? forward : backward)(pointers.data(), extents.data(), loops.data(), threads);
  file = fopen(given[2], "wb");
  for (const auto &tensor : tensors) fwrite(tensor.data(), 1, tensor.size(), file);
  fclose(file);
}
"""


def missing() -> str | None:
    """What has to be installed first; None where everything is there."""
    absent = [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]
    return f"no {' and no '.join(absent)} to run an ARM processor's kernels" if absent else None


def emulate(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Have kernels compiled into a folder, and run, as an ARM processor's."""
    patch.setattr(kernel, "library", functools.partial(_library, folder))
    patch.setattr(kernel, "compiled_functions", kernel.compiled_functions.__wrapped__)
    patch.setattr(kernel.Kernel, "run", _run)
    patch.setattr(call, "_kernels", {})
    patch.setattr(runtime, "call", lambda *_: None)
    patch.setattr(runtime, "add", lambda *_: None)


def _library(folder: Path, key: str, single: str, write: Callable[[], str]) -> Any:
    text = f"typedef {single} acc;\n{build.PRELUDE}\n{write()}\n{MAIN}"
    made = folder / hashlib.sha256(text.encode()).hexdigest()[:32]
    if not made.exists():
        source = made.with_suffix(".cpp")
        source.write_text(text)
        command = [COMPILER, *FLAGS, "-static", "-o", str(made), str(source)]
        subprocess.run(command, check=True, capture_output=True)
    told = re.findall(r'firm\(\) \{ return "(.*)"', text)[-1]
    return SimpleNamespace(
        forward=(made, "forward"), backward=(made, "backward"), firm=_Told(told.encode())
    )


class _Told:
    """A function of a library that returns a text."""

    restype: Any = None

    def __init__(self, text: bytes) -> None:
        self.text = text

    def __call__(self) -> bytes:
        return self.text


def _run(self: kernel.Kernel, function: Any, pointers: Sequence[Tensor | None]) -> None:
    program, name = function
    sizes = [-1 if t is None else t.numel() * t.element_size() for t in pointers]
    threads = min(torch.get_num_threads(), self.threads)
    with tempfile.NamedTemporaryFile() as file:
        for code, numbers in (("q", sizes), ("q", self.loops), ("d", self.extents)):
            file.write(struct.pack(f"<q{len(numbers)}{code}", len(numbers), *numbers))
        file.write(struct.pack("<q", threads))
        for tensor, size in zip(pointers, sizes, strict=True):
            if tensor is not None:
                file.write(ctypes.string_at(tensor.data_ptr(), size))
        file.flush()
        subprocess.run([EMULATOR, str(program), name, file.name], check=True)
        file.seek(0)
        for tensor, size in zip(pointers, sizes, strict=True):
            if tensor is not None:
                ctypes.memmove(tensor.data_ptr(), file.read(size), size)


@pytest.fixture(scope="session", autouse=True)
def on_an_arm_processor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Of the tests that this file is a plugin of."""
    reason = missing()
    if reason:
        pytest.exit(reason)
    with pytest.MonkeyPatch.context() as patch:
        emulate(patch, tmp_path_factory.mktemp("arm"))
        yield
