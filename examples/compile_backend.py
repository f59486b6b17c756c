"""bnrewrite as a torch.compile backend: `python -m examples.compile_backend`.

The backend is found by its name, through its entry point; nothing of bnrewrite is imported here.
"""

import torch
from torch import Tensor, nn


class LayerNorm(nn.Module):
    """A LayerNorm as many models write it."""

    def __init__(self, features: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        var = (x - mean).pow(2).mean(-1, keepdim=True)
        return self.weight * (x - mean) / torch.sqrt(var + self.eps) + self.bias


def main() -> None:
    """Compile a small network, and compare it with itself uncompiled."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), LayerNorm(64), nn.GELU(), nn.Linear(64, 8))
    # without options the rewritten graph goes on to Inductor, which needs a C++ compiler on a CPU
    compiled = torch.compile(model, backend="bnrewrite", options={"backend": "eager"})
    x = torch.randn(32, 64)
    print(f"largest difference: {(compiled(x) - model(x)).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
