"""The forward: moments, and y with what else the text makes of them.

Three kernels of which a program uses one, or the other two:

    forward           a tile has whole groups: x is read once
    forward_moments   each program has a part of the elements of some groups, and the moments of it
    forward_apply     each program puts the moments of the parts together, and writes its part of y

In a part, every place of the tile keeps moments of its own by Welford's recurrence, of distances
from the first element of the group, so that means far from zero cost no digits:

    mean' = mean (1 - 1/k) + d / k        spread' = spread + (d - mean) (d - mean')

(as a weighted mean, which is infinite, not NaN, where a value is). Places, and then parts, are put
together at once: with n_i elements, mean m_i and spread s_i in each,

    m = sum n_i m_i / n                   s = sum s_i + n_i (m_i - m)^2

Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample
variances", 1979, equation 2.1, for more than two samples.
"""

from __future__ import annotations

from ..generated.program import Program
from .activations import activated
from .formulas import of_elements
from .means import coefficients
from .source import Tiled, indented


def given(program: Program, *names: str) -> list[str]:
    """Pointers: x, the residual, y, the moments, the updates, more, and the tensors."""
    residual = ["residual"] if program.residual else []
    updates = [f"updates{i}" for i in range(len(program.updates))]
    tensors = [f"t{i}_" for i in range(len(program.tensors))]
    return ["x", *residual, "y", "moments", *updates, *names, *tensors]


def forward(tiled: Tiled) -> str:
    """One program has some whole groups."""
    count = tiled.count([*tiled.cells, *tiled.elements])
    lines = [
        "block = " + tiled.index("tl.program_id(0)"),
        *tiled.group_indices("block * G", tiled.groups),
        *tiled.cell_indices("0"),
        *tiled.element_indices("0"),
        f"value = tl.load(x + at, mask=inside, other=0.0).to({tiled.acc})",
        f"n = tl.cast({count}, {tiled.acc})",
    ]
    if tiled.program.about_zero:
        lines.append(f"V = {_summed('value * value')} / n")
    else:
        lines += [
            f"M = {_summed('value')} / n",
            "d = tl.where(inside, value - M, 0.0)",
            f"V = {_summed('d * d')} / n",
        ]
    lines += [
        *_of_groups(tiled),
        *_stored(tiled),
        *_written(tiled),
    ]
    head = tiled.signature("forward", given(tiled.program), ("G", "C", "E"))
    return "\n".join([*head, *indented(lines)])


def forward_moments(tiled: Tiled) -> str:
    """One program has the moments of a part of some groups."""
    zero, one = tiled.program.about_zero, tiled.mask(cells=False)
    groups = tiled.count(tiled.groups)
    lines = [
        *part_indices(tiled),
        "spread = tl.zeros([G, C, E], " + tiled.acc + ")",
    ]
    if not zero:
        lines += [
            *_pivot(tiled),
            "mean = tl.zeros([G, C, E], " + tiled.acc + ")",
        ]
    lines += [
        *tiled.cell_indices("part_c * C"),
        "for step in range(steps):",
        *indented(tiled.element_indices("begin + step * E")),
        f"    value = tl.load(x + at, mask=inside, other=0.0).to({tiled.acc})",
    ]
    kind = f"tl.{tiled.of_parts}"
    if zero:
        lines += ["    spread += value * value", f"total = {_summed(f'spread.to({kind})')}"]
    else:
        lines += [
            f"    rate = 1.0 / tl.cast(step + 1, {tiled.acc})",
            "    d = value - first",
            "    new = mean * (1.0 - rate) + d * rate",
            "    spread += tl.where(inside, (d - mean) * (d - new), 0.0)",
            "    mean = tl.where(inside, new, mean)",
            "lane = tl.arange(0, E)[None, None, :] + 0 * c",
            f"k = tl.cast((tl.minimum({_length(tiled)} - begin, steps * E) - lane + E - 1) // E, "
            f"{kind})",
            *(["k = tl.where(in_c, k, 0.0)"] if tiled.cells else []),
            "n = tl.sum(tl.sum(k, 2, keep_dims=True), 1, keep_dims=True)",
            f"m = {_summed('k * mean')} / n",
            "d = mean - m",
            f"total = {_summed('spread + k * d * d')}",
            *(["m = first + m"] if tiled.averages else []),
            f"tl.store(means + part * {groups} + g, m, mask={one})",
        ]
    lines.append(f"tl.store(spreads + part * {groups} + g, total, mask={one})")
    names = ["x", *(["means"] if not zero else []), "spreads", *PARTS]
    head = tiled.signature("forward_moments", names, ("G", "C", "E"))
    return "\n".join([*head, *indented(lines)])


PARTS = ("steps", "parts", "parts_e")


def forward_apply(tiled: Tiled) -> str:
    """One program puts the moments of parts together, and writes its own part."""
    partial = [*(["means"] if not tiled.program.about_zero else []), "spreads"]
    known = [
        *_put_together(tiled),
        *tiled.cell_indices("part_c * C"),
        *_of_groups(tiled),
        "if part == 0:",
        *indented(_stored(tiled)),
    ]
    if tiled.averages:  # where all of this is known
        known = [*tiled.cell_indices("0"), *coefficients(tiled)]
    lines = [
        *part_indices(tiled),
        *known,
        "for step in range(steps):",
        *indented(tiled.element_indices("begin + step * E")),
        f"    value = tl.load(x + at, mask=inside, other=0.0).to({tiled.acc})",
        *indented(_written(tiled)),
    ]
    names = given(tiled.program, *partial)
    if tiled.averages:
        names = ["x", *(["residual"] if tiled.program.residual else []), "y", "moments"]
    head = tiled.signature("forward_apply", [*names, *PARTS], ("G", "C", "E", "P"))
    return "\n".join([*head, *indented(lines)])


def _put_together(tiled: Tiled) -> list[str]:
    """M and V of each group from those of its parts."""
    groups = tiled.count(tiled.groups)
    mask = tiled.mask("p < parts", cells=False)
    count = tiled.count([*tiled.cells, *tiled.elements])
    lines = [
        "p = tl.arange(0, P)[None, :, None]",
        f"s = tl.load(spreads + p * {groups} + g, mask={mask}, other=0.0)",
        f"n = tl.cast({count}, {tiled.acc})",
    ]
    if tiled.program.about_zero:
        return [*lines, "V = tl.sum(s, 1, keep_dims=True) / n"]
    return [
        *lines,
        *_pivot(tiled),
        f"m = tl.load(means + p * {groups} + g, mask={mask}, other=0.0)",
        f"k = tl.minimum({tiled.count(tiled.cells)} - (p // parts_e) * C, C)"
        f" * tl.minimum({_length(tiled)} - (p % parts_e) * (steps * E), steps * E)",
        f"k = tl.where({mask}, tl.cast(k, {tiled.acc}), 0.0)",
        "middle = tl.sum(k * m, 1, keep_dims=True) / n",
        "M = first + middle",
        "V = tl.sum(s + k * (m - middle) * (m - middle), 1, keep_dims=True) / n",
    ]


def part_indices(tiled: Tiled) -> list[str]:
    """The groups of a program, and its part of them."""
    return [
        "program = " + tiled.index("tl.program_id(0)"),
        "part = program % parts",
        *tiled.group_indices("(program // parts) * G", tiled.groups),
        "part_c = part // parts_e",
        "begin = (part % parts_e) * (steps * E)",
    ]


def _pivot(tiled: Tiled) -> list[str]:
    """The first element of each group; zero where it is not finite."""
    mask = tiled.mask(cells=False)
    return [
        f"first_at = {tiled.offset(first=True)} + 0 * g",
        f"first = tl.load(x + first_at, mask={mask}, other=0.0).to({tiled.acc})",
        "first = tl.where(tl.abs(first) < float('inf'), first, 0.0)",
    ]


def _length(tiled: Tiled) -> str:
    return tiled.count(tiled.elements)


def _summed(value: str) -> str:
    """Over a group."""
    return f"tl.sum(tl.sum({value}, 2, keep_dims=True), 1, keep_dims=True)"


def _of_groups(tiled: Tiled) -> list[str]:
    """The coefficients and updates of each group."""
    program = tiled.program
    every = range(len(program.tensors))
    named = [*tiled.source.named(), *((f"u{i}", u) for i, u in enumerate(program.updates))]
    saved = ["saved_V = V"] if program.about_zero else ["saved_M, saved_V = M, V"]
    return [
        *saved,
        *tiled.tensors([*every], tiled.groups),
        *tiled.widened([*every]),
        *tiled.of_group(named, "z"),
        *tiled.narrowed([name for name, _ in named]),
    ]


def _stored(tiled: Tiled) -> list[str]:
    """Moments and updates."""
    mask, every = tiled.mask(cells=False), tiled.count(tiled.groups)
    names = ["saved_V"] if tiled.program.about_zero else ["saved_M", "saved_V"]
    lines = [
        f"tl.store(moments + {place} * {every} + g, {name}, mask={mask})"
        for place, name in enumerate(names)
    ]
    return lines + [
        f"tl.store(updates{place} + g, u{place}, mask={mask})"
        for place in range(len(tiled.program.updates))
    ]


def _written(tiled: Tiled) -> list[str]:
    """An element of y."""
    scale, shift = tiled.source.affine(of_elements)
    u = "(value - centre)" if tiled.source.has_centre else "value"
    made = f"({scale}) * {u}" + (f" + ({shift})" if shift else "")
    lines = [f"made = {made}"]
    if tiled.program.residual:
        lines.append(f"made += tl.load(residual + at, mask=inside, other=0.0).to({tiled.acc})")
    result = activated(tiled.program.activation, tiled.single)
    return [*lines, *result, "tl.store(y + at, result, mask=inside)"]
