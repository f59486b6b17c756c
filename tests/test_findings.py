"""Each pathology is found in the example of its page, and nothing in the one that is mended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hand_written import BatchNorm
from page_examples import blocks, run_example, sections
from test_thread import DomainNet, ForumNet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bnrewrite import Finding, explain, optimize
from bnrewrite.report import PATHOLOGIES

pytestmark = pytest.mark.filterwarnings("error::bnrewrite.BnrewriteWarning")

SHARED, SECTIONS = sections("findings.md")


def run(program: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Finding], int]:
    """The findings of a program's model, and the number of its lines."""
    program = f"{SHARED}\n\n{program}"
    example = run_example(program, folder, monkeypatch)
    report = explain(example.model, *example.inputs)
    for shown in (report.to_text(), report.to_html(), report.to_json()):
        assert all(finding.code in shown for finding in report.findings)
    return report.findings, len(program.splitlines())


def test_every_pathology_has_a_section_with_two_examples() -> None:
    assert list(SECTIONS) == [f"{known.code} {name}" for name, known in PATHOLOGIES.items()]
    assert len(SECTIONS) >= 14
    assert {title: len(blocks(text)) for title, text in SECTIONS.items()} == dict.fromkeys(
        SECTIONS, 2
    )


@pytest.mark.parametrize("title", SECTIONS)
def test_the_page_shows_what_is_found(
    title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, name = title.split()
    wrong, mended = blocks(SECTIONS[title])
    findings, lines = run(wrong, tmp_path, monkeypatch)
    assert {finding.code for finding in findings} - SECONDARY.get(code, set()) == {code}
    for finding in findings:
        place, line = finding.source.split(":")
        assert place == "example.py"
        assert 0 < int(line) <= lines
    assert next(each for each in findings if each.code == code).name == name
    torch._dynamo.reset()
    assert run(mended, tmp_path, monkeypatch)[0] == []


# what the smallest example leaves out besides: nobody updates its other statistic
SECONDARY = {code: {"BNR011"} for code in ("BNR001", "BNR002", "BNR007")}
SECONDARY["BNR014"] = {"BNR016"}  # its wrapper discards what all but the first replica update


def codes(model: Callable[..., Any], *inputs: Any) -> set[str]:
    return {finding.code for finding in explain(model, *inputs).findings}


def test_the_forums_norm() -> None:
    x = torch.randn(5, 3, 8, 8)
    found = {"BNR001", "BNR002", "BNR005", "BNR006"}
    assert codes(ForumNet(literal=False), x, 0) == found
    assert codes(ForumNet(literal=True), x, 0) == found | {"BNR004"}
    assert codes(ForumNet(literal=False), x, 1) == {"BNR015"}


class Weighted(BatchNorm):
    """Statistics in which the new batch has a weight of its own."""

    def __init__(self, weight: float, correction: Callable[[Tensor], float]) -> None:
        super().__init__(3)
        self.new = weight
        self.correction = correction
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = x.mean((0, 2)), x.var((0, 2), correction=0)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.new)
            self.running_var.lerp_(variance * self.correction(x), self.new)
        y = (x - mean.view(1, 3, 1)) / torch.sqrt(variance.view(1, 3, 1) + 1e-5)
        return y * self.weight.view(1, 3, 1) + self.bias.view(1, 3, 1)


def bessel(n: int) -> float:
    return n / (n - 1)


CORRECTIONS: dict[str, tuple[Callable[[Tensor], float], set[str]]] = {
    "none": (lambda x: 1.0, set()),
    "elements": (lambda x: bessel(x.size(0) * x.size(2)), set()),
    "batch": (lambda x: bessel(x.size(0)), {"BNR006"}),
    "elements twice": (lambda x: bessel(x.size(0) * x.size(2)) ** 2, {"BNR005"}),
    "both": (lambda x: bessel(x.size(0) * x.size(2)) * bessel(x.size(0)), {"BNR005", "BNR006"}),
    "a number": (lambda x: 1.5, set()),
}


@pytest.mark.parametrize("name", CORRECTIONS)
def test_corrections_of_the_variance(name: str) -> None:
    correction, found = CORRECTIONS[name]
    x = torch.randn(6, 3, 2, dtype=torch.float64)
    assert codes(Weighted(0.25, correction), x) == found


def test_rows_have_as_many_elements_as_the_batch() -> None:
    by_batch = Weighted(0.1, lambda x: bessel(x.size(0)))
    assert codes(by_batch, torch.randn(6, 3, 1, dtype=torch.float64)) == set()


@pytest.mark.parametrize(("weight", "found"), [(0.5, False), (0.6, True), (1.0, False)])
def test_what_the_new_batch_weighs(weight: float, found: bool) -> None:
    x = torch.randn(6, 3, 2, dtype=torch.float64)
    assert codes(Weighted(weight, lambda x: 1.0), x) == ({"BNR007"} if found else set())


@pytest.mark.parametrize(
    ("formula", "found"),
    [
        (lambda x: (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True), True),
        (lambda x: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6), False),
        (lambda x: x * (x * x).mean(-1, keepdim=True).rsqrt(), True),
        (lambda x: x * (x * x).mean(-1, keepdim=True).clamp_min(1e-9).rsqrt(), False),
        (lambda x: x / x.abs().amax(-1, keepdim=True), True),
        (lambda x: nn.functional.normalize(x, dim=-1), False),
        (lambda x: x / x.sum(-1, keepdim=True), False),
    ],
)
def test_what_keeps_a_denominator_from_zero(formula: Any, found: bool) -> None:
    assert codes(formula, torch.randn(4, 6)) == ({"BNR008"} if found else set())


def test_squares_overflow_in_float16_alone() -> None:
    def norm(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)

    x = torch.randn(4, 6)
    found = [codes(norm, x.to(dtype)) for dtype in (torch.float16, torch.bfloat16, torch.float32)]
    assert found == [{"BNR010"}, set(), set()]


def test_a_model_of_which_nothing_is_trained_re_estimates_its_statistics() -> None:
    model = nn.Sequential(BatchNorm(3, "in place without gradients"), nn.Conv2d(3, 2, 1))
    x = torch.randn(4, 3, 5, 5)
    model[0].requires_grad_(False)
    assert codes(model, x) == {"BNR013"}
    with torch.no_grad():
        assert codes(model, x) == set()
    model.requires_grad_(False)
    assert codes(model, x) == set()


@pytest.mark.filterwarnings("ignore:`broadcast_buffers`")  # which another argument replaces
@pytest.mark.parametrize("broadcast", [True, False])
def test_domains_under_ddp(broadcast: bool, tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(
            DomainNet(nn.BatchNorm1d, 3),
            broadcast_buffers=broadcast,
            find_unused_parameters=True,
        )
        findings = explain(model, torch.randn(4, 5), 1).findings
    finally:
        dist.destroy_process_group()
    assert [finding.code for finding in findings] == (["BNR014"] if broadcast else [])
    if broadcast:
        assert "norms.1 is updated, norms.0, norms.2 not" in findings[0].message


def test_domains_of_one_process_are_no_finding() -> None:
    assert codes(DomainNet(lambda size: nn.BatchNorm1d(size), 3), torch.randn(4, 5), 1) == set()


@pytest.mark.parametrize("devices", [[], [0], [0, 1]])
def test_replicas_discard_statistics_where_there_are_several(
    devices: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nn.DataParallel, "forward", lambda self, x: self.module(x))
    wrapper = nn.DataParallel(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    wrapper.device_ids = devices
    model, x = nn.Sequential(wrapper, nn.Conv2d(4, 2, 1)), torch.randn(4, 3, 5, 5)
    findings = explain(model, x).findings
    assert [finding.code for finding in findings] == ([] if len(devices) == 1 else ["BNR016"])
    assert all("0.module.1.num_batches_tracked and 2 more" in each.message for each in findings)
    assert codes(model.eval(), x) == set()


def test_replicas_without_statistics_are_no_finding() -> None:
    assert codes(nn.DataParallel(nn.LayerNorm(6)), torch.randn(4, 6)) == set()


def test_strict_and_switches_do_not_depend_on_findings() -> None:
    def squares(x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        return (x - mean) * torch.rsqrt((x * x).mean(-1, keepdim=True) - mean * mean + 1e-5)

    x = torch.randn(4, 6)
    for strict, status in ((False, "rewritten"), (True, "left")):
        report = explain(optimize(squares, backend="eager", strict=strict), x)
        assert [site.status for site in report.sites] == [status]
        assert [finding.code for finding in report.findings] == ["BNR009"]
    report = explain(optimize(squares, backend="eager", disable="diagnose"), x)
    assert [site.status for site in report.sites] == ["rewritten"]
    assert report.findings == []


def test_an_exported_program_has_the_findings_of_its_formulas() -> None:
    class Lengths(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / (x * x).sum(-1, keepdim=True).sqrt()

    program = torch.export.export(Lengths(), (torch.randn(4, 6),))
    assert [finding.code for finding in explain(program).findings] == ["BNR008"]


def test_a_norm_in_a_checkpointed_block_has_its_findings() -> None:
    def squares(x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        return (x - mean) * torch.rsqrt((x * x).mean(-1, keepdim=True) - mean * mean + 1e-5)

    def block(x: Tensor) -> Tensor:
        y: Tensor = checkpoint(squares, x, use_reentrant=False)
        return y / y.abs().amax(-1, keepdim=True)

    assert codes(block, torch.randn(4, 6, requires_grad=True)) == {"BNR008", "BNR009"}


class Unused(nn.Module):
    """A batch norm that has a buffer and does not use it in training."""

    mean: Tensor
    variance: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("variance", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = (x.mean(0), x.var(0)) if self.training else (self.mean, self.variance)
        return (x - mean) / (variance + 1e-5).sqrt()


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_said_of_values_that_are_not_there(training: bool) -> None:
    model, x = Unused().train(training), torch.randn(3, 4)
    assert explain(model, x).findings != []
    assert explain(model.to("meta"), x.to("meta")).findings == []
