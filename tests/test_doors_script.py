"""Scripted modules in evaluation: a scripted module comes back, and nothing is lost."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from door_models import (
    NORMS,
    BatchNorm,
    ForumNet,
    LayerNorm,
    Net,
    elsewhere,
    images,
    reloaded,
    save,
    script,
    trace,
    violations,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import bnrewrite
from bnrewrite import BnrewriteWarning

pytestmark = [
    pytest.mark.usefixtures("repeatable"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def net(name: str) -> Net:
    return Net(NORMS[name]()).eval()


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("kernels", ["auto", "native"])
def test_each_norm_is_an_operator_in_the_graph(name: str, kernels: str) -> None:
    users = net(name)
    scripted = script(users)
    result = bnrewrite.optimize(scripted, example_inputs=(images(),), kernels=kernels)
    assert isinstance(result, torch.jit.ScriptModule)
    # on a CPU rms_norm is no operation of its own, and takes longer than its parts
    assert (f"aten::{name}" in str(result.graph)) == ((name, kernels) != ("rms_norm", "auto"))
    assert f"aten::{name}" not in str(scripted.inlined_graph)
    assert list(result.state_dict()) == list(users.state_dict())
    for batch, size in ((3, 8), (5, 8), (1, 8), (2, 8)):
        assert violations(users, result, images(batch, size)) == []


class Names(TorchDispatchMode):
    """Notes the operators that are run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("example", [1, 3])
def test_the_branch_is_taken_for_every_batch(example: int) -> None:
    for name, operator in (("batch_norm", "batch_norm"), ("group_norm", "native_group_norm")):
        users = net(name)
        result = bnrewrite.optimize(script(users), example_inputs=(images(example),))
        for x, is_like in (
            (images(1), True),
            (images(3), True),
            (images(20, 12), True),
            (images()[0], False),
            (images().to(memory_format=torch.channels_last), True),
        ):
            with Names() as names, torch.no_grad():
                result(x)
            assert any(operator in each for each in names.seen) == is_like


def test_other_sizes_dtypes_and_modes_run_the_users_code() -> None:
    users = net("batch_norm")
    result = bnrewrite.optimize(script(users), example_inputs=(images(),))
    assert violations(users, result, images(3, 11)) == []
    assert violations(users, result, images()[0]) == []
    assert violations(users.double(), result.double(), images().double()) == []
    users.float().train()
    result.float().train()
    for _ in range(2):
        x = images()
        expected, found = users(x)[0], result(x)[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for mine, other in zip(users.buffers(), result.buffers(), strict=True):
        torch.testing.assert_close(other, mine, rtol=0, atol=0)


def test_a_number_that_is_changed_later_counts() -> None:
    users = net("batch_norm")
    result: Any = bnrewrite.optimize(script(users), example_inputs=(images(),))
    norm: Any = users.norm
    norm.eps = result.norm.eps = 0.7
    assert violations(users, result, images()) == []


def test_statistics_that_are_loaded_later_lose_no_digits() -> None:
    users = net("batch_norm")
    result = bnrewrite.optimize(script(users), example_inputs=(images(),))
    state = users.state_dict()
    state["norm.running_mean"] = torch.full((1, 4, 1, 1), 4e4)
    users.load_state_dict(state)
    result.load_state_dict(state)
    assert violations(users, result, images()) == []


def test_large_means_are_subtracted_first() -> None:
    users = Net(BatchNorm(4, mean=4e4)).eval()
    result = bnrewrite.optimize(script(users), example_inputs=(images(),))
    assert result.graph.findNode("prim::If") is not None
    assert "aten::batch_norm" not in str(result.graph)
    assert violations(users, result, images()) == []


def test_the_tensors_are_shared_and_the_given_module_is_unchanged() -> None:
    scripted = script(net("layer_norm"))
    before = str(scripted.graph)
    result = bnrewrite.optimize(scripted, example_inputs=(images(),))
    assert str(scripted.graph) == before
    for mine, other in zip(scripted.parameters(), result.parameters(), strict=True):
        assert mine.data_ptr() == other.data_ptr()


@pytest.mark.parametrize("from_file", [False, True])
def test_traced_modules(from_file: bool) -> None:
    class Traced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), BatchNorm(4)
            self.row = LayerNorm(36)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(x))
            rows: Tensor = self.row(y.reshape(y.size(0) * 2, -1, 36).flatten(2))
            return rows

    users = Traced().eval()
    traced = trace(users, images())
    result = bnrewrite.optimize(reloaded(traced) if from_file else traced, example_inputs=images(1))
    assert "aten::batch_norm" in str(result.graph)
    assert "aten::layer_norm" in str(result.graph)
    for batch in (1, 3, 4):
        assert violations(users, result, images(batch)) == []


def test_the_forums_net() -> None:
    users = ForumNet().eval()
    scripted = script(users)
    result = bnrewrite.optimize(scripted, example_inputs=(images(), 1))
    assert "aten::batch_norm" in str(result.graph)
    assert violations(users, result, images(5), 1) == []
    report = bnrewrite.explain(scripted, images(), 1)
    assert [site.status for site in report.sites] == ["rewritten"]
    assert report.sites[0].module == "bn1"
    assert report.sites[0].source.startswith("door_models.py:")


class Tracking(nn.Module):
    """Updates a buffer in place in evaluation."""

    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = LayerNorm(8)
        self.register_buffer("total", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        self.total.add_(x.detach().sum((0, 1, 2)))
        y: Tensor = self.norm(x)
        return y + self.total


def test_buffers_that_evaluation_updates() -> None:
    users = Tracking().eval()
    result = bnrewrite.optimize(script(users), example_inputs=(images(),))
    assert "aten::layer_norm" in str(result.graph)
    assert violations(users, result, images(5)) == []


def test_a_process_without_the_package_runs_it(tmp_path: Path) -> None:
    users = net("batch_norm")
    path = save(script(users), tmp_path / "users.pt")
    result = bnrewrite.optimize(str(path), example_inputs=(images(),))
    x = images(5)
    torch.save((x, users(x)[0].detach()), tmp_path / "case.pt")
    printed = elsewhere(
        """
        model = torch.jit.load(sys.argv[1])
        x, expected = torch.load(sys.argv[2])
        print((model(x)[0] - expected).abs().max().item() < 1e-5, list(model.state_dict()))
        print("aten::batch_norm" in str(model.graph))
        """,
        save(result, tmp_path / "result.pt"),
        tmp_path / "case.pt",
    )
    assert printed == f"True {list(users.state_dict())}\nTrue\n"


def test_gradients_flow_through_the_branch() -> None:
    users = net("layer_norm")
    result = bnrewrite.optimize(script(copy.deepcopy(users)), example_inputs=(images(),))
    x = images()
    gradients = []
    for each in (users, result):
        y = each(x)[0]
        torch.manual_seed(1)
        gradients.append(
            torch.autograd.grad(
                (y * torch.randn(y.shape)).sum(), list(each.parameters()), allow_unused=True
            )
        )
    for mine, other in zip(*gradients, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            torch.testing.assert_close(other, mine, rtol=1e-4, atol=1e-5)


class OfData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x)
        return y if bool(x.sum() > 0) else x


class OfList(nn.Module):
    def forward(self, x: list[Tensor]) -> Tensor:
        y: Tensor = x[0] / x[0].abs().amax()
        return y


class Asking(OfData):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x)
        return y if x.requires_grad else x


class Keeping(OfData):
    rows: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.rows = [torch.ones(6)]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x)
        return y * self.rows[0]


class Updating(OfData):
    def forward(self, x: Tensor) -> Tensor:
        x.add_(1)
        y: Tensor = self.norm(x)
        return y


class Root(OfData):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x)
        return y if float(x.size(0)) ** 0.5 > 1.2 else x


class Reading(OfData):
    def forward(self, x: Tensor, path: str = "x") -> Tensor:
        y: Tensor = self.norm(x)
        return y if x.size(0) > 1 else torch.from_file(path, False, 6)


class Sorting(OfData):
    def forward(self, x: Tensor) -> Tensor:
        sizes = [x.size(1), x.size(0)]
        sizes.sort()
        y: Tensor = self.norm(x)
        return y * sizes[0]


@pytest.mark.parametrize(
    ("users", "inputs", "sentence"),
    [
        (OfData(), torch.randn(2, 6), "Could not guard on data-dependent expression"),
        (OfList(), ([torch.randn(2, 6)],), "its input 0 is a list, neither tensor nor number"),
        (ForumNet(), images(), "it binds running_mean to a new tensor"),
        (Keeping(), torch.randn(2, 6), r"its attribute rows, a List\[Tensor\], may change"),
        (Updating(), torch.randn(2, 6), "it updates an input in place"),
        (Root(), torch.randn(2, 6), "it asks for .* of its sizes"),
        (Reading(), torch.randn(2, 6), "it calls aten::from_file, which reads or writes files"),
        (Sorting(), torch.randn(2, 6), "it calls aten::sort, which changes a list or a dictionary"),
        (Asking(), torch.randn(2, 6), "it asks whether gradients are recorded"),
    ],
)
def test_what_is_not_convertible_is_told(users: nn.Module, inputs: Any, sentence: str) -> None:
    scripted = script(users.eval())
    with pytest.warns(BnrewriteWarning, match=sentence):
        result = bnrewrite.optimize(scripted, example_inputs=inputs)
    assert result is scripted
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    report = bnrewrite.explain(scripted, *args)
    assert not report.rewritten
    assert any(each.what == "scripted module" for each in report.kept)


@pytest.mark.parametrize(
    ("inputs", "kind", "sentence"),
    [
        (None, TypeError, "needs example_inputs"),
        ((), ValueError, "the example has no value for the module's input 'x'"),
        ((images(), images()), ValueError, "the example has 2 inputs, the module takes 1"),
        (torch.randn(3, 2, 8, 8), ValueError, r"float32 3x2x8x8\): RuntimeError: Given groups=1"),
        (images().double(), ValueError, r"does not run on the example inputs \(float64 3x3x8x8\)"),
    ],
)
def test_wrong_example_inputs(inputs: Any, kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind, match=sentence):
        bnrewrite.optimize(script(net("layer_norm")), example_inputs=inputs)
