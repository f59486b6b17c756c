"""Tiles cover what they have to, leave no part empty, and stay within what a device has."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import ACROSS, PROGRAMS

from bnrewrite.kernels.generated.layout import Layout, arrange
from bnrewrite.kernels.generated.program import parse
from bnrewrite.kernels.triton import means, tiles
from bnrewrite.kernels.triton.formulas import wants_double
from bnrewrite.kernels.triton.source import Tiled

TEXTS = PROGRAMS | ACROSS
EXTENTS = st.sampled_from([1, 2, 3, 7, 16, 49, 64, 100, 257, 768, 1000, 4096, 100_003])
DENSE = {3: ((0, 1, 2), (2, 0, 1)), 4: ((0, 1, 2, 3), (0, 2, 3, 1))}


def tiled_of(kind: str, shape: Sequence[int], order: tuple[int, ...]) -> tuple[Tiled, list[int]]:
    strides, inner = [0] * len(shape), 1
    for dim in reversed(order):
        strides[dim], inner = inner, inner * shape[dim]
    found = arrange(parse(TEXTS[kind]), shape, strides)
    assert found is not None
    layout, lengths = found
    return Tiled(TEXTS[kind], Layout(layout.loops, 0), frozenset(), "float32", False), lengths


@settings(max_examples=300)
@given(
    kind=st.sampled_from(list(TEXTS)),
    extents=st.tuples(EXTENTS, EXTENTS, EXTENTS, EXTENTS),
    inside=st.booleans(),
    itemsize=st.sampled_from([2, 4]),
    processors=st.sampled_from([1, 108, 132]),
    backward=st.booleans(),
)
def test_a_tile_covers_its_program(
    kind: str,
    extents: tuple[int, ...],
    inside: bool,
    itemsize: int,
    processors: int,
    backward: bool,
) -> None:
    program = parse(TEXTS[kind])
    rank = len(program.dims)
    shape = [  # a dimension of groups holds a multiple of their number
        extent * math.prod(program.sizes.get(axis, 1) for axis in dim)
        for dim, extent in zip(program.dims, extents[:rank], strict=True)
    ]
    tiled, lengths = tiled_of(kind, shape, DENSE[rank][inside])
    lanes = tiled.lanes if backward else []

    def count(loops: list[int]) -> int:
        return math.prod(lengths[i] for i in loops)

    cut = tiles.tile(tiled, lengths, itemsize, processors, backward=backward)
    cells, elements = count(tiled.cells), count(tiled.elements)
    if cut is None:
        assert cells > tiles.PART  # a number for each part would not fit
        return
    size = cut.groups * cut.cells * cut.elements
    assert all(n & (n - 1) == 0 for n in (cut.groups, cut.cells, cut.elements, cut.most_parts))
    assert size <= (tiles.BACKWARD if backward else tiles.FORWARD)
    assert 1 <= cut.warps <= 16
    if cut.whole:
        assert cut.cells >= cells
        assert cut.elements >= elements
    else:
        parts_c = cut.parts // cut.parts_e
        assert (parts_c - 1) * cut.cells < cells <= parts_c * cut.cells
        part = cut.steps * cut.elements
        assert (cut.parts_e - 1) * part < elements <= cut.parts_e * part
        assert cut.parts <= cut.most_parts
        assert cut.most_parts * cut.groups <= tiles.MOST_PARTS
    for each in tiles.tiles_of_means(tiled, lengths, cut.most_parts, backward=backward):
        assert each.means * each.groups * each.most_parts <= max(tiles.SHARED, cut.most_parts)
        assert 1 <= each.warps <= 16
        number = each.name.partition("_mean")[2]
        own = means.runs(tiled, int(number)) if number else tiled.groups
        of_each = means.groups_of(tiled, int(number)) if number else []
        assert (each.programs - 1) * each.means < count(own) <= each.programs * each.means
        assert (each.steps - 1) * each.groups < count(of_each) <= each.steps * each.groups
    groups = count([i for i in tiled.groups if i not in lanes])
    assert (cut.workers - 1) * cut.turns * cut.groups < groups
    assert groups <= cut.workers * cut.turns * cut.groups


@pytest.mark.parametrize(
    ("kind", "shape", "order", "whole"),
    [
        ("layer", (8, 512, 4096), (0, 1, 2), (True, True)),
        ("layer", (8, 512, 16384), (0, 1, 2), (True, False)),
        ("batch", (32, 64, 56, 56), (0, 1, 2, 3), (False, False)),
        ("batch", (32, 64, 56, 56), (0, 2, 3, 1), (False, False)),
        ("batch", (32, 512, 7, 7), (0, 1, 2, 3), (True, True)),
        ("layer of channels", (32, 96, 56, 56), (0, 1, 2, 3), (True, True)),
        ("group", (32, 64, 56, 56), (0, 1, 2, 3), (False, False)),
    ],
)
def test_what_is_read_once(
    kind: str, shape: tuple[int, ...], order: tuple[int, ...], whole: tuple[bool, bool]
) -> None:
    tiled, lengths = tiled_of(kind, shape, order)
    found = [tiles.tile(tiled, lengths, 4, 132, backward=b) for b in (False, True)]
    assert tuple(cut is not None and cut.whole for cut in found) == whole


def test_neighbours_in_memory_are_read_together() -> None:
    """A line of memory is 128 bytes, and half of one where that makes enough programs."""
    for itemsize in (2, 4):
        tiled, lengths = tiled_of("batch", (32, 256, 14, 14), (0, 2, 3, 1))
        cut = tiles.tile(tiled, lengths, itemsize, 132, backward=True)
        assert cut is not None
        assert cut.groups * itemsize in (64, 128)


def test_double_precision_is_for_what_cancels() -> None:
    affine = "x[a b] over b; t0[b]; t1[b] fixed; centre = M; scale = "
    plain = ("t0*(V + 1.0e-5)**(-1/2)", "t0*(V + M**2)**(-1/2)", "1/Larger(Root(N*V), 1.0e-12)")
    exact = ("t0*(V - 0.5*M**2)**(-1/2)", "t0*(V + M)", "t0*(V + 1)**(-1/3)")
    assert [wants_double(parse(affine + scale)) for scale in plain] == [False] * 3
    assert [wants_double(parse(affine + scale)) for scale in exact] == [True] * 3
