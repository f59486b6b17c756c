"""Turns printed kernels into functions that Triton compiles, once for each text."""

from __future__ import annotations

import hashlib
import linecache
from functools import cache
from typing import Any

import triton
import triton.language

from .backward import backward, backward_apply, backward_sums
from .forward import forward, forward_apply, forward_moments
from .means import backward_groups, backward_mean, forward_groups, forward_mean
from .source import Tiled

PRINTERS = {
    each.__name__: each
    for each in (
        forward,
        forward_moments,
        forward_groups,
        forward_apply,
        backward,
        backward_sums,
        backward_groups,
        backward_apply,
    )
}
MEANS = {each.__name__: each for each in (forward_mean, backward_mean)}


@cache
def kernel(tiled: Tiled, name: str) -> Any:
    """A kernel of a program: what ``triton.jit`` makes of it.

    Triton, and Inductor where it takes a kernel over, read the text of the function again: it is
    left where ``inspect`` looks for the lines of what is no file.

    Args:
        tiled: the program.
        name: one of ``PRINTERS``, or of ``MEANS`` and the number of a mean.

    Raises:
        Unprintable: the formula has no kernel.
    """
    kind = name.rstrip("0123456789")
    number = name.removeprefix(kind)
    text = (MEANS[kind](tiled, int(number)) if number else PRINTERS[kind](tiled)) + "\n"
    path = f"<bnrewrite {name} {hashlib.sha256(text.encode()).hexdigest()[:16]}>"
    linecache.cache[path] = (len(text), None, text.splitlines(keepends=True), path)
    names: dict[str, Any] = {"triton": triton, "tl": triton.language, "__name__": __name__}
    exec(compile(text, path, "exec"), names)
    return names[name]
