"""Programs of every kind, and how far a kernel's numbers may be from the formula's in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from contract import JITTERS, error, violation
from torch import Tensor

from bnrewrite.kernels.generated import call, kernel, runtime
from bnrewrite.kernels.generated.program import parse
from bnrewrite.kernels.generated.reference import reference
from bnrewrite.oracle import Jitter

AFFINE = "scale = t0*(V + 1.0e-5)**(-1/2); shift = t1"

PROGRAMS = {
    "batch": f"x[n c h w] over n h w; t0[c]; t1[c]; centre = M; {AFFINE}",
    "batch relu": f"x[n c h w] over n h w; t0[c]; t1[c]; centre = M; {AFFINE}; relu",
    "instance": f"x[n c h w] over h w; t0[c]; t1[c]; centre = M; {AFFINE}",
    "group": f"x[n (g=4 c) h w] over c h w; t0[g c]; t1[g c]; centre = M; {AFFINE}",
    "layer": f"x[a b d] over d; t0[d]; t1[d]; centre = M; {AFFINE}",
    "layer of channels": f"x[n c h w] over c; t0[c]; t1[c]; centre = M; {AFFINE}",
    "layer of two axes": f"x[n c h w] over c w; t0[w c]; t1[c]; centre = M; {AFFINE}",
    "kept apart": f"x[n c h w] over c w; t0[n h]; t1[h]; centre = M; {AFFINE}",
    "mean square": "x[a b d] over d about zero; t0[d]; scale = (1 + t0)*(V + 1.0e-6)**(-1/2)",
    "length": "x[n c h w] over c about zero; scale = 1/Larger(Root(N*V), 1.0e-12)",
    "deviation": (
        "x[a b d] over d; t0[d]; t1[d]; centre = M; "
        "scale = t0/(Root(V*N/(N-1)) + 1.0e-3); shift = t1*Root(V)"
    ),
    "corrected": (
        "x[n c h w] over n h w; t0[c]; t1[c]; centre = M; shift = t1; "
        "scale = t0*(V*N/Max(1, N - 1) + 1.0e-5)**(-1/2); u0 = V*N/Max(1, Nn - 1)"
    ),
    "detached": "x[a b d] over d; t0[d]; centre = M; scale = t0*(Vs + 1.0e-5)**(-1/2)",
    "running": (
        "x[n c h w] over n h w; t0[c]; t1[c]; t2[c] fixed; t3[c] fixed; "
        "centre = 0.1*M + 0.9*t2; scale = t0*(0.9*t3 + 0.1*V*N/(N-1) + 1.0e-5)**(-1/2); "
        "shift = t1; u0 = 0.1*M + 0.9*t2; u1 = 0.9*t3 + 0.1*V*N/(N-1)"
    ),
    "group silu": (
        f"x[n (g=4 c) h w] over c h w; t0[g c]; t1[g c]; centre = M; {AFFINE}; silu"
    ),
    "residual": (
        f"x[n c h w] over n h w; t0[c]; t1[c]; centre = M; {AFFINE}; relu; residual"
    ),
}  # fmt: skip

ACROSS = {  # means over groups
    "response": (
        "x[n c h w] over h w about zero; t0[c]; t1[c]; m0[n] = Root(N*V); "
        "scale = t0*Root(N*V)/(m0 + 1.0e-6) + 1; shift = t1; relu"
    ),
    "mixture": (
        "x[n c h w] over h w; t0[c]; t1[c]; t2[] ; m0[n] = M; m1[n] = V + (M - m0)**2; "
        "m2[c] = M; m3[c] = V + (M - m2)**2; centre = (M + m0 + t2*m2)/(2 + t2); "
        "scale = t0*((V + t2*m1 + m3)/(2 + t2) + 1.0e-5)**(-1/2); shift = t1; u0 = M - m0"
    ),
}  # fmt: skip

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "last axis outside": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "second axis inside": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "with holes": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x[:1].expand(x.shape),
}


@dataclass(frozen=True)
class Problem:
    """What a program is run with; every tensor is exact in all dtypes under test."""

    text: str
    x: Tensor
    tensors: tuple[Tensor, ...]
    cotangent: Tensor

    def run(
        self, function: Callable[..., tuple[Tensor, ...]], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """y, the updates, and the gradients."""
        fixed = parse(self.text).fixed
        x = _leaf(self.x, dtype, True)
        tensors = [_leaf(t, dtype, i not in fixed) for i, t in enumerate(self.tensors)]
        y, *updates = function(self.text, x, *tensors)
        wanted = {"x": x} | {f"t{i}": t for i, t in enumerate(tensors) if t.requires_grad}
        made = torch.autograd.grad(y, list(wanted.values()), self.cotangent.to(dtype))
        assert y.stride() == torch.empty_like(x).stride()
        found = {"y": y.detach()} | {f"u{i}": u for i, u in enumerate(updates)}
        return found | dict(zip((f"gradient of {n}" for n in wanted), made, strict=True))


def _leaf(tensor: Tensor, dtype: torch.dtype, wanted: bool) -> Tensor:
    """In another dtype, with the strides that it has."""
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype)
    if 0 in tensor.stride():
        return tensor.to(dtype).expand(tensor.shape).detach().requires_grad_(wanted)
    return made.copy_(tensor).detach().requires_grad_(wanted)


def draw(
    text: str, shape: Sequence[int], layout: str = "contiguous", *, mean: float = 0.5
) -> Problem:
    """A problem of small whole sixteenths."""
    source = torch.Generator().manual_seed(7)

    def numbers(*size: int) -> Tensor:
        return torch.randint(-32, 33, size, generator=source).double() / 16

    program = parse(text)
    sizes = program.axis_sizes(shape)
    x = numbers(*shape) + mean
    tensors = [numbers(*[sizes[a] for a in own]).abs() + 0.5 for own in program.tensors]
    if program.residual:
        tensors.append(numbers(*shape))
    return Problem(text, LAYOUTS[layout](x), tuple(tensors), numbers(*shape))


def on_threads(count: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """For a fixture: kernels are made anew, and run on so many threads however small x is."""
    monkeypatch.setattr(kernel, "SMALL", 1)
    monkeypatch.setattr(call, "_kernels", {})
    monkeypatch.setattr(runtime, "_programs", {})
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield count
    torch.set_num_threads(before)


def by_reference(text: str, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """A program by torch's operations, as the kernels are called."""
    y, updates = reference(text, x, tensors)
    return (y, *updates)


def compare(
    problem: Problem, function: Callable[..., tuple[Tensor, ...]], dtype: torch.dtype
) -> list[str]:
    """What is further from float64 than three times the reference's own error and one rounding.

    Its own error is the largest of runs whose roundings fall another way.
    """
    exact = problem.run(by_reference, torch.float64)
    runs = [problem.run(by_reference, dtype)]
    for seed in range(JITTERS):
        with Jitter(seed):
            runs.append(problem.run(by_reference, dtype))
    found = problem.run(function, dtype)
    assert found.keys() == exact.keys()
    sentences = []
    for name, value in exact.items():
        slip = max(error(run[name], value) for run in runs)
        sentences.append(violation(name, found[name], runs[0][name], value, slip))
    return [sentence for sentence in sentences if sentence]
