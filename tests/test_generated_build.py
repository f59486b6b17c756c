"""The compiler and its cache: shared, killed, damaged, foreign, missing."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bnrewrite import explain, optimize
from bnrewrite.kernels.generated import build, call, kernel, norm, runtime
from bnrewrite.kernels.generated.build import NoCompiler, library, why_no_kernels

ANSWER = 'extern "C" int answer() { return 42; }'


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache, and nothing known of the compiler."""
    monkeypatch.setenv("BNREWRITE_CACHE", str(tmp_path / "kernels"))
    monkeypatch.setattr(call, "_kernels", {})
    monkeypatch.setattr(runtime, "_programs", {})
    forget()
    yield tmp_path / "kernels"
    forget()


def forget() -> None:
    build.compiler.cache_clear()
    why_no_kernels.cache_clear()
    kernel.compiled_functions.cache_clear()


def answer() -> int:
    found = library("the answer", "float", lambda: ANSWER).answer
    found.restype = ctypes.c_int
    return int(found())


def only(folder: Path) -> Path:
    (found,) = folder.glob("*.so")
    return found


def test_a_library_is_compiled_once_into_a_folder_of_the_users(fresh: Path) -> None:
    assert answer() == 42
    assert fresh.stat().st_mode & 0o777 == 0o700
    made = only(fresh).stat().st_mtime_ns
    assert answer() == 42
    assert only(fresh).stat().st_mtime_ns == made


def _answers(results: multiprocessing.SimpleQueue[int]) -> None:
    results.put(answer())


def test_processes_that_want_the_same_at_once(fresh: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    processes = [context.Process(target=_answers, args=(results,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [results.get() for _ in processes] == [42] * 3
    assert only(fresh)


@pytest.mark.parametrize("keeps", [0, 1000, -1])
def test_a_damaged_library_is_compiled_again(fresh: Path, keeps: int) -> None:
    assert answer() == 42
    path = only(fresh)
    whole = path.read_bytes()
    path.unlink()  # the loaded one stays as it is
    path.write_bytes(whole[:keeps])
    assert answer() == 42
    assert len(path.read_bytes()) == len(whole)


def test_what_a_killed_build_leaves_is_in_no_ones_way(fresh: Path) -> None:
    assert answer() == 42
    path = only(fresh)
    path.unlink()
    (fresh / "tmpkilled").mkdir()
    (fresh / "tmpkilled" / "norm.so").write_bytes(b"half")
    path.with_name(f"{path.name}.lock").touch()
    assert answer() == 42


@pytest.mark.parametrize("mode", [0o770, 0o777])
def test_a_folder_that_others_may_write_to_is_not_trusted(fresh: Path, mode: int) -> None:
    fresh.mkdir()
    fresh.chmod(mode)
    with pytest.raises(NoCompiler, match="may be written by other users; set BNREWRITE_CACHE"):
        answer()


def test_a_folder_of_someone_else_is_not_trusted(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(NoCompiler, match="may be written by other users"):
        answer()


def test_a_folder_that_cannot_be_made(fresh: Path) -> None:
    fresh.write_text("a file")
    with pytest.raises(NoCompiler, match="there is no folder for compiled kernels"):
        answer()


def test_a_folder_that_cannot_be_written(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    access = os.access  # root may write anywhere
    monkeypatch.setattr(os, "access", lambda path, mode: path != fresh and access(path, mode))
    with pytest.raises(NoCompiler, match="compiled kernels cannot be kept in"):
        answer()


COMPILERS = {
    "none": ("", "there is no C++ compiler"),
    "one that fails": ("/bin/false", "/bin/false failed: exit status 1"),
    "one that makes nothing": ("/bin/true", "/bin/true failed: exit status 0"),
}


@pytest.mark.parametrize("name", COMPILERS)
def test_without_a_compiler_the_other_lowerings_run(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler, sentence = COMPILERS[name]
    monkeypatch.setenv("CXX", compiler)
    if not compiler:
        monkeypatch.setenv("PATH", "/nonexistent")

    def layer(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-3)

    model = optimize(layer, backend="eager", kernels="generated")
    x = torch.randn(4, 30)
    torch.testing.assert_close(model(x), layer(x))
    (site,) = explain(model, x).sites
    assert site.lowering == "composite"
    (note,) = site.notes
    assert note.startswith(f"no kernel is compiled for it: {sentence}")


def test_a_kernel_that_cannot_be_compiled_runs_by_operations(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "/bin/false")
    x = torch.randn(4, 30)
    text = "x[a b] over b; centre = M; scale = (V + 1.0e-5)**(-1/2)"
    for _ in range(2):
        torch.testing.assert_close(norm(text, x), torch.layer_norm(x, [30]))
    (record,) = caplog.records  # once
    assert record.getMessage() == (
        "a norm runs without a kernel of its own: /bin/false failed: exit status 1"
    )
