"""The thread's `normalize`s, optimised and verified: `python -m examples.normalize`."""

import torch
from torch import Tensor

import bnrewrite


def clamped(x: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12) -> Tensor:
    """The library's own spelling."""
    length: Tensor = x.norm(p, dim, keepdim=True)
    return x / length.clamp_min(eps).expand_as(x)


def numpy_like(x: Tensor) -> Tensor:
    """Division by the root of the sum of squares, with numpy's argument names."""
    return torch.div(x, torch.sqrt(torch.sum(x * x, axis=-1, keepdims=True)))  # type: ignore[call-overload]


def neat(x: Tensor, p: float = 2.0, dim: int = -1) -> Tensor:
    """The thread's last word; a row of zeros gives NaN, and still does when it is optimised."""
    length: Tensor = x.norm(p, dim, keepdim=True)
    return x / length


def main() -> None:
    """Optimise the three functions and check each against float64."""
    torch.manual_seed(0)
    x = torch.randn(128, 64)
    for function in (clamped, numpy_like, neat):
        optimised = bnrewrite.optimize(function, backend="eager")
        (site,) = bnrewrite.explain(function, x).sites
        verification = bnrewrite.verify(function, optimised, x)
        zeros = optimised(torch.zeros(1, 64))
        print(
            f"{function.__name__:10}  {site.kind} -> {site.lowering}: {site.formula}"
            f"  verified: {verification.ok}, zero row: {zeros[0, 0].item()}"
        )


if __name__ == "__main__":
    main()
