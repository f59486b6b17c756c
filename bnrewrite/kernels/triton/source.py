"""What all kernels of a program have in common: indices of a tile, and a norm's values in it.

A tile has three dimensions, of which some may have one element:

    groups    the loops that are not reduced
    cells     the reduced loops along which a tensor of the program runs
    elements  the other reduced loops: the tensors of the program are constant along them

So a layer norm has cells and no elements, a batch norm elements and no cells, a group norm both. A
sum over a group is a sum over the elements of each cell, times what the formula has there, summed
over the cells. A kernel knows the lengths of its loops when it is compiled, but for the outermost,
and for those that are known only when it runs: divisions by them are then multiplications.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import sympy

from ..generated.gradients import Gradients, gradients
from ..generated.layout import Layout
from ..generated.printing import Source
from ..generated.program import M, Ms, Program, V, Vs, parse
from .formulas import of_groups, wants_double


@dataclass(frozen=True)
class Tiled:
    """What kernels are printed from.

    Attributes:
        text: the program.
        layout: its loops over a tensor in memory.
        fixed: the loops whose length is known when a kernel is compiled.
        single: the type that is computed in, "float32" or "float64".
        wide: elements are counted in 64 bits.
    """

    text: str
    layout: Layout
    fixed: frozenset[int]
    single: str
    wide: bool

    @cached_property
    def program(self) -> Program:
        """The program of the text."""
        return parse(self.text)

    @cached_property
    def gradients(self) -> Gradients:
        """Its backward."""
        return gradients(self.text)

    @cached_property
    def source(self) -> Source:
        """What is known of it in any language: the tensors that are free, used and firm."""
        return Source(self.text, self.layout, (self.single,))

    @cached_property
    def free(self) -> list[int]:
        """The tensors that take a gradient."""
        return self.source.free()

    @cached_property
    def used(self) -> list[int]:
        """The tensors that are not of updates alone."""
        return self.source.used()

    @cached_property
    def firm(self) -> list[int]:
        """The tensors on whose values a gradient depends."""
        return self.source.firm()

    @cached_property
    def copied(self) -> list[int]:
        """The tensors that a backward reads as they were, whatever becomes of them."""
        return self.source.copied(self.firm)

    @cached_property
    def read(self) -> list[int]:
        """The tensors that a kernel of the backward reads."""
        return [i for i in self.used if i in self.firm or (self.masks and i in self.copied)]

    @property
    def masks(self) -> bool:
        """Whether a backward computes the argument of the activation again."""
        return bool(self.program.activation) and not self.program.residual

    @cached_property
    def double(self) -> bool:
        """Whether values of a group are in double precision."""
        return self.single == "float64" or bool(self.averages) or wants_double(self.program)

    @property
    def averages(self) -> range:
        """The means over groups."""
        return range(len(self.program.means))

    @property
    def moments(self) -> int:
        """How many moments of each group are saved."""
        return 1 if self.program.about_zero else 2

    @property
    def acc(self) -> str:
        """The type that is computed in."""
        return f"tl.{self.single}"

    @property
    def of_parts(self) -> str:
        """The type of moments and sums of a group and of its parts."""
        return "float64" if self.averages else self.single

    @cached_property
    def inner(self) -> list[int]:
        """The tensors that vary inside a group."""
        return [i for i in range(len(self.program.tensors)) if self.program.inside(i)]

    @cached_property
    def groups(self) -> list[int]:
        """The loops over groups."""
        return [i for i, loop in enumerate(self.layout.loops) if not loop.reduced]

    @cached_property
    def cells(self) -> list[int]:
        """The loops over the cells of a group."""
        loops = enumerate(self.layout.loops)
        return [i for i, loop in loops if loop.reduced and loop.tensors & set(self.inner)]

    @cached_property
    def elements(self) -> list[int]:
        """The loops over the elements of a cell."""
        loops = enumerate(self.layout.loops)
        return [i for i, loop in loops if loop.reduced and not loop.tensors & set(self.inner)]

    @cached_property
    def summed(self) -> list[int]:
        """The tensors whose gradient is summed over groups inside a kernel."""
        return [i for i in self.free if i in self.inner]

    @cached_property
    def lanes(self) -> list[int]:
        """The loops over groups along which one of those runs: each lane is summed by itself."""
        loops = self.layout.loops
        return [i for i in self.groups if loops[i].tensors & set(self.summed)]

    @cached_property
    def others(self) -> list[int]:
        """The loops over the groups of a lane."""
        return [i for i in self.groups if i not in self.lanes]

    def count(self, loops: Sequence[int]) -> str:
        """How many there are."""
        return "(" + (" * ".join(f"n{i}" for i in loops) or "1") + ")"

    def decoded(self, loops: Sequence[int], flat: str) -> list[str]:
        """The index of each loop."""
        lines = []
        for place, loop in enumerate(loops):
            inner = loops[place + 1 :]
            value = f"({flat} // {self.count(inner)})" if inner else flat
            lines.append(f"i{loop} = {value}" + (f" % n{loop}" if place else ""))
        return lines

    def flat(self, loops: Sequence[int]) -> str:
        """One index of several loops."""
        result = ""
        for loop in loops:
            result = f"({result}) * n{loop} + i{loop}" if result else f"i{loop}"
        return result or "0"

    def offset(self, *, first: bool = False) -> str:
        """Where an element lies in x, given the indices of all loops; the first of its group."""
        last = len(self.layout.loops)
        loops = self.groups if first else range(last)
        return " + ".join(f"i{i} * {self.count(range(i + 1, last))}" for i in loops) or "0"

    def signature(self, name: str, given: Sequence[str], constants: Sequence[str]) -> list[str]:
        """The head of a kernel: pointers and numbers, lengths of loops, extents, constants."""
        lengths = [
            f"n{i}: tl.constexpr" if i in self.fixed else f"n{i}"
            for i in range(len(self.layout.loops))
        ]
        constant = [f"{name}: tl.constexpr" for name in constants]
        names = [*given, *lengths, *map(str, self.extents), *constant]
        lines = ["@triton.jit", f"def {name}({', '.join(names)}):"]
        runtime = [i for i in range(len(self.layout.loops)) if i not in self.fixed]
        if self.wide:
            lines += [f"    n{i} = tl.cast(n{i}, tl.int64)" for i in runtime]
        # not where they are used: what changes its type inside a loop is not compiled
        return lines + [f"    {name} = tl.cast({name}, {self.of_values})" for name in self.extents]

    @property
    def of_values(self) -> str:
        """The type of values of a group."""
        return "tl.float64" if self.double else "tl.float32"

    @cached_property
    def extents(self) -> list[sympy.Symbol]:
        """The symbols of extents that the formulas have."""
        program, made = self.program, self.gradients
        values = [program.centre, *program.updates, made.mean, made.variance]
        values += [*made.groups.values(), *made.means, *(mean.value for mean in program.means)]
        values += [term.group for term in (*program.scale, *program.shift)]
        used = {symbol for value in values for symbol in value.free_symbols}
        return [symbol for symbol in program.extents() if symbol in used]

    def index(self, flat: str) -> str:
        """A number of an element or program, in as many bits as it takes."""
        return f"tl.cast({flat}, tl.int64)" if self.wide else flat

    def group_indices(self, begin: str, loops: Sequence[int]) -> list[str]:
        """The groups of a tile, and which of them there are."""
        lines = [f"g = {begin} + {self.index('tl.arange(0, G)[:, None, None]')}"]
        if self.groups:
            lines.append(f"in_g = g < {self.count(loops)}")
        return [*lines, *self.decoded(loops, "g")]

    def cell_indices(self, begin: str) -> list[str]:
        """The cells of a tile."""
        lines = [f"c = {begin} + {self.index('tl.arange(0, C)[None, :, None]')}"]
        if self.cells:
            lines.append(f"in_c = c < {self.count(self.cells)}")
        return [*lines, *self.decoded(self.cells, "c")]

    def element_indices(self, begin: str) -> list[str]:
        """The elements of a tile, and where all of it lies."""
        lines = [f"e = {begin} + {self.index('tl.arange(0, E)[None, None, :]')}"]
        if self.elements:
            lines.append(f"in_e = e < {self.count(self.elements)}")
        inside = self.mask(*(["in_e"] if self.elements else []))
        return [
            *lines, *self.decoded(self.elements, "e"), f"at = {self.offset()}", f"inside = {inside}"
        ]  # fmt: skip

    def mask(self, *more: str, cells: bool = True) -> str:
        """What of groups and cells there is, and more."""
        known = [*(["in_g"] if self.groups else []), *(["in_c"] if self.cells and cells else [])]
        return " & ".join(f"({each})" for each in (*known, *more)) or "g == 0"

    def statistics(self) -> list[str]:
        """M and V of each group from what was saved."""
        group = self.flat(self.groups)
        mask = self.mask(cells=False)
        every = self.count(self.groups)
        lines = [f"group = {group} + 0 * g"]
        if self.program.about_zero:
            return [*lines, f"V = tl.load(moments + group, mask={mask}, other=1.0)"]
        return [
            *lines,
            f"M = tl.load(moments + group, mask={mask}, other=0.0)",
            f"middle = M.to({self.acc})",
            f"V = tl.load(moments + {every} + group, mask={mask}, other=1.0)",
        ]

    def tensors(self, wanted: Sequence[int], loops: Sequence[int]) -> list[str]:
        """The tensors of the program, where the tile is; its groups run over some loops."""
        lines = []
        for i in wanted:
            at = self.flat(self.source.runs(i))
            if i in self.inner:
                known = ["in_c"] if set(self.source.runs(i)) & set(self.cells) else []
                known += ["in_g"] if set(self.source.runs(i)) & set(loops) else []
                mask = " & ".join(f"({each})" for each in known) or "c == 0"
                at = f"{at} + 0 * c"
            else:
                at, mask = f"{at} + 0 * g", self.mask(cells=False)
            lines.append(f"t{i} = tl.load(t{i}_ + {at}, mask={mask}, other=1.0).to({self.acc})")
        return lines

    def of_group(
        self, named: Sequence[tuple[str, sympy.Expr]], letter: str, wide: bool = True
    ) -> list[str]:
        """Values of a group, from M, V, and the tensors that are constant in it.

        Args:
            named: the values.
            letter: of common parts.
            wide: M, V and the tensors are turned into the precision of groups first.
        """
        lines = []
        kind = self.of_values
        if wide:
            lines += [f"{Vs} = {V}", *([] if self.program.about_zero else [f"{Ms} = {M}"])]
            lines.append(f"N = tl.cast({self.count([*self.cells, *self.elements])}, {kind})")
        values = of_groups(named, letter, double=self.double)
        names = {name for name, _ in named}
        for name, value in values:
            made = f"tl.cast({value}, {kind})" if name in names else value
            lines.append(f"{name} = {made}")
        return lines

    def widened(self, wanted: Sequence[int]) -> list[str]:
        """M, V and tensors in the precision of groups."""
        if not self.double or self.single == "float64":
            return []
        names = [f"t{i}" for i in wanted if i not in self.inner]
        names += ["V"] if self.program.about_zero else ["M", "V"]
        return [f"{name} = {name}.to(tl.float64)" for name in names]

    def narrowed(self, names: Sequence[str]) -> list[str]:
        """Values of a group in the type that is computed in."""
        return [f"{name} = {name}.to({self.acc})" for name in names] if self.double else []


def indented(lines: Sequence[str], depth: int = 1) -> list[str]:
    """Lines deeper in a function."""
    return ["    " * depth + line for line in lines]
