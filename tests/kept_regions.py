"""Two norms beside a region without a canonical form, and the comparison with the user's run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from hand_written import Layer, RowNorm
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import bnrewrite

SIZE = 8
Body = Callable[["Two", Tensor], Tensor]


class Two(Layer):
    """Two norms and a linear layer, used as `body` says."""

    def __init__(self, body: Body, norm: Callable[[int], Layer] = RowNorm) -> None:
        super().__init__()
        self.first: Layer = norm(SIZE)
        self.second: Layer = norm(SIZE)
        self.linear = nn.Linear(SIZE, SIZE)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


class Steep(torch.autograd.Function):
    """A sine whose backward is the user's: seven times the gradient, not the cosine."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[0]
        return gradients[0] * 7 * x


class SteepNorm(torch.autograd.Function):
    """A norm whose backward is the user's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        y: Tensor = ctx.saved_tensors[0]
        return gradients[0] * 3 * y


def steep(x: Tensor, function: Any = Steep) -> Tensor:
    y = function.apply(x)
    assert isinstance(y, Tensor)
    return y


def recomputed(function: Callable[[Tensor], Tensor], x: Tensor, **settings: Any) -> Tensor:
    y = checkpoint(function, x, **{"use_reentrant": False, **settings})
    assert isinstance(y, Tensor)
    return y


def a_function(model: Two, x: Tensor) -> Tensor:
    return model.second(steep(model.first(x)))


def a_function_with_a_norm(model: Two, x: Tensor) -> Tensor:
    return model.second(steep(model.first(x), SteepNorm))


def a_shared_norm(model: Two, x: Tensor) -> Tensor:
    return model.first(steep(model.first(x)))


def checkpointing(model: Two, x: Tensor) -> Tensor:
    def inner(y: Tensor) -> Tensor:
        return torch.dropout(model.linear(model.second(y)), 0.4, model.training)

    return model.first(recomputed(inner, model.first(x)))


def checkpointing_at_the_end(model: Two, x: Tensor) -> Tensor:
    return recomputed(lambda y: model.second(model.linear(y)), model.first(x))


def checkpointing_twice(model: Two, x: Tensor) -> Tensor:
    def inner(y: Tensor) -> Tensor:
        return model.second(recomputed(lambda z: model.first(z).sin(), y))

    return model.first(recomputed(inner, model.first(x)))


def reentrant_checkpointing(model: Two, x: Tensor) -> Tensor:
    def inner(y: Tensor) -> Tensor:
        return torch.dropout(model.second(y), 0.4, model.training)

    return model.first(recomputed(inner, model.first(x), use_reentrant=True))


def a_branch(model: Two, x: Tensor) -> Tensor:
    y = model.first(x)
    return model.second(torch.cond(y.sum() > 0, torch.sin, torch.cos, (y,)))


def a_map(model: Two, x: Tensor) -> Tensor:
    return model.second(torch.func.vmap(lambda row: row.sin() / row.norm())(model.first(x)))


def a_gradient(model: Two, x: Tensor) -> Tensor:
    return model.second(torch.func.grad(lambda y: (y**3).sum())(model.first(x)))


def a_directional_derivative(model: Two, x: Tensor) -> Tensor:
    derivative: tuple[Any, ...] = torch.func.jvp(torch.sin, (model.first(x),), (x,))
    return model.second(derivative[0] * derivative[1])


def parts_of_a_tuple(model: Two, x: Tensor) -> Tensor:
    left, right = model.first(torch.cat([x, x])).chunk(2)
    return model.second(steep(left) * right)


def a_size(model: Two, x: Tensor) -> Tensor:
    count = x.shape[0]
    y = steep(model.first(x)).view(count, 2, SIZE // 2)
    return model.second(y.reshape(count, SIZE) / count)


def no_gradients(model: Two, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = model.second(torch.func.vmap(torch.sin)(model.first(x)))
    return model.second(x + y)


def inference(model: Two, x: Tensor) -> Tensor:
    with torch.inference_mode():
        y = model.first(x)
    return model.second(x + y)


def chosen_attention(model: Two, x: Tensor) -> Tensor:
    y = model.first(x)[None]
    with sdpa_kernel(SDPBackend.MATH):
        y = nn.functional.scaled_dot_product_attention(y, y, y)
    return model.second(y[0])


def an_update_of_what_was_kept(model: Two, x: Tensor) -> Tensor:
    y = steep(model.first(x)) * 1
    y += x
    return model.second(y)


def a_branch_with_a_norm(model: Two, x: Tensor) -> Tensor:
    y = model.first(x)
    return model.second(torch.cond(y.sum() > 0, row_norm, torch.cos, (y,)))


def row_norm(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-5).sqrt()


KEPT = (
    a_function,
    a_function_with_a_norm,
    a_shared_norm,
    checkpointing,
    checkpointing_at_the_end,
    checkpointing_twice,
    reentrant_checkpointing,
    a_branch,
    a_map,
    a_gradient,
    a_directional_derivative,
    parts_of_a_tuple,
    a_size,
    no_gradients,
    inference,
    chosen_attention,
    an_update_of_what_was_kept,
)


def observed(model: nn.Module, x: Tensor, step: int) -> Iterator[Any]:
    """All that one step of training, or of use, shows."""
    torch.manual_seed(step)
    x = x.clone().requires_grad_()
    y = model(x)
    if y.requires_grad:
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(step)).to(y))
    yield from (y.detach(), x.grad, torch.get_rng_state())
    yield {name: value.clone() for name, value in model.state_dict().items()}
    yield [None if each.grad is None else each.grad.clone() for each in model.parameters()]


def compare(users: nn.Module, backend: str = "eager", grad_enabled: bool = True) -> None:
    """Both run four steps in float64, the last one in eval mode; nobody can tell which is which."""
    torch.manual_seed(0)
    users = users.double()
    for parameter in users.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    model = bnrewrite.optimize(copy.deepcopy(users), backend=backend)
    identities = [id(each) for each in (*model.parameters(), *model.buffers())]
    with torch.set_grad_enabled(grad_enabled):
        for step in range(4):
            x = torch.randn(4, SIZE, dtype=torch.float64)
            for each in (users, model):
                each.train(step < 3)
            pairs = zip(observed(users, x, step), observed(model, x, step), strict=True)
            for theirs, mine in pairs:
                torch.testing.assert_close(mine, theirs)
    assert identities == [id(each) for each in (*model.parameters(), *model.buffers())]


def statuses(model: nn.Module) -> list[tuple[str, str]]:
    report = bnrewrite.explain(model, torch.randn(4, SIZE, requires_grad=True))
    return [(site.module, site.status) for site in report.sites]
