"""Export a model with hand-written norms to ONNX, and run it: `python -m examples.export_onnx`."""

from pathlib import Path

import torch
from torch import Tensor, nn

import bnrewrite

PLACE = Path(__file__).parent / "output"


class ChannelNorm(nn.Module):
    """A BatchNorm written by hand, as it is at inference."""

    mean: Tensor
    variance: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(channels) + 0.5)
        self.bias = nn.Parameter(torch.randn(channels))
        self.register_buffer("mean", 0.1 * torch.randn(channels))
        self.register_buffer("variance", torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x - self.mean[:, None, None]
        x = x / torch.sqrt(self.variance[:, None, None] + 1e-5)
        return x * self.weight[:, None, None] + self.bias[:, None, None]


def main() -> None:
    """Export for any number of images of any size, check, print what was done, and run."""
    torch.manual_seed(0)
    PLACE.mkdir(exist_ok=True)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), ChannelNorm(16), nn.ReLU(), nn.Conv2d(16, 4, 1))
    images = torch.randn(2, 3, 32, 32)
    sizes = ({0: "batch", 2: "height", 3: "width"},)
    result = bnrewrite.export_onnx(
        model.eval(), (images,), PLACE / "model.onnx", dynamic_shapes=sizes
    )
    print(result)

    session = bnrewrite.Session(result.path)  # on a GPU where there is one
    outputs = session(torch.randn(5, 3, 64, 48, device=session.device))
    assert isinstance(outputs, Tensor)
    print("outputs of five images:", tuple(outputs.shape), "by", session.providers[0])


if __name__ == "__main__":
    main()
