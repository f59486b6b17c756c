"""The compiled runtime: it calls kernels and records them for autograd in C++.

It belongs to a version of torch, not to a formula, and takes its compiler 20 s: it is built beside
the program, once, and used from when it is there. ``python -m bnrewrite.kernels.generated`` builds
it ahead.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
import sysconfig
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .build import NoCompiler, compiled
from .kernel import Kernel
from .record import of_reference

SOURCE = Path(__file__).parent / "runtime.cpp"
# Shape and strides of x; numbers of elements and dtypes of all tensors.
Kinds = tuple[Sequence[int], Sequence[int], list[int], list[int]]
DTYPES = {torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bfloat16: 15}

_log = logging.getLogger(__name__)
_module: ModuleType | None = None
_call: Any = None
_programs: dict[str, int] = {}
_added: weakref.WeakSet[Kernel] = weakref.WeakSet()
_waiting: list[tuple[str, Kernel, Kinds]] = []
_lock = threading.Lock()
_builder: threading.Thread | None = None


def call(text: str, x: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
    """What a program makes; None where the runtime has no kernel for such tensors."""
    number = _programs.get(text)
    if number is None:
        return None
    made: tuple[Tensor, ...] | None = _call(number, x, *tensors)
    return made


def forward(text: str, x: Tensor, tensors: list[Tensor]) -> list[Tensor] | None:
    """What the operator makes, as ``operators.norm_forward``; None without a kernel here."""
    number = _programs.get(text)
    if number is None:
        return None
    assert _module is not None
    made: list[Tensor] | None = _module.forward(number, x, tensors)
    return made


def backward(
    text: str, dy: Tensor, x: Tensor, y: Tensor | None, moments: Tensor, tensors: list[Tensor]
) -> list[Tensor] | None:
    """The gradients, as ``operators.norm_backward``; None without a kernel here."""
    number = _programs.get(text)
    if number is None:
        return None
    assert _module is not None
    made: list[Tensor] | None = _module.backward(number, dy, x, y, moments, tensors)
    return made


def add(text: str, kernel: Kernel, given: tuple[Tensor, ...]) -> None:
    """Have the runtime call a kernel for tensors like these, now or once it is built."""
    global _builder
    if kernel in _added:
        return
    x, counts = given[0], [t.numel() for t in given]
    kinds: Kinds = (x.shape, x.stride(), counts, [DTYPES[t.dtype] for t in given])
    with _lock:
        _added.add(kernel)
        if _module is not None:
            _register(text, kernel, kinds)
            return
        _waiting.append((text, kernel, kinds))
        if _builder is None:
            _builder = threading.Thread(target=_build_quietly, daemon=True)
            _builder.start()


def build() -> None:
    """Build the runtime, or find it built, and use it.

    Raises:
        NoCompiler: it could not be compiled.
    """
    global _module, _call
    root = Path(torch.__file__).parent
    flags = [
        "-std=c++20", "-O2", "-fPIC", "-shared", "-w", f"-I{sysconfig.get_paths()['include']}",
        f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}",
    ]  # fmt: skip
    links = [f"-L{root / 'lib'}", "-ltorch_python", "-ltorch_cpu", "-lc10"]
    source = SOURCE.read_text()
    path = compiled(source, lambda: source, flags, "bnrewrite_runtime", links)
    spec = importlib.util.spec_from_file_location("bnrewrite_runtime", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with _lock:
        _module, _call = module, module.call
        for waiting in _waiting:
            _register(*waiting)
        _waiting.clear()


def _build_quietly() -> None:
    try:
        build()
    except (NoCompiler, ImportError, OSError) as reason:
        _log.info("kernels are called from Python: %s", reason)


def _register(text: str, kernel: Kernel, kinds: Kinds) -> None:
    assert _module is not None
    if text not in _programs:
        _programs[text] = _module.program()
    plain = [
        _address(kernel.forward), _address(kernel.backward), kernel.copies, kernel.residual,
        kernel.threads, kernel.groups, kernel.saved, kernel.updates, DTYPES[kernel.single],
        DTYPES[kernel.result], len(kernel.orders),
    ]  # fmt: skip
    lists = [
        *kinds, plain, kernel.loops, kernel.extents,
        kernel.free, kernel.used, kernel.firm, kernel.copied, *kernel.kept,
    ]  # fmt: skip
    for order in kernel.orders:
        lists += order or ([], [])
    numbers = [int(value) for one in lists for value in (len(one), *one)]
    _module.add(_programs[text], _reference(text), numbers)


@functools.cache
def _reference(text: str) -> functools.partial[Any]:
    return functools.partial(of_reference, text)


def _address(function: Any) -> int:
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return address
