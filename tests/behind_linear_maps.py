"""Linear maps with a hand-written norm with stored statistics behind them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from contract import JITTERS, error, violation
from hand_written import Layer
from torch import Tensor, nn

from bnrewrite import explain, optimize
from bnrewrite.capture import capture
from bnrewrite.options import Options
from bnrewrite.oracle import Jitter, Widen, widened_module
from bnrewrite.passes import rewrite
from bnrewrite.report.site import Site

EPS = 1e-3
Formula = Callable[["Normed", Tensor], Tensor]


@dataclass(frozen=True)
class Kind:
    """A linear map.

    Attributes:
        call: of (x, weight, bias).
        x: the shape of its input.
        weight: the shape of its weight.
        outputs: how many.
        last: the outputs are the last dimension, else the second, or the first without a batch.
    """

    call: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    x: tuple[int, ...]
    weight: tuple[int, ...]
    outputs: int = 6
    last: bool = False


def reflected(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), weight, bias)


def normed_weight(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, F.normalize(weight.flatten(1), dim=1).view_as(weight), bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x @ weight
    return y if bias is None else y + bias


def added_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)


KINDS: dict[str, Kind] = {
    "conv1d": Kind(F.conv1d, (2, 4, 9), (6, 4, 3)),
    "conv2d": Kind(F.conv2d, (2, 4, 7, 6), (6, 4, 3, 3)),
    "conv2d of one image": Kind(F.conv2d, (4, 7, 6), (6, 4, 3, 3)),
    "conv2d of one output": Kind(F.conv2d, (2, 4, 7, 6), (1, 4, 3, 3), 1),
    "conv2d in groups": Kind(
        lambda x, w, b: F.conv2d(x, w, b, 2, 1, 1, 2), (2, 4, 7, 6), (6, 2, 3, 3)
    ),
    "depthwise": Kind(lambda x, w, b: F.conv2d(x, w, b, 1, 1, 1, 6), (2, 6, 7, 6), (6, 1, 3, 3)),
    "conv2d, same": Kind(
        lambda x, w, b: F.conv2d(x, w, b, 1, "same", 2), (2, 4, 7, 6), (6, 4, 3, 2)
    ),
    "conv2d, reflected": Kind(reflected, (2, 4, 7, 6), (6, 4, 3, 3)),
    "conv2d of a normalised weight": Kind(normed_weight, (2, 4, 7, 6), (6, 4, 3, 3)),
    "conv3d": Kind(F.conv3d, (2, 4, 5, 4, 3), (6, 4, 2, 2, 2)),
    "conv_transpose1d": Kind(lambda x, w, b: F.conv_transpose1d(x, w, b, 2), (2, 4, 9), (4, 6, 3)),
    "conv_transpose2d": Kind(F.conv_transpose2d, (2, 4, 5, 6), (4, 6, 3, 3)),
    "conv_transpose2d in groups": Kind(
        lambda x, w, b: F.conv_transpose2d(x, w, b, 2, 1, 1, 2), (2, 4, 5, 6), (4, 3, 3, 3)
    ),
    "conv_transpose3d": Kind(
        lambda x, w, b: F.conv_transpose3d(x, w, b, 1, 0, 0, 2), (2, 4, 3, 4, 3), (4, 3, 2, 2, 2)
    ),
    "linear": Kind(F.linear, (5, 8), (6, 8), last=True),
    "linear of a sequence": Kind(F.linear, (2, 5, 8), (6, 8), last=True),
    "product": Kind(product, (2, 5, 8), (8, 6), last=True),
    "product and sum": Kind(added_product, (5, 8), (8, 6), last=True),
}


class Normed(Layer):
    """A linear map, then a norm by a formula."""

    def __init__(self, kind: str, norm: Formula, bias: bool = True, seed: int = 0) -> None:
        super().__init__()
        self.kind, self.norm = kind, norm
        found = KINDS[kind]
        source = torch.Generator().manual_seed(seed)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=source)

        self.filters = nn.Parameter(drawn(*found.weight) / 3)
        self.offset = nn.Parameter(drawn(found.outputs)) if bias else None
        self.weight = nn.Parameter(drawn(found.outputs).abs() + 0.5)
        self.bias = nn.Parameter(drawn(found.outputs))
        self.mean: Tensor
        self.variance: Tensor
        self.other_mean: Tensor
        self.other_variance: Tensor
        self.register_buffer("other_mean", drawn(5))
        self.register_buffer("other_variance", drawn(5).abs() + 0.5)
        self.all_mean: Tensor
        self.all_variance: Tensor
        self.register_buffer("all_mean", drawn())
        self.register_buffer("all_variance", drawn().abs() + 0.5)
        self.register_buffer("mean", drawn(found.outputs))
        self.register_buffer("variance", drawn(found.outputs).abs() + 0.5)

    def along(self, vector: Tensor) -> Tensor:
        """A vector in a shape that broadcasts to the linear map's result."""
        found = KINDS[self.kind]
        return vector if found.last else vector.view(-1, *[1] * (len(found.weight) - 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self, KINDS[self.kind].call(x, self.filters, self.offset))

    def inputs(self, seed: int = 1) -> Tensor:
        """A random input."""
        return torch.randn(KINDS[self.kind].x, generator=torch.Generator().manual_seed(seed))


def centred(m: Normed, y: Tensor) -> Tensor:
    normal = (y - m.along(m.mean)) / torch.sqrt(m.along(m.variance) + 1e-3)
    return normal * m.along(m.weight) + m.along(m.bias)


def scaled_and_shifted(m: Normed, y: Tensor) -> Tensor:
    scale = m.weight * (m.variance + EPS).rsqrt()
    return y * m.along(scale) + m.along(m.bias - m.mean * scale)


def by_addcmul(m: Normed, y: Tensor) -> Tensor:
    scale = m.weight / (m.variance + EPS) ** 0.5
    return torch.addcmul(m.along(m.bias - m.mean * scale), y, m.along(scale))


def by_deviation(m: Normed, y: Tensor) -> Tensor:
    return m.along(m.weight) * (y - m.along(m.mean)) / (m.along(m.variance.sqrt()) + EPS)


def by_root_mean_square(m: Normed, y: Tensor) -> Tensor:
    return y * torch.rsqrt(m.along(m.variance) + EPS) * m.along(m.weight)


def by_exponential(m: Normed, y: Tensor) -> Tensor:
    return (y + m.along(m.bias)) * torch.exp(-m.along(m.weight))


def one_for_all(m: Normed, y: Tensor) -> Tensor:
    return (y - m.all_mean) / torch.sqrt(m.all_variance + EPS) + m.along(m.bias)


def negated(m: Normed, y: Tensor) -> Tensor:
    return (m.along(m.mean) - y) / torch.sqrt(m.along(m.variance) + EPS)


def twice(m: Normed, y: Tensor) -> Tensor:
    return (centred(m, y) - m.all_mean) / torch.sqrt(m.all_variance + EPS)


NORMS: dict[str, Formula] = {
    each.__name__: each
    for each in (
        centred,
        scaled_and_shifted,
        by_addcmul,
        by_deviation,
        by_root_mean_square,
        by_exponential,
        one_for_all,
        negated,
        twice,
    )
}


def folded_as_constants(
    model: nn.Module, *inputs: Tensor, strict: bool = False
) -> tuple[tuple[Site, ...], Tensor, str]:
    """Folds as an export does: the records, the result and the text of the graph."""
    with torch.no_grad():
        (canonical,) = capture(model, *inputs)
        stored = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        named = {each.name: stored[each.path] for each in canonical.inputs if each.path}
        sites = rewrite(canonical, Options(strict=strict, stage="export"), named)
        given = iter(inputs)
        values = [named.get(each.name) for each in canonical.inputs]
        values = [next(given) if value is None else value for value in values]
        (result,) = canonical.module(*values)
    return sites, result, str(canonical.module.graph)


def notes(model: nn.Module, *inputs: Tensor, **switches: Any) -> list[str]:
    """What the report of an eager call without gradients says of a model's only norm."""
    with torch.no_grad():
        (site,) = explain(optimize(model, **switches), *inputs).sites
    assert site.status == "rewritten", site
    return list(site.notes)


@torch.no_grad()
def broken_promise(model: nn.Module, found: Tensor, x: Tensor) -> str | None:
    """How a result breaks the contract, by the yardstick of the user's own error."""
    user = model(x)
    wide = widened_module(model)
    with Widen(drawn=torch.float32):
        exact = wide(x.double())
    runs = [user]
    for seed in range(JITTERS):
        with Jitter(seed):
            runs.append(model(x))
    slip = max(error(run, exact) for run in runs)
    return violation("output", found, user, exact, slip)
