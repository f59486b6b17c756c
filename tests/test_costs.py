"""The table of measured times: what is looked up and taken, and the benchmark that fills it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from benchmarks import costs as benchmark
from benchmarks import hand_written
from benchmarks.cost_cases import EXPONENTS, KINDS, Case, Kind, cases
from bnrewrite import explain, optimize
from bnrewrite.capture.backend import Compiler
from bnrewrite.passes import cost_table
from bnrewrite.passes.cost_table import LOWERINGS, Table, Work, fastest, read_table, table_of
from bnrewrite.passes.costs import SMALLEST_KERNEL

WORK = Work("layer_norm", "rows", "float32", True)
NATIVE = {"batch_norm", "layer_norm", "group_norm", "rms_norm"}
LARGE = torch.randn(64, 64)


def a_table(**times: float) -> Table:
    """One class of size, and the same times for every kind of work that these tests have."""
    keys = [
        Work(family, "rows", "float32", training).key
        for family in ("layer_norm", "rms_norm")
        for training in (True, False)
    ]
    return Table((4096,), {key: {name: (time,) for name, time in times.items()} for key in keys})


def use(monkeypatch: pytest.MonkeyPatch, table: Table | None) -> None:
    monkeypatch.setattr("bnrewrite.passes.costs.table_of", lambda device, stage: table)


def lowering(model: nn.Module, x: Tensor, backend: str = "eager", kernels: str = "auto") -> str:
    (site,) = explain(optimize(model, backend=backend, kernels=kernels), x).sites
    return str(site.lowering)


def lowering_of_any_batch(model: nn.Module, x: Tensor, backend: str = "eager") -> str:
    """That of a batch whose size is a symbol."""
    found: list[Any] = []

    def watch(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        assert any(isinstance(each, torch.SymInt) for each in inputs)
        found.extend(Compiler(backend).look_at(graph, inputs)[0].sites)
        return graph.forward

    torch._dynamo.mark_dynamic(x, 0)
    torch.compile(model, backend=watch)(x)
    (site,) = found
    return str(site.lowering)


@pytest.mark.parametrize(
    ("elements", "place"),
    [(1, 0), (64, 0), (181, 0), (182, 1), (512, 1), (4096, 2), (10**12, 2), (None, 2)],
)
def test_a_size_is_of_the_nearest_class(elements: float | None, place: int) -> None:
    table = Table((64, 512, 4096), {WORK.key: {"native": (1.0, 2.0, 3.0)}})
    sized = Work(WORK.family, WORK.layout, WORK.dtype, WORK.training, elements)
    assert table.times(sized) == {"native": place + 1.0}


def test_other_works_have_other_times_or_those_of_general_formulas() -> None:
    general = Work("general", "rows", "float32", True)
    entries = {WORK.key: {"native": (1.0,)}, general.key: {"generated": (2.0,)}}
    table = Table((64,), entries)
    assert table.times(WORK) == {"native": 1.0}
    assert table.times(Work("lp_normalize", "rows", "float32", True)) == {"generated": 2.0}
    for other in (
        Work("layer_norm", "columns", "float32", True),
        Work("layer_norm", "rows", "float32", False),
        Work("layer_norm", "rows", "float32", True, fused=True),
    ):
        assert table.times(other) is None


def test_dtypes_that_were_not_measured_have_the_times_of_float32() -> None:
    general, own = (Work(f, "rows", "float16", True) for f in ("general", WORK.family))
    entries = {WORK.key: {"native": (1.0,)}, general.key: {"native": (2.0,)}}
    assert Table((64,), entries).times(own) == {"native": 1.0}
    assert Table((64,), entries | {own.key: {"native": (3.0,)}}).times(own) == {"native": 3.0}


@pytest.mark.parametrize(
    ("times", "allowed", "taken"),
    [
        ((1.0, 2.0, 3.0), LOWERINGS, "generated"),
        ((1.09, 1.0, 3.0), LOWERINGS, "generated"),  # a tie
        ((1.11, 1.0, 3.0), LOWERINGS, "native"),
        ((1.11, 1.02, 1.0), LOWERINGS, "native"),
        ((3.0, 2.0, 1.0), LOWERINGS, "composite"),
        ((1.0, 2.0, 3.0), ("native", "composite"), "native"),
        ((1.0, 2.0, 3.0), (), None),
    ],
)
def test_what_is_taken(times: tuple[float, ...], allowed: Sequence[str], taken: str | None) -> None:
    assert fastest(dict(zip(LOWERINGS, times, strict=True)), allowed) == taken


@pytest.mark.parametrize(
    ("generated", "taken"), [(1.0, "composite"), (0.92, "composite"), (0.9, "generated")]
)
def test_what_inductor_is_given(generated: float, taken: str) -> None:
    """A tie goes to what it may fuse with more; native norms are the same to it as composite."""
    times = {"generated": generated, "native": 0.1, "composite": 1.0}
    assert fastest(times, LOWERINGS, "inductor") == taken


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.family}, {kind.layout}")
def test_a_site_is_the_work_that_was_measured(
    kind: Kind, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Work] = []

    class Watched(Table):
        def times(self, work: Work) -> dict[str, float] | None:
            asked.append(work)
            return None

    use(monkeypatch, Watched((), {}))
    case = Case(kind, "float32", training, 12)
    with torch.set_grad_enabled(training):
        x = case.tensor("cpu").requires_grad_(training)
        explain(optimize(case.model("cpu"), backend="eager"), x)
    assert set(asked) == {case.work}


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({"generated": 1.0, "native": 2.0, "composite": 3.0}, "generated"),
        ({"generated": 2.0, "native": 1.0, "composite": 3.0}, "native"),
        ({"generated": 3.0, "native": 2.0, "composite": 1.0}, "composite"),
        ({"generated": 2.0, "composite": 1.0}, "native"),  # it was not measured
        ({"generated": 1.0, "composite": 2.0}, "generated"),
    ],
)
def test_a_site_takes_what_was_measured(
    times: dict[str, float], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, a_table(**times))
    assert lowering(hand_written.LayerNorm(64), LARGE) == expected


def test_what_is_asked_for_and_other_stages_need_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, a_table(generated=3.0, native=2.0, composite=1.0))
    for kernels in LOWERINGS:
        assert lowering(hand_written.LayerNorm(64), LARGE, kernels=kernels) == kernels
        taken = lowering(hand_written.LayerNorm(64), LARGE, "inductor", kernels)
        assert taken == kernels
    use(monkeypatch, a_table(generated=1.0, native=2.0, composite=3.0))
    assert lowering(hand_written.LayerNorm(64), LARGE, "aot_eager") == "native"


@pytest.mark.parametrize(
    ("generated", "fused", "expected"),
    [(1.0, 1.0, ("generated",) * 3), (1.0, 9.0, ("generated", "composite", "composite"))],
)
def test_inductor_has_a_table_of_its_own(
    generated: float, fused: float, expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With times of norms whose tensor it would make together with their moments."""
    entries = {
        Work("layer_norm", "rows", "float32", True, fused=behind).key: {
            "generated": (time,), "composite": (2.0,),
        }
        for behind, time in ((False, generated), (True, fused))
    }  # fmt: skip
    tables = {"inductor": Table((4096,), entries), "eager": a_table(native=1.0)}
    monkeypatch.setattr("bnrewrite.passes.costs.table_of", lambda device, stage: tables[stage])
    norm = hand_written.LayerNorm(64)

    class Behind(nn.Module):
        def __init__(self, viewed: tuple[int, ...]) -> None:
            super().__init__()
            self.norm, self.viewed = norm, viewed

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm(x.exp().view(self.viewed))
            return y

    for model, taken in zip((norm, Behind((64, 64)), Behind((8, 8, 64))), expected, strict=True):
        assert lowering(model, LARGE, "inductor") == taken
        assert lowering(model, LARGE) == "native"


def test_inductor_fuses_what_has_symbolic_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """In its own layout a saved tensor may have a stride that was right for one size alone."""
    key = Work("layer_norm", "rows", "float32", True).key
    use(monkeypatch, Table((4096,), {key: {"generated": (1.0,), "composite": (2.0,)}}))
    norm, x = hand_written.LayerNorm(64), LARGE.clone()
    assert lowering(norm, x) == lowering(norm, x, "inductor") == "generated"
    assert lowering_of_any_batch(norm, x, "inductor") == "composite"
    assert lowering_of_any_batch(norm, LARGE.clone()) == "generated"


def test_inductor_without_a_table_fuses(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, None)
    assert lowering(hand_written.LayerNorm(64), LARGE, "inductor") == "composite"


def test_a_mode_has_its_own_times(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast = (a_table(generated=g, native=2.0, composite=9.0) for g in (3.0, 1.0))
    entries = {**slow.microseconds, WORK.key: fast.microseconds[WORK.key]}
    use(monkeypatch, Table((4096,), entries))
    assert lowering(hand_written.LayerNorm(64), LARGE) == "generated"
    with torch.no_grad():
        assert lowering(hand_written.LayerNorm(64), LARGE) == "native"


def test_the_next_best_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bnrewrite.passes.plan.why_no_kernels", lambda: "there is no compiler")
    for composite, expected in ((1.0, "composite"), (3.0, "native")):
        use(monkeypatch, a_table(generated=0.5, native=2.0, composite=composite))
        assert lowering(hand_written.RMSNorm(64), LARGE) == expected


def test_without_a_table_a_kernel_is_taken_where_it_is_not_small(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use(monkeypatch, None)
    rows = SMALLEST_KERNEL // 64
    assert lowering(hand_written.LayerNorm(64), torch.randn(rows, 64)) == "generated"
    assert lowering(hand_written.LayerNorm(64), torch.randn(rows - 1, 64)) == "native"


def test_no_kernel_is_compiled_for_little(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, a_table(generated=1.0, native=2.0, composite=3.0))
    assert lowering(hand_written.LayerNorm(64), torch.randn(15, 64)) == "native"


@pytest.mark.parametrize(("rows", "expected"), [(4, "native"), (4096, "generated")])
def test_a_symbolic_size_is_its_example(
    rows: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bnrewrite.passes.costs.SMALLEST_KERNEL", 0)
    entry = {"generated": (2.0, 1.0), "native": (1.0, 2.0), "composite": (9.0, 9.0)}
    use(monkeypatch, Table((256, 262144), {WORK.key: entry}))
    x = torch.randn(rows, 64)
    assert lowering_of_any_batch(hand_written.LayerNorm(64), x) == expected


def test_a_size_without_an_example_is_unknown() -> None:
    unknown = ShapeEnv().create_unbacked_symint()
    assert cost_table._example(unknown) is None
    assert cost_table._example(7) == 7


@pytest.mark.parametrize("stage", ["eager", "inductor"])
def test_the_table_of_cpus_is_complete(stage: str) -> None:
    table = table_of("cpu", stage)
    assert table is not None
    assert table.sizes == tuple(2**exponent for exponent in EXPONENTS["cpu", stage])
    works = {case.work.key: case.kind.family for case in cases("cpu", stage)}
    assert set(table.microseconds) == set(works)
    for key, family in works.items():
        entry = table.microseconds[key]
        native = {"native"} if family in NATIVE and stage == "eager" else set()
        assert set(entry) == {"generated", "composite", *native}
        for times in entry.values():
            assert len(times) == len(table.sizes)
            assert all(0 < time < math.inf for time in times)


def test_a_device_without_a_table() -> None:
    assert table_of("meta") is None


def test_the_table_is_filled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    few = [Case(KINDS[2], "float64", training, 6) for training in (True, False)]
    monkeypatch.setattr(benchmark, "cases", lambda device, stage, only: few)
    arguments = ["--rounds", "2", "--table", str(tmp_path), "--output", str(tmp_path / "results")]
    assert benchmark.main([*arguments, "--only", "layer_norm"]) == 0
    assert not list(tmp_path.iterdir())
    assert benchmark.main(arguments) == 0
    table = read_table((tmp_path / "costs_cpu.json").read_text(encoding="utf-8"))
    assert table.sizes == (64,)
    for case in few:
        times = table.times(case.work)
        assert times is not None
        assert set(times) == set(LOWERINGS)
        assert min(times.values()) > 0
    text = (tmp_path / "results" / "costs_cpu.md").read_text(encoding="utf-8")
    assert text.count("**") == 2 * len(few)
    path, before = tmp_path / "costs_cpu.json", table
    few[:] = few[:1]
    assert benchmark.main([*arguments, "--only", "layer_norm", "--update"]) == 0
    table = read_table(path.read_text(encoding="utf-8"))
    changed = {
        key for key, times in table.microseconds.items() if times != before.microseconds[key]
    }
    assert (table.microseconds.keys(), changed) == (before.microseconds.keys(), {few[0].work.key})
    assert '"updated": "layer_norm, 2' in path.read_text(encoding="utf-8")


def test_a_lowering_of_some_sizes_is_no_table() -> None:
    found = {
        Case(KINDS[2], "float32", True, 6): {"native": 1.0, "composite": 2.0},
        Case(KINDS[2], "float32", True, 9): {"composite": 2.0},
    }
    with pytest.raises(RuntimeError, match="was written for some of the sizes"):
        benchmark.tabulated(found)


def test_what_cannot_be_measured(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--only", "no such cell"], ["--threads", "2", "--clock", "process"]):
        with pytest.raises(SystemExit):
            benchmark.main(arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["--device", "cuda"]) == 0
    assert "torch sees no GPU here: nothing was measured" in capsys.readouterr().out
