"""Code that stays the user's, and the sentence with which it does."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hand_written import Layer, RowNorm, row_norm
from kept_regions import SIZE, Two, steep
from torch import Tensor, fx

import bnrewrite
from bnrewrite.capture.canonical import canonicalise
from bnrewrite.capture.refusal import CaptureError


def reasons(model: Any, *inputs: Tensor) -> set[str | None]:
    return {site.reason for site in bnrewrite.explain(model, *inputs).refusals}


def rows() -> Tensor:
    return torch.randn(4, SIZE, requires_grad=True)


def cancelling(x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt((x * x).mean(-1, keepdim=True) - mean**2 + 1e-5)


def apart(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.mean(-1, keepdim=True)
    deviation = torch.sqrt((x * x).mean(-1, keepdim=True) - mean**2 + 0.1)
    return x / deviation, mean / deviation


def over_both_axes(x: Tensor) -> Tensor:
    variance = x.var(0, keepdim=True) + x.var(1, keepdim=True)
    return (x - x.mean(0, keepdim=True)) / torch.sqrt(variance + 1e-5)


def eps_after_the_root(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5)


@pytest.mark.parametrize(
    ("formula", "switches", "reason"),
    [
        (
            row_norm,
            {"disable": "layer_norm"},
            "layer_norm is switched off by disable=['layer_norm']",
        ),
        (row_norm, {"disable": "plan"}, "the passes that would rewrite it are switched off"),
        (
            eps_after_the_root,
            {"kernels": "native"},
            'kernels="native" leaves a general that PyTorch has no operator for',
        ),
        (
            cancelling,
            {"strict": True},
            "strict=True leaves a site whose replacement is more accurate than the source: "
            "E[x^2] - E[x]^2 cancels there",
        ),
        (over_both_axes, {}, "its coefficients are as large as the tensor"),
        (
            apart,
            {},
            "it is not centred, and a statistic that would become more accurate is used beside",
        ),
    ],
)
def test_a_switch_or_a_shape_leaves_a_site(
    formula: Callable[[Tensor], Tensor], switches: dict[str, Any], reason: str
) -> None:
    assert reasons(bnrewrite.optimize(formula, **switches), rows()) == {reason}


def test_an_empty_tensor_is_left() -> None:
    assert reasons(row_norm, torch.randn(0, SIZE)) == {"the tensor is empty"}


def maximum(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.abs().amax(-1, keepdim=True) + 1e-5)


def length(x: Tensor) -> Tensor:
    third: Tensor = torch.linalg.vector_norm(x, 3, dim=-1, keepdim=True)
    return x / (third + 1e-5)


@pytest.mark.parametrize(
    ("formula", "reason"),
    [
        (eps_after_the_root, "a standard deviation whose gradient is zero at zero"),
        (length, "a norm whose gradient is zero at zero"),
        (maximum, "a maximum"),
    ],
)
def test_a_statistic_that_only_the_users_code_can_make(
    formula: Callable[[Tensor], Tensor], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bnrewrite.passes.emitter.Emitter.reused", lambda *_, **__: None)
    assert reasons(formula, rows()) == {reason}


class Keeping(Two):
    """Two norms and a buffer."""

    def __init__(self, body: Callable[[Keeping, Tensor], Any]) -> None:
        super().__init__(body)  # type: ignore[arg-type]
        self.buffer: Tensor
        self.register_buffer("buffer", torch.zeros(SIZE))


def updated_behind_its_reader(model: Keeping, x: Tensor) -> Tensor:
    y = steep(model.first(x) * (model.buffer + 1))
    with torch.no_grad():
        model.buffer.add_(1)
    return model.second(y) + model.buffer


def history_in_a_buffer(model: Keeping, x: Tensor) -> Tensor:
    y = model.first(x)
    model.buffer.lerp_(y.mean(0), 0.1)
    return model.second(steep(y * model.buffer)) + model.buffer


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            updated_behind_its_reader,
            "what it reads is updated in place by code that is kept as it is",
        ),
        (history_in_a_buffer, "a buffer gains autograd history in it and is used outside of it"),
    ],
)
def test_a_norm_beside_an_update_stays(body: Any, reason: str) -> None:
    assert reasons(Keeping(body), rows()) == {reason}


class Inside(Layer):
    """A norm of what `body` makes of the input."""

    def __init__(self, body: Callable[[Inside, Tensor], Any]) -> None:
        super().__init__()
        self.norm, self.body = RowNorm(SIZE), body
        self.queue: Tensor
        self.register_buffer("queue", torch.zeros(2, SIZE))

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def plain(model: Inside, x: Tensor) -> Any:
    return model.norm(x)


def an_input_updated(model: Inside, x: Tensor) -> Any:
    return model.norm(x.add_(1))


def a_view_of_a_buffer(model: Inside, x: Tensor) -> Any:
    model.queue[0] = x.detach().mean(0)
    return model.norm(x), model.queue[0]


TRACED = fx.GraphModule({}, fx.Graph())


def refused(body: Callable[[Inside, Tensor], Any], change: Callable[[Tensor], Any]) -> str:
    """What capture says of the graph, its inputs changed."""
    seen: list[tuple[fx.GraphModule, list[Any]]] = []

    def keep(graph: fx.GraphModule, inputs: list[Any]) -> Any:
        seen.append((graph, inputs))
        return graph.forward

    torch.compile(Inside(body), backend=keep)(rows() * 1)
    ((graph, inputs),) = seen
    with pytest.raises(CaptureError) as error:
        canonicalise(graph, [change(each) for each in inputs], ())
    return str(error.value)


@pytest.mark.parametrize(
    ("body", "change", "reason"),
    [
        (plain, Tensor.double, "gets a new shape or dtype"),
        (an_input_updated, Tensor.clone, "an input that requires a gradient is updated in place"),
        (
            a_view_of_a_buffer,
            Tensor.clone,
            r"is returned as a view of \w+, which is updated in place",
        ),
    ],
)
def test_a_graph_that_is_not_captured(body: Any, change: Any, reason: str) -> None:
    assert re.search(reason, refused(body, change))


@pytest.mark.parametrize(
    ("traced", "buffers", "reason"),
    [
        (print, {}, "tracing gave a builtin_function_or_method instead of a graph"),
        (TRACED, {"a": "b"}, "the graph updates one of its tensor constants in place"),
        (TRACED, {}, "tracing gave 0 inputs for a graph with 3"),
    ],
)
def test_tracing_that_gives_something_else(
    traced: Any, buffers: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    signature = SimpleNamespace(buffers_to_mutate=buffers, parameters=[], buffers=[])
    monkeypatch.setattr(
        "bnrewrite.capture.canonical.aot_export_module", lambda *_, **__: (traced, signature)
    )
    assert refused(plain, Tensor.clone) == reason


def test_casts_of_autocast_that_cannot_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def cast(model: Inside, x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return model.norm(x @ x.t() @ x)

    monkeypatch.setattr("bnrewrite.capture.autocast._result_dtypes", lambda *_: [])
    reason = r"the casts of autocast around aten\.\S+ cannot be told"
    assert re.fullmatch(reason, refused(cast, Tensor.clone))
