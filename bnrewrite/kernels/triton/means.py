"""Means over groups: small kernels between the passes over the tensor.

Where a group needs the others, x is read by ``forward_moments`` and again by ``forward_apply``, and
a backward by ``backward_sums`` and ``backward_apply``. Between them, with some numbers per group:

    forward_mean0    puts the moments of parts together, keeps them, and makes the first mean
    forward_mean1    makes the next, of moments and of the means before it
    forward_groups   makes the coefficients and the updates of each group
    backward_mean1   puts the sums of parts together, keeps them, and makes what the last mean takes
    backward_mean0   makes what the mean before takes, of the sums and of what the later ones take
    backward_groups  makes what an element of dx, and what tensors, take of each group

A program has some means, and goes over their groups, always in the same order. All of this is in
double precision, as are the moments that are saved: a difference of statistics of different groups
keeps its digits. Behind the moments lie the means and the coefficients, for the backward; so the
large kernels have a few numbers of each group to read, and no formula of statistics.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy

from ..generated.gradients import slope
from .source import Tiled, indented

CONSTANTS = ("G", "E", "P")  # means, groups of each, parts of a group


def groups_of(tiled: Tiled, number: int) -> list[int]:
    """The loops over the groups that share a mean."""
    own = runs(tiled, number)
    return [loop for loop in tiled.groups if loop not in own]


def runs(tiled: Tiled, number: int) -> list[int]:
    """The loops along which a mean over groups runs."""
    return [loop for loop in tiled.groups if number in tiled.layout.loops[loop].means]


def taking(tiled: Tiled) -> list[int]:
    """The means that take a gradient, in the order in which it is known."""
    return [k for k in reversed(tiled.averages) if tiled.gradients.means[k] != 0]


def tensors_of_mean(tiled: Tiled, number: int, *, backward: bool) -> list[int]:
    """The tensors that a kernel reads: all that its value is made of."""
    return _within(tiled, [_value(tiled, number, backward)])


def forward_mean(tiled: Tiled, number: int) -> str:
    """One program has some means, of the groups that it goes over."""
    zero = tiled.program.about_zero
    first = number == 0
    parts = [*(["means"] if not zero else []), "spreads"] if first else []
    known = [
        *(_put_together(tiled) if first else tiled.statistics()),
        *_tensors(tiled, number, False),
        *loaded(tiled, number),
    ]
    numbers = ["parts", "width"] if first else []
    return _averaged(tiled, "forward", number, [*parts, "moments"], numbers, known)


def backward_mean(tiled: Tiled, number: int) -> str:
    """One program has what some means take, of the groups that it goes over."""
    first = number == taking(tiled)[0]
    value = _value(tiled, number, True)
    later = [k for k in tiled.averages if slope(k) in value.free_symbols]
    lines = [
        *tiled.statistics(),
        *_tensors(tiled, number, True),
        *loaded(tiled, len(tiled.averages)),
        *(_sums_kept(tiled) if first else sums_of_groups(tiled)),
        *slopes(tiled, later),
    ]
    names = ["moments", *(["sums"] if first else []), "totals", "slopes"]
    return _averaged(tiled, "backward", number, names, ["parts"] if first else [], lines)


def tensors_of_groups(tiled: Tiled, *, backward: bool) -> list[int]:
    """The tensors that the kernel of all groups reads."""
    values = [value for _, value in _of_groups(tiled, backward)]
    return _within(tiled, values)


def coefficients(tiled: Tiled, wanted: Sequence[str] | None = None) -> list[str]:
    """The coefficients of each group as the forward has made them; by default all."""
    groups, mask = tiled.count(tiled.groups), tiled.mask(cells=False)
    begin = _begin(tiled, len(tiled.averages), "moments")
    return [
        f"group = {tiled.flat(tiled.groups)} + 0 * g",
        *[
            f"{name} = tl.load(moments + {begin} + {place} * {groups} + group, mask={mask},"
            f" other=1.0).to({tiled.acc})"
            for place, name in enumerate(tiled.source.names())
            if wanted is None or name in wanted
        ],
    ]


def gradients_of_groups(tiled: Tiled) -> list[str]:
    """What an element of dx takes of its group."""
    groups, mask = tiled.count(tiled.groups), tiled.mask(cells=False)
    begin = _begin(tiled, len(tiled.averages), "slopes")
    lines = [
        f"{name} = tl.load(slopes + {begin} + {place} * {groups} + group, mask={mask},"
        f" other=0.0).to({tiled.acc})"
        for place, name in enumerate(("level", "along"))
    ]
    if not tiled.program.about_zero:
        lines.append(f"middle = tl.load(moments + group, mask={mask}, other=0.0).to({tiled.acc})")
    return lines


def forward_groups(tiled: Tiled) -> str:
    """One program has the coefficients and the updates of some groups."""
    groups, mask = tiled.count(tiled.groups), tiled.mask(cells=False)
    begin = _begin(tiled, len(tiled.averages), "moments")
    wanted = tensors_of_groups(tiled, backward=False)
    updates = [f"u{i}" for i in range(len(tiled.program.updates))]
    lines = [
        *tiled.group_indices("tl.program_id(0) * G", tiled.groups),
        *tiled.statistics(),
        *tiled.tensors(wanted, tiled.groups),
        *tiled.widened(wanted),
        *loaded(tiled, len(tiled.averages)),
        *tiled.of_group(_of_groups(tiled, False), "z"),
        *[
            f"tl.store(moments + {begin} + {place} * {groups} + group, {name}, mask={mask})"
            for place, name in enumerate(tiled.source.names())
        ],
        *[f"tl.store(updates{i} + group, {name}, mask={mask})" for i, name in enumerate(updates)],
    ]
    names = ["moments", *(f"updates{i}" for i in range(len(updates)))]
    arguments = [*names, *(f"t{i}_" for i in wanted)]
    return "\n".join([*tiled.signature("forward_groups", arguments, CONSTANTS), *indented(lines)])


def backward_groups(tiled: Tiled) -> str:
    """One program has what some groups give to dx and to tensors."""
    groups, mask = tiled.count(tiled.groups), tiled.mask(cells=False)
    begin = _begin(tiled, len(tiled.averages), "slopes")
    wanted = tensors_of_groups(tiled, backward=True)
    own = list(tiled.gradients.groups)
    made = ("dM / N", "2.0 * dV / N", *(f"take{i}" for i in own))
    places = [*(f"slopes + {begin} + {place} * {groups}" for place in range(2))]
    places += [f"own{i}" for i in own]
    lines = [
        *tiled.group_indices("tl.program_id(0) * G", tiled.groups),
        *tiled.statistics(),
        *tiled.tensors(wanted, tiled.groups),
        *tiled.widened(wanted),
        *loaded(tiled, len(tiled.averages)),
        *sums_of_groups(tiled),
        *slopes(tiled, taking(tiled)),
        *tiled.of_group(_of_groups(tiled, True), "z"),
        *[
            f"tl.store({place} + group, {value}, mask={mask})"
            for place, value in zip(places, made, strict=True)
        ],
    ]
    sums = "totals" if taking(tiled) else "sums"
    names = ["moments", sums, "slopes", *(f"own{i}" for i in own), *(f"t{i}_" for i in wanted)]
    head = tiled.signature("backward_groups", [*names, "parts"], CONSTANTS)
    return "\n".join([*head, *indented(lines)])


def _of_groups(tiled: Tiled, backward: bool) -> list[tuple[str, sympy.Expr]]:
    """What the kernel of all groups makes."""
    if backward:
        made = tiled.gradients
        own = ((f"take{i}", value) for i, value in made.groups.items())
        return [("dM", made.mean), ("dV", made.variance), *own]
    updates = ((f"u{i}", value) for i, value in enumerate(tiled.program.updates))
    return [*tiled.source.named(), *updates]


def _within(tiled: Tiled, values: Sequence[sympy.Expr]) -> list[int]:
    """The tensors inside some values."""
    symbols = {symbol for value in values for symbol in value.free_symbols}
    every = range(len(tiled.program.tensors))
    return [i for i in every if tiled.program.symbol(i) in symbols]


def loaded(tiled: Tiled, count: int) -> list[str]:
    """The first means, as each group has them."""
    return [
        f"m{k} = tl.load(moments + {_place(tiled, k, 'moments')} + 0 * g,"
        f" mask={tiled.mask(cells=False)}, other=1.0)"
        for k in range(count)
    ]


def slopes(tiled: Tiled, numbers: Sequence[int]) -> list[str]:
    """What means take, over the number of their groups, as each group has it."""
    return [
        f"{slope(k)} = tl.load(slopes + {_place(tiled, k, 'slopes')} + 0 * g,"
        f" mask={tiled.mask(cells=False)}, other=0.0)"
        for k in numbers
    ]


def sums_of_parts(tiled: Tiled) -> list[str]:
    """The sums of each group, of those of its parts."""
    groups, mask = tiled.count(tiled.groups), tiled.mask("p < parts", cells=False)
    return [
        "p = tl.arange(0, P)[None, :, None]",
        *[
            f"{s.symbol} = tl.sum(tl.load(sums + ({k} * parts + p) * {groups} + group, mask={mask},"
            " other=0.0), 1, keep_dims=True)"
            for k, s in enumerate(tiled.gradients.sums)
        ],
    ]


def sums_of_groups(tiled: Tiled) -> list[str]:
    """The sums of each group, where a mean has put those of its parts together."""
    if not taking(tiled):
        return sums_of_parts(tiled)
    groups, mask = tiled.count(tiled.groups), tiled.mask(cells=False)
    return [
        f"{s.symbol} = tl.load(totals + {k} * {groups} + group, mask={mask}, other=0.0)"
        for k, s in enumerate(tiled.gradients.sums)
    ]


def _sums_kept(tiled: Tiled) -> list[str]:
    """The sums of each group from those of its parts, and kept."""
    groups, mask = tiled.count(tiled.groups), tiled.mask(cells=False)
    return [
        *sums_of_parts(tiled),
        *[
            f"tl.store(totals + {k} * {groups} + group, {s.symbol}, mask={mask})"
            for k, s in enumerate(tiled.gradients.sums)
        ],
    ]


def _averaged(
    tiled: Tiled,
    direction: str,
    number: int,
    given: Sequence[str],
    numbers: Sequence[str],
    known: Sequence[str],
) -> str:
    """A kernel that makes a mean.

    Args:
        tiled: the program.
        direction: forward or backward.
        number: of the mean.
        given: pointers, but for tensors; the last to where the means lie.
        numbers: further arguments.
        known: what a group knows.
    """
    backward, made = direction == "backward", given[-1]
    own, shared = runs(tiled, number), groups_of(tiled, number)
    tensors = [f"t{i}_" for i in tensors_of_mean(tiled, number, backward=backward)]
    begin = _begin(tiled, number, made)
    body = [
        "program = " + tiled.index("tl.program_id(0)"),
        f"at = program * G + {tiled.index('tl.arange(0, G)[:, None, None]')}",
        *tiled.decoded(own, "at"),
        "total = tl.zeros([G, 1, E], tl.float64)",
        "for step in range(steps):",
        *indented(
            [
                f"e = step * E + {tiled.index('tl.arange(0, E)[None, None, :]')}",
                *tiled.decoded(shared, "e"),
                "g = at + 0 * e",
                f"in_g = (at < {tiled.count(own)}) & (e < {tiled.count(shared)})",
                *known,
                *tiled.of_group([("value", _value(tiled, number, backward))], "z"),
                "total += tl.where(in_g, value, 0.0)",
            ]
        ),
        f"made = tl.sum(total, 2, keep_dims=True) / tl.cast({tiled.count(shared)}, tl.float64)",
        f"tl.store({made} + {begin} + at, made, mask=at < {tiled.count(own)})",
    ]
    arguments = [*given, *tensors, "steps", *numbers]
    head = tiled.signature(f"{direction}_mean{number}", arguments, CONSTANTS)
    return "\n".join([*head, *indented(body)])


def _put_together(tiled: Tiled) -> list[str]:
    """M and V of each group from those of its parts, and kept."""
    groups, length = tiled.count(tiled.groups), tiled.count(tiled.elements)
    mask, one = tiled.mask("p < parts", cells=False), tiled.mask(cells=False)
    lines = [
        f"group = {tiled.flat(tiled.groups)} + 0 * g",
        "p = tl.arange(0, P)[None, :, None]",
        f"s = tl.load(spreads + p * {groups} + group, mask={mask}, other=0.0)",
        f"n = tl.cast({length}, tl.float64)",
    ]
    if tiled.program.about_zero:
        return [
            *lines,
            "V = tl.sum(s, 1, keep_dims=True) / n",
            f"tl.store(moments + group, V, mask={one})",
        ]
    return [
        *lines,
        f"m = tl.load(means + p * {groups} + group, mask={mask}, other=0.0)",
        f"k = tl.where({mask}, tl.cast(tl.minimum({length} - p * width, width), tl.float64), 0.0)",
        "M = tl.sum(k * m, 1, keep_dims=True) / n",
        "V = tl.sum(s + k * (m - M) * (m - M), 1, keep_dims=True) / n",
        f"tl.store(moments + group, M, mask={one})",
        f"tl.store(moments + {groups} + group, V, mask={one})",
    ]


def _tensors(tiled: Tiled, number: int, backward: bool) -> list[str]:
    """The tensors of a group that a mean is made of."""
    wanted = tensors_of_mean(tiled, number, backward=backward)
    return [*tiled.tensors(wanted, tiled.groups), *tiled.widened(wanted)]


def _value(tiled: Tiled, number: int, backward: bool) -> sympy.Expr:
    """What a mean is made of; back, what a group has for it."""
    if backward:
        return tiled.gradients.means[number]
    return tiled.program.means[number].value


def _place(tiled: Tiled, number: int, name: str) -> str:
    """Where the mean of a group lies."""
    return f"{_begin(tiled, number, name)} + ({tiled.flat(runs(tiled, number))})"


def _begin(tiled: Tiled, number: int, name: str) -> str:
    """Where a mean begins: behind the moments, where it lies with them, and those before it."""
    before = [tiled.count(runs(tiled, k)) for k in range(number)]
    if name == "moments":
        before += [tiled.count(tiled.groups)] * tiled.moments
    return f"({' + '.join(before) or '0'})"
