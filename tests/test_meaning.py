"""What the algebra says of a tensor is what the tensor is: every node's meaning, evaluated.

Each program is traced, run in float64, and every node's formula is evaluated from its definition
at a few indices. A wrong identity of the algebra shows here, whatever the rewriting makes of it.
"""

from __future__ import annotations

from collections.abc import Callable

import evaluate
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bnrewrite.algebra import read
from bnrewrite.capture import capture
from bnrewrite.options import Options
from bnrewrite.passes.recognise import Recognise
from bnrewrite.passes.rewriting import Rewriting

Step = Callable[[Tensor, Tensor], Tensor]

STEPS: dict[str, Step] = {
    "mean of the last axis": lambda x, w: x - x.mean(-1, keepdim=True),
    "mean of the first axis": lambda x, w: x - x.mean(0),
    "variance of two axes": lambda x, w: x / (x.var((0, 1), keepdim=True) + 0.5).sqrt(),
    "unbiased standard deviation": lambda x, w: x / (x.std(1, keepdim=True) + 0.1),
    "nested means": lambda x, w: x * (x * x).mean(2, keepdim=True).mean(0, keepdim=True),
    "square of a difference": lambda x, w: (x - w) ** 2 + 0.25,
    "weight along the last axis": lambda x, w: x * w + w,
    "weight along the first axis": lambda x, w: x * w.view(-1, 1, 1),
    "itself transposed": lambda x, w: x + x.transpose(0, 1),
    "itself unsqueezed": lambda x, w: (x.unsqueeze(0) - x.unsqueeze(1)).mean(1),
    "groups": lambda x, w: (
        x.view(2, 2, 4, 4) - x.view(2, 2, 4, 4).mean((1, 2), keepdim=True)
    ).view(4, 4, 4),
    "merged axes": lambda x, w: x - x.reshape(16, 4).mean(0),
    "split the other way": lambda x, w: (
        x.permute(2, 0, 1).reshape(4, 16) * 1.5
    ).reshape(4, 4, 4).permute(1, 2, 0),
    "l2 norm": lambda x, w: x / x.norm(dim=2, keepdim=True).clamp_min(0.1),
    "l1 norm": lambda x, w: x / x.abs().sum(1, keepdim=True),
    "largest magnitude": lambda x, w: x / x.abs().amax(0, keepdim=True),
    "einsum": lambda x, w: x * torch.einsum("ijk,ijk->ij", x, x).unsqueeze(-1),
    "einsum with a weight": lambda x, w: x + torch.einsum("ijk,k->ij", x, w)[..., None],
    "expanded and flattened": lambda x, w: x
    + x.mean(1, keepdim=True).expand(4, 4, 4).reshape(16, 4).view(4, 4, 4),
    "lerp": lambda x, w: torch.lerp(x, x.mean(0, keepdim=True), 0.3),
    "addcmul": lambda x, w: torch.addcmul(x, x, w, value=0.5),
    "powers": lambda x, w: x * (x.pow(2).mean(-1, keepdim=True) + 1e-3) ** -0.5,
    "negative variance": lambda x, w: x - (x.mean(0) ** 2 - (x * x).mean(0)),
    "exp of a log": lambda x, w: x * torch.exp(-0.5 * torch.log(x.var(0) + 0.5)),
    "stacked": lambda x, w: x.repeat(1, 1, 1) * w.repeat(4, 1),
    "packed and split": lambda x, w: x * torch.split(packed(x), 4)[1]
    - torch.split(packed(x), 4)[0],
    "packed, computed with, and sliced": lambda x, w: x + (packed(x) * packed(x) / 3 + 1)[4:],
    "packed beside its own channels": lambda x, w: x
    - (x.mean((0, 1))[:, None] * packed(x))[:, 4:],
    "packed twice over": lambda x, w: x * torch.cat([packed(x), packed(x) + 1])[4:8],
    "packed in rows and turned": lambda x, w: x
    - torch.stack([x.mean((0, 1)), x.square().mean((0, 1))]).t().unsqueeze(0)[..., 1],
    "packed, a part of a part": lambda x, w: x - packed(x)[2:6],
    "interleaved": lambda x, w: x - x.view(4, 4, 2, 2).mean(-1).repeat_interleave(2, -1),
    "tiled": lambda x, w: x - x.view(4, 4, 2, 2).mean(-1).tile(2),
    "interleaved rows": lambda x, w: x
    * x.view(2, 2, 4, 4).mean(1).repeat_interleave(2, 0),
    "slices": lambda x, w: torch.cat([x[..., :2] / (1 + x[..., :2] ** 2), x[..., 2:]], -1),
    "a cube and its moment": lambda x, w: x**3 / (1 + (x**3).square().mean(-1, keepdim=True)),
    "a power that has a root": lambda x, w: (x**2) * (x**2).norm(dim=-1, keepdim=True),
    "smaller of two": lambda x, w: x * x.var(0).clamp(min=0).clamp(min=-1).clamp(max=2),
}  # fmt: skip


def packed(x: Tensor) -> Tensor:
    """E[x] and E[x^2] of the last axis, one after the other."""
    return torch.cat([x.mean((0, 1)), x.square().mean((0, 1))])


class Program(nn.Module):
    """Steps one after the other; every intermediate value is kept."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = names
        self.weight = nn.Parameter(torch.rand(4, dtype=torch.float64) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = STEPS[name](x, self.weight)
        return x


def check(names: tuple[str, ...]) -> int:
    """Every node of a program against its meaning; returns how many nodes had one."""
    torch.manual_seed(len(names))
    model = Program(names)
    x = torch.randn(4, 4, 4, dtype=torch.float64)
    (canonical,) = capture(model, x)
    Recognise().run(Rewriting(canonical, Options()))
    reading = read(canonical.module.graph)
    runner = evaluate.Values(canonical.module)
    given_ = {"parameter": model.weight.detach(), "input": x}
    with torch.no_grad():
        runner.run(*(given_[i.kind] for i in canonical.inputs))
    checked = 0
    for node in canonical.module.graph.nodes:
        meaning = reading.formula(node)
        if meaning is None or node.op != "call_function":
            continue
        wrong = evaluate.disagreement(reading.ring, runner.values, node, meaning)
        assert wrong < 1e-9, f"{names}: {node.format_node()} is off by {wrong:.1e}"
        checked += 1
    return checked


def test_a_slice_taken_twice_is_one_tensor_and_noise_is_not() -> None:
    class Repeats(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            with torch.no_grad():
                quiet = x[..., :2]
            noise = [torch.bernoulli(x), torch.bernoulli(x)]
            return [x[..., :2], torch.split(x, 2, -1)[0], x.narrow(-1, 0, 2), quiet, *noise]

    (canonical,) = capture(Repeats(), torch.rand(3, 4, requires_grad=True))
    Recognise().run(Rewriting(canonical, Options()))
    *_, output = canonical.module.graph.nodes
    reading = read(canonical.module.graph)
    values = [reading.meanings[node].value for node in output.args[0]]
    assert values[0] == values[1] == values[2]
    assert len({value.key for value in values}) == 4


@pytest.mark.parametrize("name", STEPS)
def test_each_step_means_what_it_computes(name: str) -> None:
    assert check((name,)) >= 1


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(sorted(STEPS)), min_size=2, max_size=3).map(tuple))
def test_compositions_mean_what_they_compute(names: tuple[str, ...]) -> None:
    check(names)
