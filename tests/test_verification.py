"""verify() says yes to what is equal and no to what is not: the numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from verified_models import Call, HandWritten, changed, images, native, net

from bnrewrite import verify

Change = dict[str, Any]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_the_native_norm_is_equal(dtype: torch.dtype, training: bool) -> None:
    model = net().to(dtype).train(training)
    found = verify(model, native(model), images(dtype=dtype))
    assert found.ok, found
    assert bool(found)
    assert found.steps == 3
    assert not found.notes
    assert {check.name for check in found} == {
        "output", "gradient of input[0]", "gradient of 0.weight", "gradient of 0.bias",
        "gradient of 1.weight", "gradient of 1.bias", "gradient of 4.weight", "gradient of 4.bias",
        "buffer 1.running_mean", "buffer 1.running_var", "buffer 1.num_batches_tracked",
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
def test_luck_decides_nothing(seed: int) -> None:
    # one channel: the gradient of the convolution's bias is a single number, zero but for rounding
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 1, 1), HandWritten(1))
    other = copy.deepcopy(model)
    other[1] = nn.BatchNorm2d(1)
    other[1].load_state_dict(model[1].state_dict())
    assert verify(model, other, torch.randn(2, 2, 3, 3), seed=seed).ok


def test_a_constant_channel_may_round_anywhere() -> None:
    # x - mean is exactly zero in one of the two, an ulp of the mean times 316 in the other
    model, other = HandWritten(4), nn.BatchNorm2d(4)
    other.load_state_dict(model.state_dict())
    x = torch.full((2, 4, 4, 4), 1.7)
    assert verify(model, other, x).ok


# -- not equal -----------------------------------------------------------------------------------

WRONG: list[tuple[Change, str]] = [
    ({"eps": 2e-5}, "output"),
    ({"eps": 2e-5}, "gradient of 1.weight"),
    ({"momentum": 0.101}, "buffer 1.running_mean"),
    ({"momentum": 0.9}, "buffer 1.running_var"),
    ({"unbiased": False}, "buffer 1.running_var"),
    ({"detached_mean": True}, "gradient of input[0]"),
    ({"statistics": torch.bfloat16}, "output"),
    ({"statistics": torch.bfloat16}, "buffer 1.running_mean"),
    ({"statistics": torch.float16}, "buffer 1.running_var"),
    ({"ticks": 2}, "buffer 1.num_batches_tracked"),
    ({"offset": 1e-5}, "output"),
]


@pytest.mark.parametrize(("change", "name"), WRONG, ids=str)
def test_wrong_rewrites_are_seen(change: Change, name: str) -> None:
    model = net()
    found = verify(model, changed(model, **change), images())
    assert not found.ok
    assert not found[name].ok, found
    assert any(sentence.startswith(f"{name}: error") for sentence in found.failures)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "change", [{"momentum": 0.2}, {"detached_mean": True}, {"eps": 0.1}], ids=str
)
def test_wrong_rewrites_are_seen_in_half_precision(change: Change, dtype: torch.dtype) -> None:
    model = net().to(dtype)
    assert not verify(model, changed(model, **change), images(dtype=dtype)).ok


def test_narrow_statistics_are_seen_where_the_source_widens() -> None:
    # contract C5: the user's float32 statistics keep a mean of 32 that bfloat16 rounds to 1/4
    def wide(x: Tensor) -> Tensor:
        z = x.float()
        return ((z - z.mean(-1, True)) * torch.rsqrt(z.var(-1, keepdim=True) + 1e-5)).to(x.dtype)

    def narrow(x: Tensor) -> Tensor:
        return (x - x.mean(-1, True)) * torch.rsqrt(x.var(-1, keepdim=True) + 1e-5)

    x = (torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) + 32.3).bfloat16()
    assert verify(Call(wide), Call(lambda x: wide(x) * 1), x).ok
    assert not verify(Call(wide), Call(narrow), x).ok


def test_one_wrong_row_is_seen_beside_a_zero_row() -> None:
    # F.normalize has a gradient of 1e12 at a zero vector; other rows must not hide behind it
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    x[3] = 0.0

    def slightly_off(x: Tensor) -> Tensor:
        y = F.normalize(x, eps=1e-12)
        return torch.cat([y[:-1], y[-1:] + 1e-5 * x[-1:]])

    assert verify(Call(F.normalize), Call(lambda x: F.normalize(x, eps=1e-12)), x).ok
    found = verify(Call(F.normalize), Call(slightly_off), x)
    assert not found["gradient of input[0]"].ok


def test_later_steps_are_compared() -> None:
    class Late(HandWritten):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1.0 if self.num_batches_tracked < 2 else 1.001)

    model = net()
    late = net(Late())
    late.load_state_dict(model.state_dict())
    assert verify(model, late, images(), steps=1).ok
    assert not verify(model, late, images(), steps=3).ok


def test_inputs_that_the_code_writes_to() -> None:
    def centred(x: Tensor) -> Tensor:
        return x.sub_(x.mean())

    def apart(x: Tensor) -> Tensor:
        return x - x.mean()

    x = torch.randn(6)
    before = x.clone()
    assert verify(centred, lambda x: x.sub_(x.mean()), x)["input[0] afterwards"].ok
    assert not verify(centred, apart, x)["input[0] afterwards"].ok
    assert torch.equal(x, before)


def test_integers_complex_and_plain_arguments() -> None:
    def embed(index: Tensor, table: Tensor, mode: str) -> Tensor:
        return table[index] * (2 if mode == "double" else 1)

    index, table = torch.tensor([1, 0]), torch.randn(3, 4, dtype=torch.complex64)
    found = verify(Call(embed), Call(lambda *a: embed(*a)), index, table, "double")
    assert found.ok
    assert [check.name for check in found] == ["output", "gradient of input[1]"]
    assert not verify(embed, lambda i, t, m: embed(i, t.conj(), m), index, table, "double").ok


@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (2, 0, 3, 3)])
def test_empty_tensors(shape: tuple[int, ...]) -> None:
    assert verify(Call(torch.sigmoid), Call(lambda x: torch.sigmoid(x)), torch.zeros(shape)).ok


def test_plain_attributes_are_state_too() -> None:
    class Attribute(nn.Module):
        def __init__(self, rate: float) -> None:
            super().__init__()
            self.mean = torch.zeros(3)
            self.rate = rate

        def forward(self, x: Tensor) -> Tensor:
            self.mean = self.mean + self.rate * x.mean(0)  # with its history
            return x - self.mean

    x = torch.randn(5, 3)
    assert verify(Attribute(0.1), Attribute(0.1), x).ok
    assert not verify(Attribute(0.1), Attribute(0.2), x)["attribute mean"].ok


def test_compiled_models() -> None:
    model = net()
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    found = verify(model, compiled, images())
    assert found.ok, found
    assert found["buffer 1.running_mean"].ok


def test_the_original_runs_as_written_also_where_it_is_compiled() -> None:
    def wrong(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        return lambda *args: tuple(2 * each for each in graph(*args))

    model = nn.Linear(2, 2)
    compiled = copy.deepcopy(model)
    compiled.compile(backend=wrong)
    assert verify(compiled, model, torch.randn(3, 2)).ok
    assert not verify(model, torch.compile(model, backend=wrong), torch.randn(3, 2)).ok
    with pytest.raises(ValueError, match=r"\(root\) of optimized was compiled in place"):
        verify(model, compiled, torch.randn(3, 2))


def test_dropout_draws_the_same_in_every_run() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.LayerNorm(8), nn.RReLU())
    found = verify(model, copy.deepcopy(model), torch.randn(4, 8))
    assert found.ok
    assert found["output"].user < 1e-5  # other masks would differ by more than a rounding


def test_attention_without_dropout_is_no_random_number() -> None:
    """Else its float64 run is in the user's dtype, and the user's own error seems to be zero."""
    model = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        result = verify(model, copy.deepcopy(model), x, x, x, steps=1)
    assert result.ok
    assert 0 < result["output[0]"].user < 1e-5

    def attention(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)

    result = verify(attention, lambda x: attention(x), x, steps=1)
    assert result.ok
    assert 0 < result["output"].user < result["output"].bound


def test_float64_is_not_narrowed_by_the_code() -> None:
    def widening(x: Tensor) -> Tensor:
        z = x.float()
        scale = torch.tensor(3) / torch.full((), 7, dtype=torch.int64)
        root = torch.sqrt(z.pow(2).mean(-1, keepdim=True, dtype=torch.float32) + 1e-6)
        return (z / root).type(torch.float32).to(x.dtype) * scale + torch.zeros(1)

    found = verify(widening, lambda x: widening(x), torch.randn(16, 64))
    assert 0 < found["output"].user < 1e-6  # the user's own rounding, not zero: float64 is apart
    assert found["output"].optimized == found["output"].user
    assert found.ok


def test_autocast_around_the_call() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    x = torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = verify(model, copy.deepcopy(model), x)
    assert found.ok
    assert found["output"].user > 1e-4  # bfloat16 in the user's run, float64 in the oracle


def test_without_gradients() -> None:
    model = net().eval()
    with torch.no_grad():
        found = verify(model, native(model), images())
    assert found.ok
    assert not any(check.kind == "gradient" for check in found)


def test_tied_and_shared() -> None:
    norm = HandWritten(3)
    model = nn.Sequential(norm, nn.Conv2d(3, 3, 1), norm)
    model[1].bias = norm.bias
    found = verify(model, copy.deepcopy(model), images())
    assert found.ok
    assert found["buffer 0.running_mean"].user < 1e-6
