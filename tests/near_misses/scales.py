"""BatchNorm of a tensor with four equal sizes: changes around its statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from spellings import Written
from torch import Tensor

from .recipe import EPS, NearMiss, Recipe
from .statistics import BATCH, SQUARE, mean, variance


def no_affine(m: Written, x: Tensor) -> Tensor:
    return (x - mean(x)) / (variance(x) + EPS).sqrt()


def scale_and_shift(shift: Callable[[Written, Tensor, Tensor], Tensor]) -> Any:
    def formula(m: Written, x: Tensor) -> Tensor:
        scale = m.weight.view(1, -1, 1, 1) * (variance(x) + EPS).rsqrt()
        return x * scale + shift(m, mean(x), scale)

    return formula


def mean_escapes_into_the_output(m: Written, x: Tensor) -> Tensor:
    return BATCH(m, x) + mean(x)


def centred_escapes(m: Written, x: Tensor) -> tuple[Tensor, Tensor]:
    centred = x - mean(x)
    y = centred / (variance(x) + EPS).sqrt()
    return y * m.weight.view(1, -1, 1, 1) + m.bias.view(1, -1, 1, 1), centred


def variance_escapes(m: Written, x: Tensor) -> tuple[Tensor, Tensor]:
    var = variance(x)
    y = (x - mean(x)) / (var + EPS).sqrt()
    return y * m.weight.view(1, -1, 1, 1) + m.bias.view(1, -1, 1, 1), var


def mean_changed_in_place_after_use(m: Written, x: Tensor) -> tuple[Tensor, Tensor]:
    average = mean(x)
    y = BATCH(m, x)
    return y, average.mul(2).add_(1)


def residual(m: Written, x: Tensor) -> Tensor:
    return x + BATCH(m, x)


def norm_of_a_norm(m: Written, x: Tensor) -> Tensor:
    return BATCH(m, BATCH(m, x))


def two_norms_share_a_bias(m: Written, x: Tensor) -> Tensor:
    return BATCH(m, x) + BATCH(m, x.flip(0)) * m.bias.view(1, -1, 1, 1)


def output_transposed(m: Written, x: Tensor) -> Tensor:
    return BATCH(m, x).transpose(2, 3)


def input_transposed(m: Written, x: Tensor) -> Tensor:
    return BATCH(m, x.transpose(0, 1))


def overwritten_input(m: Written, x: Tensor) -> Tensor:
    x = x * 1.0
    average = mean(x)
    x.add_(1.0)
    y = (x - average) / (variance(x) + EPS).sqrt()
    return y * m.weight.view(1, -1, 1, 1) + m.bias.view(1, -1, 1, 1)


def overwritten_slice(m: Written, x: Tensor) -> Tensor:
    y = (x - mean(x)) / (variance(x) + EPS).sqrt()
    y[:, 0] = 0
    return y * m.weight.view(1, -1, 1, 1) + m.bias.view(1, -1, 1, 1)


PARTS: dict[str, Recipe] = {
    "weight without a view": replace(BATCH, weight=lambda m: m.weight),
    "weight along the rows": replace(BATCH, weight=lambda m: m.weight.view(-1, 1)),
    "weight along the batch": replace(BATCH, weight=lambda m: m.weight.view(-1, 1, 1, 1)),
    "weight flipped": replace(BATCH, weight=lambda m: m.weight.flip(0).view(1, -1, 1, 1)),
    "weight reordered": replace(BATCH, weight=lambda m: m.weight[[1, 0, 3, 2]].view(1, -1, 1, 1)),
    "weight's first entry for all": replace(BATCH, weight=lambda m: m.weight[:1]),
    "weight's mean": replace(BATCH, weight=lambda m: m.weight.mean()),
    "weight's outer product": replace(BATCH, weight=lambda m: torch.outer(m.weight, m.weight)),
    "weight detached": replace(BATCH, weight=lambda m: m.weight.detach().view(1, -1, 1, 1)),
    "weight squared": replace(BATCH, weight=lambda m: m.weight.view(1, -1, 1, 1) ** 2),
    "one plus the weight": replace(BATCH, weight=lambda m: 1 + m.weight.view(1, -1, 1, 1)),
    "one less the weight": replace(BATCH, weight=lambda m: 1 - m.weight.view(1, -1, 1, 1)),
    "bias without a view": replace(BATCH, bias=lambda m: m.bias),
    "bias along the batch": replace(BATCH, bias=lambda m: m.bias.view(-1, 1, 1, 1)),
    "bias rolled": replace(BATCH, bias=lambda m: m.bias.roll(1).view(1, -1, 1, 1)),
    "bias in the weight's place": replace(BATCH, weight=lambda m: m.bias.view(1, -1, 1, 1)),
    "weight in the bias's place": replace(BATCH, bias=lambda m: m.weight.view(1, -1, 1, 1)),
    "bias before the scale": replace(BATCH, affine=lambda y, w, b: (y + b) * w),
    "bias subtracted": replace(BATCH, affine=lambda y, w, b: y * w - b),
    "divided by the weight": replace(BATCH, affine=lambda y, w, b: y / w + b),
    "weight applied twice": replace(BATCH, affine=lambda y, w, b: y * w * w + b),
    "bias added twice": replace(BATCH, affine=lambda y, w, b: y * w + b + b),
    "half of addcmul": replace(BATCH, affine=lambda y, w, b: torch.addcmul(b, y, w, value=0.5)),
    "added to the mean": replace(BATCH, centre=torch.add),
    "mean less x": replace(BATCH, centre=lambda x, average: average - x),
    "not centred": replace(BATCH, centre=lambda x, average: x + 0 * average),
    "centred on a lerp": replace(BATCH, centre=lambda x, average: torch.lerp(x, average, 0.5)),
    "multiplied by the root": replace(BATCH, divide=torch.mul),
    "floor of the quotient": replace(
        BATCH, divide=lambda y, root: torch.div(y, root, rounding_mode="floor")
    ),
    "square of the normalised": replace(BATCH, divide=lambda y, root: (y / root).square()),
}
WHOLE = {
    "shift without the scale": scale_and_shift(
        lambda m, average, scale: m.bias.view(1, -1, 1, 1) - average
    ),
    "shift with the wrong sign": scale_and_shift(
        lambda m, average, scale: m.bias.view(1, -1, 1, 1) + average * scale
    ),
    "shift with the scale detached": scale_and_shift(
        lambda m, average, scale: m.bias.view(1, -1, 1, 1) - average * scale.detach()
    ),
    "shift by the mean times the weight": scale_and_shift(
        lambda m, average, scale: (m.bias - m.weight).view(1, -1, 1, 1) - average * scale
    ),
    "no affine": no_affine,
    "the input is transposed": input_transposed,
    "the input is overwritten between the statistics": overwritten_input,
    "a channel is overwritten before the affine": overwritten_slice,
}
BESIDE = {
    "mean escapes into the output": mean_escapes_into_the_output,
    "residual": residual,
    "norm of a norm": norm_of_a_norm,
    "two norms share a bias": two_norms_share_a_bias,
    "the output is transposed": output_transposed,
    "centred x escapes": centred_escapes,
    "variance escapes": variance_escapes,
    "mean escapes, changed in place": mean_changed_in_place_after_use,
}

TABLE = (
    *(NearMiss(f"batch: {name}", formula, BATCH, SQUARE) for name, formula in PARTS.items()),
    *(NearMiss(f"batch: {name}", formula, BATCH, SQUARE) for name, formula in WHOLE.items()),
    *(
        NearMiss(f"batch: {name}", formula, BATCH, SQUARE, norm_stays=True)
        for name, formula in BESIDE.items()
    ),
)
