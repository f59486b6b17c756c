"""What is in a model, without changing it: `python -m examples.explain_model`."""

import torch
from torch import Tensor, nn

import bnrewrite


class RMSNorm(nn.Module):
    """The norm of many language models: statistics in float32, the scale behind the cast."""

    def __init__(self, features: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class CentredByNeighbour(nn.Module):
    """Looks like a norm, and is none: the variance is the other half's."""

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=-1)
        spread = right.var(-1, keepdim=True)
        return torch.cat(
            [(left - left.mean(-1, keepdim=True)) / torch.sqrt(spread + 1e-5), right], -1
        )


def main() -> None:
    """Explain a model that holds one norm and one near miss; print and write the report."""
    model = nn.Sequential(nn.Linear(32, 64), RMSNorm(64), nn.SiLU(), CentredByNeighbour())
    report = bnrewrite.explain(model, torch.randn(16, 32))
    print(report)
    for site in report.sites:
        print(site.kind, "=", site.formula)


if __name__ == "__main__":
    main()
