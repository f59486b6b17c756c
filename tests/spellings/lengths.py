"""Lp-normalise for p = 1, 2 and inf, with its eps in every place where people put it."""

# mypy: disable-error-code="no-any-return"
# Tensor.norm and some operators have no types in torch.

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .family import Family, Spelling
from .written import Formula, Written

EPS = 1e-3
TINY = 1e-12


def native_clamped(m: Written, x: Tensor) -> Tensor:
    return F.normalize(x, p=2.0, dim=-1, eps=TINY)


def norm_clamp_expand(m: Written, x: Tensor) -> Tensor:
    return x / x.norm(2, -1, keepdim=True).clamp_min(TINY).expand_as(x)


def vector_norm_clamp(m: Written, x: Tensor) -> Tensor:
    return torch.div(x, torch.linalg.vector_norm(x, 2, -1, True).clamp(min=TINY))


def root_of_squares_clamp(m: Written, x: Tensor) -> Tensor:
    length = (x * x).sum(-1).sqrt().clamp(min=TINY)
    return x * (1.0 / length)[..., None]


def linalg_norm_clamp(m: Written, x: Tensor) -> Tensor:
    return x * torch.linalg.norm(x, dim=2, keepdim=True).clamp(TINY).reciprocal()


def maximum_with_a_tensor(m: Written, x: Tensor) -> Tensor:
    return x / torch.maximum(x.norm(dim=-1, keepdim=True), torch.tensor(TINY, dtype=x.dtype))


def native_bare(m: Written, x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def bare_norm(m: Written, x: Tensor) -> Tensor:
    return x / x.norm(2, -1, keepdim=True)


def bare_root_of_sum(m: Written, x: Tensor) -> Tensor:
    return torch.div(x, torch.sqrt(torch.sum(x * x, axis=-1, keepdims=True)))  # type: ignore[call-overload]


def bare_rsqrt(m: Written, x: Tensor) -> Tensor:
    return x * x.square().sum(-1, keepdim=True).rsqrt()


def bare_einsum(m: Written, x: Tensor) -> Tensor:
    return x / torch.einsum("bsd,bsd->bs", x, x)[..., None] ** 0.5


def bare_mean_of_squares(m: Written, x: Tensor) -> Tensor:
    width = x.shape[-1]
    return x * (width * x.pow(2).mean(-1, keepdim=True)).pow(-0.5)


def native_added(m: Written, x: Tensor) -> Tensor:
    return x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) + EPS)


def added_to_norm(m: Written, x: Tensor) -> Tensor:
    return x / (x.norm(dim=-1, keepdim=True) + EPS)


def added_to_root(m: Written, x: Tensor) -> Tensor:
    return x * (EPS + x.pow(2).sum(2).sqrt()).unsqueeze(2).reciprocal()


def native_under_root(m: Written, x: Tensor) -> Tensor:
    return x / torch.sqrt(x.square().sum(-1, keepdim=True) + EPS)


def under_root(m: Written, x: Tensor) -> Tensor:
    return x / torch.sqrt((x**2).sum(-1, keepdim=True) + EPS)


def under_rsqrt(m: Written, x: Tensor) -> Tensor:
    return x * torch.rsqrt(torch.sum(torch.square(x), 2, keepdim=True).add(EPS))


def under_root_from_norm(m: Written, x: Tensor) -> Tensor:
    return x * (x.norm(2, dim=2, keepdim=True) ** 2 + EPS) ** -0.5


def native_scaled(m: Written, x: Tensor) -> Tensor:
    return x / torch.sqrt(x.square().sum(-1, keepdim=True) + EPS) * 0.25


def scaled_after(m: Written, x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + EPS) * 0.25


def scaled_before(m: Written, x: Tensor) -> Tensor:
    return 0.25 * x * torch.rsqrt(x.pow(2).sum(dim=-1, keepdim=True) + EPS)


def native_images(m: Written, x: Tensor) -> Tensor:
    return F.normalize(x, p=2.0, dim=1, eps=TINY)


def channels_of_an_image(m: Written, x: Tensor) -> Tensor:
    return x / x.norm(p=2, dim=1, keepdim=True).clamp(min=TINY)


def channels_of_flat_images(m: Written, x: Tensor) -> Tensor:
    flat = x.flatten(2)
    length = flat.pow(2).sum(1, keepdim=True).sqrt().clamp_min(TINY)
    return (flat / length).view_as(x)


def native_manhattan(m: Written, x: Tensor) -> Tensor:
    return F.normalize(x, p=1.0, dim=-1, eps=TINY)


def manhattan_norm(m: Written, x: Tensor) -> Tensor:
    return x / x.norm(1, -1, keepdim=True).clamp_min(TINY)


def manhattan_sum(m: Written, x: Tensor) -> Tensor:
    return x / x.abs().sum(-1, keepdim=True).clamp(min=TINY)


def manhattan_mean(m: Written, x: Tensor) -> Tensor:
    total = torch.mean(torch.abs(x), dim=-1, keepdim=True) * x.shape[-1]
    return x * total.clamp_min(TINY).reciprocal()


def native_manhattan_bare(m: Written, x: Tensor) -> Tensor:
    return x / x.abs().sum(-1, keepdim=True)


def manhattan_bare_norm(m: Written, x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x, ord=1, dim=2, keepdim=True)


def manhattan_bare_sum(m: Written, x: Tensor) -> Tensor:
    return x / torch.abs(x).sum(2).unsqueeze(2)


def native_largest(m: Written, x: Tensor) -> Tensor:
    return F.normalize(x, p=float("inf"), dim=-1, eps=TINY)


def largest_norm(m: Written, x: Tensor) -> Tensor:
    return x / x.norm(float("inf"), -1, keepdim=True).clamp_min(TINY)


def largest_amax(m: Written, x: Tensor) -> Tensor:
    return x / x.abs().amax(-1, keepdim=True).clamp(min=TINY)


def native_largest_added(m: Written, x: Tensor) -> Tensor:
    return x / (torch.linalg.vector_norm(x, float("inf"), dim=-1, keepdim=True) + EPS)


def largest_added(m: Written, x: Tensor) -> Tensor:
    return x / (x.abs().amax(dim=-1, keepdim=True) + EPS)


def largest_added_norm(m: Written, x: Tensor) -> Tensor:
    return x * (x.norm(p=torch.inf, dim=2) + EPS)[:, :, None].reciprocal()


def family(name: str, formula: Formula, eps: float | None) -> Family:
    return Family(f"lp, {name}", ("lp_normalize",), formula, (3, 5, 8), (2,), eps)


CLAMPED = family("p = 2, clamped", native_clamped, TINY)
BARE = family("p = 2, no eps", native_bare, None)
ADDED = family("p = 2, eps added", native_added, EPS)
UNDER_ROOT = family("p = 2, eps under the root", native_under_root, EPS)
MASKED = "the norm's gradient at zero is masked, that of the root of a sum is not"
CLAMPED_ROOT = replace(CLAMPED, name="lp, p = 2, root of a sum, clamped", alone=MASKED)
MAXIMUM = replace(
    CLAMPED,
    name="lp, p = 2, maximum with a tensor",
    alone="maximum halves the gradient between equals, a clamp does not",
)
BARE_ROOT = replace(BARE, name="lp, p = 2, root of a sum, no eps")
BARE = replace(BARE, alone=MASKED)
SCALED = family("p = 2, eps under the root, times a number", native_scaled, EPS)
ADDED_ROOT = replace(ADDED, name="lp, p = 2, root of a sum, eps added", alone=MASKED)
ADDED = replace(ADDED, alone=MASKED)
MANHATTAN = family("p = 1, clamped", native_manhattan, TINY)
MANHATTAN_BARE = family("p = 1, no eps", native_manhattan_bare, None)
LARGEST = family("p = inf, clamped", native_largest, TINY)
LARGEST_ADDED = family("p = inf, eps added", native_largest_added, EPS)
IMAGES = Family(
    "lp, p = 2, channels of images", ("lp_normalize",), native_images, (3, 6, 4, 5), (1,), TINY
)
IMAGES_ROOT = replace(IMAGES, name="lp, p = 2, channels, root of a sum", alone=MASKED)
IMAGES = replace(IMAGES, alone=MASKED)

TABLE = (
    Spelling(norm_clamp_expand, CLAMPED, also=("float64", "bfloat16", "backend")),
    Spelling(vector_norm_clamp, CLAMPED, also=("inductor",)),
    Spelling(root_of_squares_clamp, CLAMPED_ROOT, also=("float64",)),
    Spelling(linalg_norm_clamp, CLAMPED),
    Spelling(maximum_with_a_tensor, MAXIMUM),
    Spelling(bare_norm, BARE, also=("float64", "float16")),
    Spelling(bare_root_of_sum, BARE_ROOT),
    Spelling(bare_rsqrt, BARE_ROOT),
    Spelling(bare_einsum, BARE_ROOT),
    Spelling(bare_mean_of_squares, BARE_ROOT),
    Spelling(added_to_norm, ADDED, also=("bfloat16",)),
    Spelling(added_to_root, ADDED_ROOT),
    Spelling(under_root, UNDER_ROOT, also=("float64",)),
    Spelling(under_rsqrt, UNDER_ROOT),
    Spelling(under_root_from_norm, UNDER_ROOT),
    Spelling(scaled_after, SCALED),
    Spelling(scaled_before, SCALED),
    Spelling(channels_of_an_image, IMAGES),
    Spelling(channels_of_flat_images, IMAGES_ROOT),
    Spelling(manhattan_norm, MANHATTAN, also=("float64",)),
    Spelling(manhattan_sum, MANHATTAN),
    Spelling(manhattan_mean, MANHATTAN),
    Spelling(manhattan_bare_norm, MANHATTAN_BARE),
    Spelling(manhattan_bare_sum, MANHATTAN_BARE),
    Spelling(largest_norm, LARGEST, also=("float64",)),
    Spelling(largest_amax, LARGEST),
    Spelling(largest_added, LARGEST_ADDED),
    Spelling(largest_added_norm, LARGEST_ADDED),
)
