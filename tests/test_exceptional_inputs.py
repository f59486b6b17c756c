"""Inputs at the edge: empty, of one row, NaN and infinite, complex, of integers."""

from __future__ import annotations

import copy

import pytest
import torch
from hand_written import Net, RowNorm, images, row_norm, same
from torch import Tensor

import bnrewrite

pytestmark = pytest.mark.usefixtures("repeatable")


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (1, 8), (2, 3, 8), (8,)])
def test_shapes_at_the_edge(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    users = RowNorm(shape[-1])
    model = bnrewrite.optimize(copy.deepcopy(users), backend="eager")
    torch.testing.assert_close(model(x), users(x), equal_nan=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_exceptional_values(value: float) -> None:
    x = torch.randn(3, 8)
    x[1] = value
    users = RowNorm(8)
    model = bnrewrite.optimize(copy.deepcopy(users), backend="eager")
    torch.testing.assert_close(model(x), users(x), equal_nan=True)


def test_an_empty_batch_of_images() -> None:
    users = Net()
    model = bnrewrite.optimize(copy.deepcopy(users), backend="eager")
    for x in (images(0), images(4), images(1)):
        torch.testing.assert_close(model(x), users(x), equal_nan=True, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dict(model.state_dict()), dict(users.state_dict()), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_tensors(dtype: torch.dtype) -> None:
    def center(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.abs().pow(2).mean(-1, keepdim=True) + 1e-5)

    x = torch.randn(3, 8, dtype=dtype)
    same(bnrewrite.optimize(center, backend="eager"), center, x)


def test_integer_tensors_raise_as_the_users_code_does() -> None:
    fast = bnrewrite.optimize(row_norm, backend="eager")
    x = torch.arange(8).view(2, 4)
    with pytest.raises(RuntimeError) as users:
        row_norm(x)
    with pytest.raises(RuntimeError) as mine:
        fast(x)
    assert str(mine.value) == str(users.value)
    same(fast, row_norm, torch.randn(2, 4))
