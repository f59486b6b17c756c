"""What is done with an element, in rows and in columns alike."""

from __future__ import annotations

from .printing import Source


class Element:
    """An element of x, what is made of it, and the gradients that come back.

    Args:
        source: what is printed.
        at: where the element lies.
        affine: A and B, as the element reads them.
        ending: of the names of the values of its group.
    """

    def __init__(self, source: Source, at: str, affine: tuple[str, str], ending: str = "") -> None:
        self.source = source
        self.at = at
        self.scale, self.shift = affine
        self.ending = ending
        about_mean = not source.program.about_zero and source.centred_at_mean
        self.distance = "u" if about_mean else "value"  # from the mean, of which V is about
        self.needs_mean = not source.program.about_zero and not about_mean

    def forward(self) -> list[str]:
        """Read x, write y."""
        made = self._made()
        if self.source.program.residual:
            made += f" + load<V>(residual + {self.at})"
        return [
            *self._read(),
            f"const V made = {made};",
            f"store(y + {self.at}, V({self.source.activated('made')}));",
        ]

    def backward(self) -> list[str]:
        """Read x and dy: u, the cotangent g behind the activation, and g u."""
        lines, program = self._read(), self.source.program
        if program.activation:
            made = f"load<V>(y + {self.at})" if program.residual else self._made()
            lines += [
                f"const V made = {made};",
                f"V g = load<V>(dy + {self.at});",
                f"g = {self.source.masked('made')};",
            ]
        else:
            lines.append(f"const V g = load<V>(dy + {self.at});")
        return [*lines, "const V gu = g * u; (void)gu;"]

    def input_gradient(self) -> str:
        """Write dx, from level = dM / N and along = 2 dV / N."""
        distance = f"(value - middle{self.ending})" if self.needs_mean else self.distance
        return (
            f"store(dx + {self.at},"
            f" V(({self.scale}) * g + level{self.ending} + along{self.ending} * {distance}));"
        )

    def residual_gradient(self) -> list[str]:
        """Write that of the residual, where there is one."""
        return [f"store(dresidual + {self.at}, V(g));"] if self.source.program.residual else []

    def fetched(self, *tensors: str) -> list[str]:
        """Ask for what is read a while later."""
        return [f"__builtin_prefetch({tensor} + {self.at} + ahead);" for tensor in tensors]

    def _read(self) -> list[str]:
        u = f"value - centre{self.ending}" if self.source.has_centre else "value"
        return [f"const V value = load<V>(x + {self.at});", f"const V u = {u};"]

    def _made(self) -> str:
        shift = f" + ({self.shift})" if self.shift else ""
        return f"({self.scale}) * u{shift}"
