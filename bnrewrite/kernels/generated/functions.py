"""The source of the functions that activations are made of."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import mpmath

from .activations import FAR, Normal

FOLDER = Path(__file__).parent
FUNCTIONS, NORMAL = ((FOLDER / name).read_text() for name in ("functions.h", "normal.h"))
MIDDLE = 3.75
NODES = 64


@cache
def functions_source(formula: Any, single: str) -> str:
    """What a formula of z is made of: exponentials, and the normal distribution if it has that."""
    source = f"constexpr acc FAR_OUT = {FAR};\n{FUNCTIONS}"
    if not formula.has(Normal):
        return source
    terms = map(repr, tail_series(2.0 ** (-27 if single == "float" else -56)))
    series = ", ".join(f"acc({term})" for term in terms)
    return f"{source}constexpr acc MIDDLE = {MIDDLE!r}, SERIES[] = {{{series}}};\n{NORMAL}"


def tail_series(bound: float) -> list[float]:
    """An even number of factors of the powers of t in ``(x + k) exp(x^2) erfc(x)``, x >= 0.

    Chebyshev's series in ``t = (x - k) / (x + k)``, the map of Shepherd and Laframboise
    (Mathematics of Computation 36, 1981, 249 to 253); its terms fall so fast that the powers lose
    no digits.

    Args:
        bound: the least term of the series that is kept.
    """
    with mpmath.workdps(40):
        angles = [mpmath.pi * (j + mpmath.mpf(1) / 2) / NODES for j in range(NODES)]
        places = [MIDDLE * (1 + mpmath.cos(a)) / (1 - mpmath.cos(a)) for a in angles]
        values = [(x + MIDDLE) * mpmath.exp(x * x) * mpmath.erfc(x) for x in places]
        terms = [
            2
            * mpmath.fsum(v * mpmath.cos(k * a) for v, a in zip(values, angles, strict=True))
            / NODES
            for k in range(NODES)
        ]
        terms[0] /= 2
        while abs(terms[-1]) < bound or len(terms) % 2:
            terms.pop()
        found = [mpmath.mpf(0)] * len(terms)
        before, power = [mpmath.mpf(0)], [mpmath.mpf(1)]  # of Chebyshev's polynomials
        for number, term in enumerate(terms):
            for place, factor in enumerate(power):
                found[place] += term * factor
            double = 1 if number == 0 else 2
            after = [mpmath.mpf(0), *(double * factor for factor in power)]
            for place, factor in enumerate(before):
                after[place] -= factor
            before, power = power, after
        return [float(value) for value in found]
