"""Whether a program has kernels, before one is asked for."""

from __future__ import annotations

from functools import cache

from .activations import activation
from .gradients import gradients
from .printing import Unprintable, of_elements
from .program import parse


@cache
def check_program(text: str) -> str | None:
    """Why a program has no kernels; None if it has."""
    program = parse(text)
    if program.residual and not may_follow_residual(program.activation):
        return "an activation of a sum whose slope its result does not tell"
    inner = {program.symbol(i) for i in range(len(program.tensors)) if program.inside(i)}
    values = [*program.scale, *program.shift]
    groups = [*program.of_groups(), *program.updates]
    if any(t.element.free_symbols - inner for t in values):
        return "a function of a statistic and of a tensor inside its group"
    if any(value.free_symbols & inner for value in groups):
        return "a statistic of a tensor inside its group"
    if program.means and inner:
        return "a mean over groups, and a tensor inside a group"
    made = gradients(text)
    elements = [t.element for t in values] + [s.element for s in made.sums]
    elements += [e for slopes in made.inside.values() for part in slopes for _, e in part]
    try:
        for element in elements:
            of_elements(element)
    except Unprintable as reason:
        return str(reason)
    return None


def may_follow_residual(text: str) -> bool:
    """Whether an activation is known by its result, which torch keeps for the backward too."""
    found = activation(text)
    return found is not None and found.of_result


def never_kept(text: str) -> frozenset[int]:
    """The numbers of the tensors that no backward keeps: it reads copies, or none."""
    return parse(text).fixed
