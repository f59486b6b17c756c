"""Models and checks for programs and scripted modules: everything here can be scripted."""

import copy
import io
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from contract import error, violation
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bnrewrite.oracle import Widen, widened_module
from examples import forum_net


class BatchNorm(nn.Module):
    """By hand, with buffers that are rebound or updated in place."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, rebinds: bool = True, mean: float = 0.5) -> None:
        super().__init__()
        self.rebinds = rebinds
        self.eps = 1e-5
        shape = (1, channels, 1, 1)
        self.weight = nn.Parameter(torch.rand(shape) + 0.5)
        self.bias = nn.Parameter(torch.rand(shape))
        self.register_buffer("running_mean", torch.full(shape, mean))
        self.register_buffer("running_var", torch.rand(shape) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            mean = x.mean((0, 2, 3), keepdim=True)
            var = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
            with torch.no_grad():
                if self.rebinds:
                    self.running_mean = 0.9 * self.running_mean + 0.1 * mean
                    self.running_var = 0.9 * self.running_var + 0.1 * var
                else:
                    self.running_mean.mul_(0.9).add_(0.1 * mean)
                    self.running_var.mul_(0.9).add_(0.1 * var)
        else:
            mean, var = self.running_mean, self.running_var
        return self.weight * (x - mean) / torch.sqrt(var + self.eps) + self.bias


class LayerNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)
        self.bias = nn.Parameter(torch.rand(size))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        var = (x - mean).pow(2).mean(-1, keepdim=True)
        return (x - mean) / torch.sqrt(var + 1e-5) * self.weight + self.bias


class RMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class GroupNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(1, channels, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        grouped = x.view(x.size(0), 2, -1)
        mean = grouped.mean(2, keepdim=True)
        var = grouped.var(2, unbiased=False, keepdim=True)
        return ((grouped - mean) / torch.sqrt(var + 1e-5)).view(x.shape) * self.weight


class Net(nn.Module):
    """A convolution, a norm, a ReLU; a list of layers; a dictionary as result."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = norm
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.ReLU()])

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        y = self.norm(self.conv(x))
        z = y.mean((2, 3))
        for layer in self.layers:
            z = layer(z)
        return y, {"pooled": z}


class ForumBatchNorm(forum_net.BatchNorm):
    """The thread's norm; TorchScript knows no constants of a file."""

    def forward(self, x: Tensor, mode: int) -> Tensor:
        if mode == 0:
            mean, var = self.update(x)
        else:
            mean, var = self.running_mean, self.running_var
        return self.normalise(x, mean, var)


class ForumNet(nn.Module):
    """The thread's net, with as many channels as a test needs."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, kernel_size=3, padding=1)
        self.bn1 = ForumBatchNorm(channels)
        self.pool = nn.MaxPool2d(kernel_size=2, stride=2)
        self.classifier = nn.Linear(channels * 16, 10)

    def forward(self, x: Tensor, mode: int = 0) -> Tensor:
        x = self.pool(torch.relu(self.bn1(self.conv1(x), mode)))
        logits: Tensor = self.classifier(x.view(x.size(0), -1))
        return logits


NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch_norm": lambda: BatchNorm(4),
    "group_norm": lambda: GroupNorm(4),
    "layer_norm": lambda: LayerNorm(6),
    "rms_norm": lambda: RMSNorm(6),
}


def images(batch: int = 3, size: int = 8) -> Tensor:
    return torch.randn(batch, 3, size, size)


def script(model: nn.Module) -> Any:
    return _quietly(torch.jit.script, model)


def trace(model: nn.Module, *inputs: Any) -> Any:
    return _quietly(torch.jit.trace, model, inputs)


def reloaded(scripted: Any) -> Any:
    """The module as it comes out of a file."""
    file = io.BytesIO()
    _quietly(torch.jit.save, scripted, file)
    file.seek(0)
    return _quietly(torch.jit.load, file)


def save(scripted: Any, path: Path) -> Path:
    _quietly(torch.jit.save, scripted, path)
    return path


def _quietly(function: Any, *args: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args)


def violations(users: nn.Module, call: Callable[..., Any], *inputs: Any) -> list[str]:
    """Outputs and buffers of one call beside the user's, by the contract's yardstick."""
    mine, exact = copy.deepcopy(users), widened_module(users)
    values = results(mine, mine, *inputs)
    with Widen(drawn=torch.float32):
        right = results(exact, exact, *(_wide(each) for each in inputs))
    found = results(call, call, *inputs)
    return [
        sentence
        for name, value in values.items()
        if (
            sentence := violation(
                name, found.get(name), value, right[name], error(value, right[name])
            )
        )
    ]


def results(owner: Any, call: Callable[..., Any], *inputs: Any) -> dict[str, Tensor]:
    leaves = tree_leaves(call(*inputs))
    found = {f"output {place}": leaf.detach() for place, leaf in enumerate(leaves)}
    found |= {name: buffer.detach().clone() for name, buffer in owner.named_buffers()}
    return found


def _wide(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def elsewhere(code: str, *arguments: object) -> str:
    """What a fresh process prints in which this package cannot be imported."""
    blocked = """
        import sys, warnings
        class Blocked:
            def find_spec(self, name, *rest):
                if name.partition(".")[0] == "bnrewrite":
                    raise ImportError(name)
        sys.meta_path.insert(0, Blocked())
        warnings.simplefilter("ignore")
        import torch
    """
    text = textwrap.dedent(blocked) + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", text, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
