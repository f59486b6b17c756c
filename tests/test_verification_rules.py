"""verify() beside numbers: shapes, keys, history, NaN, exceptions, and its own manners."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from verified_models import Call, Forum, HandWritten, changed, images, native, net

from bnrewrite import Verification, verify


def violations(original: Any, other: Any, *inputs: Any, **options: Any) -> tuple[str, ...]:
    found = verify(original, other, *inputs, **options)
    assert not found.ok
    return found.violations


def test_history_is_cut_and_named() -> None:
    found = verify(Forum(), Forum(repaired=True), images()[:, :1].expand(3, 4, 5, 5))
    assert found.ok, found
    assert any("buffer running_mean carries autograd history" in note for note in found.notes)


def test_history_that_the_user_does_not_have_is_wrong() -> None:
    wrong = violations(Forum(repaired=True), Forum(), torch.randn(3, 4, 5, 5))
    assert "buffer running_mean carries autograd history, which the user's does not" in wrong
    assert "buffer running_mean is another tensor object after a step, the user's is not" in wrong


def test_a_model_with_history_in_its_buffers_can_be_given() -> None:
    model = Forum()
    model(torch.randn(3, 4, 5, 5, requires_grad=True))  # deepcopy refuses such a buffer
    other = Forum(repaired=True)
    other.load_state_dict(model.state_dict())
    assert verify(model, other, torch.randn(3, 4, 5, 5)).ok


def test_keys_shapes_and_dtypes() -> None:
    model = net()
    lacks, has = native(model), native(model)
    del lacks[1]._buffers["num_batches_tracked"]
    lacks[1]._buffers["num_batches_tracked"] = None
    has[1].register_buffer("more", torch.zeros(1))
    assert violations(model, lacks, images()) == (
        "state_dict key 1.num_batches_tracked is in the user's model, not in the optimised",
        "buffer 1.num_batches_tracked is missing in the optimised model",
    )
    assert "state_dict key 1.more is in the optimised model, not in the user's" in violations(
        model, has, images()
    )
    norm = nn.Sequential(nn.Identity(), HandWritten(3))
    wide = changed(norm, result=torch.float64)
    assert violations(norm, wide, images()) == (
        "output has dtype torch.float64, the user's torch.float32",
    )
    assert violations(torch.sin, lambda x: torch.sin(x)[None], torch.ones(2)) == (
        "output has shape (1, 2), the user's (2,)",
    )


def test_structures() -> None:
    def nested(x: Tensor, *, scale: float) -> dict[str, Any]:
        return {"y": (x * scale, [x.sum()]), "n": 3}

    def other(x: Tensor, *, scale: float) -> dict[str, Any]:
        return {"y": (scale * x, [x.sum()]), "n": 4}

    x, kwargs = torch.randn(4), {"scale": 2.0}
    found = verify(Call(nested), Call(lambda x, scale: nested(x, scale=scale)), x, kwargs=kwargs)
    assert found.ok
    assert found["output['y'][1][0]"].ok
    assert violations(nested, other, x, kwargs=kwargs) == (
        "output['n'] is 4, the user's code gives 3",
    )
    assert "structure" in violations(nested, lambda x, scale: x, x, kwargs=kwargs)[0]


def test_tensors_in_keyword_arguments_get_gradients() -> None:
    found = verify(
        Call(F.normalize), Call(lambda **k: F.normalize(**k)), kwargs={"input": images()}
    )
    assert found.ok
    assert found["gradient of input['input']"].ok


def test_gradients_that_do_not_arrive() -> None:
    x = torch.randn(3)
    assert violations(lambda x: x * 2, lambda x: x.detach() * 2, x)[0] == (
        "output requires no gradient, the user's does"
    )
    found = verify(lambda x, y: x * 2, lambda x, y: x * 2 + 0 * y, x, x.clone())
    assert found.ok
    assert "gradient of input[1] is None in the user's code, compared as zero" in found.notes


def test_nan_and_inf_stand_where_the_user_has_them() -> None:
    x = torch.randn(4, 8)
    x[1] = 0.0
    x[2, 0] = torch.inf

    def plain(x: Tensor) -> Tensor:
        norm: Tensor = x.norm(dim=-1, keepdim=True)
        return x / norm

    assert verify(Call(plain), Call(lambda x: x / (x * x).sum(-1, keepdim=True).sqrt()), x).ok
    assert (
        "output: 8 of 32 values are NaN or inf in the user's code"
        in (violations(Call(plain), Call(F.normalize), x)[0])
    )
    assert (
        "NaN or inf, where the user's code gives finite ones"
        in (violations(Call(F.normalize), Call(plain), x)[0])
    )


def test_nan_of_rounding_alone_may_become_finite() -> None:
    # x = 40000 .. 40003: E[x^2] - E[x]^2 is -128 in float32, hence NaN (contract C7)
    def cancels(x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        return (x - mean) / torch.sqrt((x * x).mean(-1, keepdim=True) - mean * mean)

    def moments(x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
        return (x - mean) / variance.sqrt()

    x = torch.tensor([[40000.0, 40001.0, 40002.0, 40003.0]])
    found = verify(cancels, moments, x, steps=1)
    assert found.ok, found
    assert any("cancels to NaN" in note for note in found.notes)
    assert not verify(moments, cancels, x, steps=1).ok


def raises(error: Exception) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        raise error

    return forward


def test_exceptions() -> None:
    x = torch.ones(2)
    same = verify(raises(ValueError("one value")), raises(ValueError("other words")), x)
    assert same.ok
    assert same.notes == (
        "both models stop in step 0: the user's code raises ValueError (one value)",
    )
    assert violations(raises(ValueError("no")), torch.sin, x) == (
        "in step 0 the user's code raises ValueError (no), the optimised model does not raise",
    )
    assert violations(torch.sin, raises(ValueError("no")), x) == (
        "in step 0 the user's code does not raise, the optimised model raises ValueError (no)",
    )
    assert len(violations(raises(ValueError("no")), raises(KeyError("k")), x)) == 1


def test_nothing_is_changed() -> None:
    model = net()
    other = native(model)
    x = images().requires_grad_()
    weight = next(model.parameters())
    weight.grad = torch.ones_like(weight)
    state = [copy.deepcopy(each.state_dict()) for each in (model, other)]
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    verify(model, other, x)
    for each, before in zip((model, other), state, strict=True):
        assert all(torch.equal(each.state_dict()[name], value) for name, value in before.items())
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert model[1].weight.grad is None
    assert x.grad is None
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    assert torch.get_default_dtype() == torch.float32


def test_the_same_call_gives_the_same_numbers() -> None:
    model = net()
    assert verify(model, native(model), images()) == verify(model, native(model), images())


def test_print() -> None:
    model = net()
    good, bad = (
        verify(model, native(model), images()),
        verify(model, changed(model, eps=1.0), images()),
    )
    assert str(good).splitlines()[0] == "verification ok: 11 values over 3 steps"
    assert str(bad).splitlines()[0].startswith("verification NOT equal: 11 values over 3 steps, ")
    assert "WRONG" in str(bad)
    assert "WRONG" not in str(good)
    assert max(len(line) for line in bad.to_text(70).splitlines()) <= 70
    with pytest.raises(KeyError, match="was not compared"):
        good["no such value"]
    assert isinstance(good, Verification)


def test_misuse_is_told() -> None:
    model, x = net(), images()
    with pytest.raises(TypeError, match="optimized is a Tensor; verify takes modules or functions"):
        verify(model, x, x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="same object: optimize\\(\\) changes the model in place"):
        verify(model, model, x)
    with pytest.raises(ValueError, match="steps is 0; at least 1"):
        verify(model, native(model), x, steps=0)
    with pytest.raises(ValueError, match=r"0\.weight differs between original and optimized"):
        verify(model, nn.Sequential(nn.Conv2d(3, 4, 1), *list(copy.deepcopy(model))[1:]), x)
    with pytest.raises(ValueError, match="training=True in original and False in optimized"):
        verify(model, native(model).eval(), x)


def test_code_that_cannot_run_in_float64_is_told() -> None:
    def only_float32(x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise TypeError("float32 only")
        return x

    with pytest.raises(
        RuntimeError, match=r"float64 run of the original raised TypeError: float32"
    ):
        verify(only_float32, lambda x: x, torch.ones(2))
