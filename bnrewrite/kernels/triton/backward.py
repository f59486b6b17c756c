"""The backward: the gradients of x, of the residual, and what tensors take of groups and cells.

With g the cotangent behind the activation and u = x - centre, the sums of g and of g u over the
elements of a cell are enough: a sum over a group is one over its cells, of these times what the
formula has there, and what a tensor takes in a cell is a multiple of these (``gradients.py`` of
``kernels.generated`` says which). Three kernels, of which a program uses one, or the other two:

    backward        a tile has whole groups: x and the cotangent are read once
    backward_sums   each program has the sums of a part of the elements of some groups
    backward_apply  each program puts the sums of the parts together, and writes its part of dx

What tensors take in cells is added up over the groups that a program goes through, ``turns`` of
them; what is left, one number per program, is added up by the caller, always in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy

from ..generated.program import Program
from .activations import differentiated
from .formulas import of_elements
from .forward import PARTS, part_indices
from .means import coefficients, gradients_of_groups, sums_of_parts
from .source import Tiled, indented


def given(tiled: Tiled, *names: str) -> list[str]:
    """Pointers: the cotangent, x, y of a residual, the moments, more, and the tensors.

    Where there are means over groups, coefficients lie behind the moments, and no tensor is read.
    """
    y = ["y"] if tiled.program.residual and tiled.program.activation else []
    tensors = [] if tiled.averages else [f"t{i}_" for i in tiled.read]
    return ["dy", "x", *y, "moments", *names, *tensors]


def made_by_groups(tiled: Tiled) -> list[str]:
    """Pointers: the gradients of tensors that are constant in a group, for each group."""
    return [f"own{i}" for i in tiled.gradients.groups]


def made_by_cells(tiled: Tiled) -> list[str]:
    """Pointers: the gradients of tensors that vary in a group, for each program and cell."""
    return [f"cells{i}" for i in tiled.summed]


def residual(program: Program) -> list[str]:
    """Pointers: the gradient of the residual."""
    return ["dresidual"] if program.residual else []


def backward(tiled: Tiled) -> str:
    """One program has some whole groups, and goes on to more of them."""
    lines = [
        *_turns(tiled),
        *tiled.element_indices("0"),
        *_statistics(tiled, tiled.others),
        *_read(tiled),
        *_sums_of_cells("d", "d * u"),
        *_sums_of_group(tiled),
        *_own(tiled),
        *_input_gradient(tiled),
        *_of_cells(tiled),
    ]
    names = ["dx", *residual(tiled.program), *made_by_groups(tiled), *made_by_cells(tiled)]
    head = tiled.signature("backward", [*given(tiled, *names), "turns"], ("G", "C", "E"))
    body = [
        "program = " + tiled.index("tl.program_id(0)"),
        f"lane = program % {tiled.count(tiled.lanes)}",
        f"worker = program // {tiled.count(tiled.lanes)}",
        *tiled.decoded(tiled.lanes, "lane"),
        *tiled.cell_indices("0"),
        *[f"sum{i} = tl.zeros([1, C, 1], {tiled.acc})" for i in tiled.summed],
        "for turn in range(turns):",
        *indented(lines),
        *_stored_cells(tiled, "worker"),
    ]
    return "\n".join([*head, *indented(body)])


def backward_sums(tiled: Tiled) -> str:
    """One program has the sums of a part of some groups, and goes on to more of them."""
    groups = tiled.count(tiled.groups)
    lines = [
        *_turns(tiled),
        *_statistics(tiled, tiled.others),
        *[f"lane_d{k} = tl.zeros([G, C, E], {tiled.acc})" for k in range(2)],
        "for step in range(steps):",
        *indented(tiled.element_indices("begin + step * E")),
        *indented(_read(tiled)),
        "    lane_d0 += d",
        "    lane_d1 += d * u",
        *_sums_of_cells(*(f"lane_d{k}.to(tl.{tiled.of_parts})" for k in range(2))),
        *_sums_of_group(tiled),
        *[
            f"tl.store(sums + ({k} * parts + part) * {groups} + group, {s.symbol},"
            f" mask={tiled.mask(cells=False)})"
            for k, s in enumerate(tiled.gradients.sums)
        ],
        *_of_cells(tiled),
    ]
    names = [*residual(tiled.program), *made_by_cells(tiled), "sums"]
    head = tiled.signature(
        "backward_sums", [*given(tiled, *names), "turns", *PARTS], ("G", "C", "E")
    )
    body = [
        "program = " + tiled.index("tl.program_id(0)"),
        "part = program % parts",
        f"lane = (program // parts) % {tiled.count(tiled.lanes)}",
        f"worker = (program // parts) // {tiled.count(tiled.lanes)}",
        *tiled.decoded(tiled.lanes, "lane"),
        "part_c = part // parts_e",
        "begin = (part % parts_e) * (steps * E)",
        *tiled.cell_indices("part_c * C"),
        *[f"sum{i} = tl.zeros([1, C, 1], {tiled.acc})" for i in tiled.summed],
        "for turn in range(turns):",
        *indented(lines),
        *_stored_cells(tiled, "(worker * parts_e + part % parts_e)"),
    ]
    return "\n".join([*head, *indented(body)])


def backward_apply(tiled: Tiled) -> str:
    """One program puts the sums of parts together, and writes its own part of dx."""
    own = [] if tiled.averages else made_by_groups(tiled)
    lines = [
        *part_indices(tiled),
        *tiled.cell_indices("part_c * C"),
        *_statistics(tiled, tiled.groups),
        *(gradients_of_groups(tiled) if tiled.averages else _of_sums(tiled)),
        *(["if part == 0:", *indented(_stored_own(tiled))] if own else []),
        "for step in range(steps):",
        *indented(tiled.element_indices("begin + step * E")),
        *indented(_read(tiled, residual=False)),
        *indented(_input_gradient(tiled)),
    ]
    known = "slopes" if tiled.averages else "sums"
    head = tiled.signature(
        "backward_apply", [*given(tiled, "dx", *own, known), *PARTS], ("G", "C", "E", "P")
    )
    return "\n".join([*head, *indented(lines)])


def _turns(tiled: Tiled) -> list[str]:
    """The groups of a turn: of one lane, where tensors vary along lanes and inside a group."""
    return tiled.group_indices("(worker * turns + turn) * G", tiled.others)


def _statistics(tiled: Tiled, loops: Sequence[int]) -> list[str]:
    """Moments, tensors, and the coefficients of each group."""
    program, firm = tiled.program, tiled.read
    shift = tiled.masks
    named = tiled.source.named(shift=shift)
    if tiled.averages:
        return coefficients(tiled, [name for name, _ in named])
    places = {place for _, second in tiled.gradients.inside.values() for place, _ in second}
    if not shift:
        named += [
            (f"b{i}", term.group)
            for i, term in enumerate(program.shift)
            if i in places and term.group != 1
        ]
    return [
        *tiled.statistics(),
        *tiled.tensors(firm, loops),
        *tiled.widened(firm),
        *tiled.of_group(named, "z"),
        *tiled.narrowed([name for name, _ in named]),
    ]


def _read(tiled: Tiled, *, residual: bool = True) -> list[str]:
    """u, and the cotangent behind the activation, of an element."""
    program, acc = tiled.program, tiled.acc
    lines = [
        f"value = tl.load(x + at, mask=inside, other=0.0).to({acc})",
        f"u = {'value - centre' if tiled.source.has_centre else 'value'}",
        f"d = tl.load(dy + at, mask=inside, other=0.0).to({acc})",
    ]
    if program.activation:
        if program.residual:
            lines.append(f"made = tl.load(y + at, mask=inside, other=0.0).to({acc})")
        else:
            scale, shift = tiled.source.affine(of_elements)
            lines.append(f"made = ({scale}) * u" + (f" + ({shift})" if shift else ""))
        lines += differentiated(program.activation, tiled.single)
    if program.residual and residual:
        lines.append("tl.store(dresidual + at, d, mask=inside)")
    return lines


def _sums_of_cells(cotangent: str, product: str) -> list[str]:
    return [
        f"d0 = tl.sum({cotangent}, 2, keep_dims=True)",
        f"d1 = tl.sum({product}, 2, keep_dims=True)",
    ]


def _sums_of_group(tiled: Tiled) -> list[str]:
    lines = []
    for each in tiled.gradients.sums:
        value = f"d{each.degree}"
        if each.element != 1:
            value = f"({of_elements(each.element)}) * {value}"
        if tiled.cells:
            value = f"tl.where(in_c, {value}, 0.0)"
        lines.append(f"{each.symbol} = tl.sum({value}, 1, keep_dims=True)")
    return lines


def _of_group(tiled: Tiled) -> list[str]:
    """What an element of dx, and what tensors, take of a group."""
    made = tiled.gradients
    named: list[tuple[str, sympy.Expr]] = [("dM", made.mean), ("dV", made.variance)]
    named += [(f"take{i}", value) for i, value in made.groups.items()]
    return [
        *tiled.of_group(named, "w", wide=False),
        *tiled.narrowed([name for name, _ in named[2:]]),
        f"level = (dM / N).to({tiled.acc})",
        f"along = (2.0 * dV / N).to({tiled.acc})",
    ]


def _of_sums(tiled: Tiled) -> list[str]:
    """The same from the sums of parts."""
    return [*sums_of_parts(tiled), *_of_group(tiled)]


def _own(tiled: Tiled) -> list[str]:
    return [*_of_group(tiled), *_stored_own(tiled)]


def _stored_own(tiled: Tiled) -> list[str]:
    mask = tiled.mask(cells=False)
    return [f"tl.store(own{i} + group, take{i}, mask={mask})" for i in tiled.gradients.groups]


def _input_gradient(tiled: Tiled) -> list[str]:
    scale, _ = tiled.source.affine(of_elements)
    made = f"({scale}) * d"
    if tiled.gradients.mean != 0:
        made += " + level"
    if tiled.gradients.variance != 0:  # zero times the distance of an infinite x would be NaN
        made += " + along * " + ("value" if tiled.program.about_zero else "(value - middle)")
    return [f"tl.store(dx + at, {made}, mask=inside)"]


def _of_cells(tiled: Tiled) -> list[str]:
    """What the tensors inside a group take, added to that of other groups."""
    lines = []
    mask = tiled.mask()
    for i in tiled.summed:
        first, second = tiled.gradients.inside[i]
        parts = _slopes("a", "d1", first, tiled.program.scale)
        parts += _slopes("b", "d0", second, tiled.program.shift)
        value = " + ".join(parts)
        lines.append(f"sum{i} += tl.sum(tl.where({mask}, {value}, 0.0), 0, keep_dims=True)")
    return lines


def _slopes(
    letter: str, total: str, slopes: Sequence[tuple[int, sympy.Expr]], terms: Sequence[object]
) -> list[str]:
    parts = []
    for place, slope in slopes:
        factors = [total]
        if getattr(terms[place], "group", 1) != 1:
            factors.append(f"{letter}{place}")
        if slope != 1:
            factors.append(f"({of_elements(slope)})")
        parts.append(" * ".join(factors))
    return parts


def _stored_cells(tiled: Tiled, worker: str) -> list[str]:
    lanes, cells = tiled.count(tiled.lanes), tiled.count(tiled.cells)
    mask = "in_c" if tiled.cells else "c == 0"
    return [
        f"tl.store(cells{i} + ({worker} * {lanes} + lane) * {cells} + c, sum{i}, mask={mask})"
        for i in tiled.summed
    ]
