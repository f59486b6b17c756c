"""An operator called by its binding is the operator: same values, defaults, arguments."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from bnrewrite.capture.bindings import call_by_bindings

X = torch.randn(6, 4)
Y = torch.rand(6, 4)
SIGN = Y.round() * 2 - 1
CLASSES = torch.tensor([0, 3, 1, 2, 2, 0])
IMAGE = torch.randn(2, 4, 6, 6)

CALLS: dict[str, Callable[[], object]] = {
    "arithmetic": lambda: (2 - X).div(Y, rounding_mode="floor").add(Y, alpha=3).mul(2).pow(2),
    "in place": lambda: X.clone().mul_(2).add_(Y).clamp_(min=0).sub_(1, alpha=2).relu_(),
    "views": lambda: X.expand(2, 6, 4).permute(1, 0, 2).reshape(8, 6).view(4, 12)[:, 1:5].t(),
    "casts": lambda: X.to(torch.float64).to(torch.float32, memory_format=torch.preserve_format),
    "channels last": lambda: IMAGE.to(torch.float64, memory_format=torch.channels_last),
    "reductions": lambda: (X.sum(0, keepdim=True), X.mean(), X.var(1, correction=2), X.amax(1)),
    "moments": lambda: torch.var_mean(X, dim=0, correction=0, keepdim=True),
    "largest": lambda: torch.max(X, 1),
    "norms": lambda: (X.norm(p=3, dim=1), torch.linalg.vector_norm(X, 1, dim=0), X.norm()),
    "activations": lambda: [f(X) for f in (functional.gelu, functional.silu, torch.sigmoid)],
    "softmax": lambda: functional.log_softmax(X, 1).exp() - functional.softmax(X, 0),
    "where": lambda: torch.where(X > 0, X, Y).masked_fill(X > 1, 3.0),
    "linear": lambda: (
        functional.linear(X, Y, torch.ones(6)) + X @ Y.t() + torch.addmm(Y[0], X, X[:4]).sum()
    ),
    "convolution": lambda: functional.conv2d(IMAGE, torch.ones(2, 4, 3, 3), padding="same"),
    "pooling": lambda: functional.max_pool2d(IMAGE, 2) + functional.avg_pool2d(IMAGE, 2),
    "padding": lambda: functional.pad(IMAGE, (1, 2, 0, 1), mode="reflect"),
    "embedding": lambda: functional.embedding(CLASSES, X, padding_idx=0),
    "joined": lambda: torch.split(torch.cat([X, Y], 1), 3, 1),
    "attention": lambda: functional.scaled_dot_product_attention(
        IMAGE, IMAGE, IMAGE, is_causal=True
    ),
    "interpolation": lambda: functional.interpolate(IMAGE, scale_factor=2, mode="bilinear"),
    "batch norm": lambda: functional.batch_norm(IMAGE, torch.zeros(4), torch.ones(4), eps=1e-3),
    "group norm": lambda: functional.group_norm(IMAGE, 2) + functional.layer_norm(IMAGE, (6, 6)),
    "mse": lambda: functional.mse_loss(X, Y),
    "l1": lambda: functional.l1_loss(X, Y, reduction="sum"),
    "huber": lambda: functional.huber_loss(X, Y) + functional.smooth_l1_loss(X, Y),
    "cross entropy": lambda: functional.cross_entropy(X, CLASSES, label_smoothing=0.1),
    "likelihood": lambda: functional.nll_loss(X, CLASSES, reduction="none"),
    "binary cross entropy": lambda: functional.binary_cross_entropy(Y, Y),
    "with logits": lambda: functional.binary_cross_entropy_with_logits(X, Y, pos_weight=Y[0]),
    "divergence": lambda: functional.kl_div(X, Y, reduction="batchmean"),
    "margins": lambda: (
        functional.multi_margin_loss(X, CLASSES) + functional.soft_margin_loss(X, SIGN)
    ),
    "cosine": lambda: functional.cosine_embedding_loss(X, Y, SIGN[:, 0]),
    "triplet": lambda: functional.triplet_margin_loss(X, Y, X.flip(0)),
    "hinge": lambda: functional.hinge_embedding_loss(X, SIGN),
    "ranking": lambda: functional.margin_ranking_loss(X[:, 0], Y[:, 0], SIGN[:, 0]),
}


@pytest.mark.parametrize("call", [pytest.param(call, id=name) for name, call in CALLS.items()])
def test_a_binding_is_its_operator(call: Callable[[], object]) -> None:
    graph = make_fx(call, pre_dispatch=True)()
    expected = tree_leaves(graph())

    call_by_bindings(graph)
    found = tree_leaves(graph())
    for mine, operators in zip(found, expected, strict=True):
        assert isinstance(mine, Tensor)
        assert mine.stride() == operators.stride()
        torch.testing.assert_close(mine, operators, rtol=0, atol=0, equal_nan=True)
