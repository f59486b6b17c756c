"""Means over groups: what rows and columns have in common where a group needs the others.

A step over a tensor is then three: the moments of each group, the means, and y; and back: the sums
of each group, what they give to the means, and dx. Groups that share means are a set. Sets are done
one after the other, while they are in the cache; where there are fewer of them than threads, each
step is done for all groups before the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .gradients import slope
from .pieces import group_tensors, indented
from .printing import Source, of_groups

Each = Callable[[list[str]], list[str]]  # a loop over the groups of a set, from its body


class Across:
    """The means over groups of a program.

    Args:
        source: what is printed.
        each: prints a loop over the groups of the set ``set``.
    """

    def __init__(self, source: Source, each: Each) -> None:
        self.source = source
        self.each = each
        self.numbers = range(len(source.program.means))
        self.sums = [str(each.symbol) for each in source.gradients.sums]

    def head(self) -> list[str]:
        """The means, and the share of a group in each."""
        lines = [f"  const int64_t sets = {self._sets()};"]
        for k in self.numbers:
            lines += [
                f"  std::vector<double> mean{k}({self._size(k)});",
                f"  const double share{k} = double(mean{k}.size()) / groups;",
            ]
        return lines

    def head_back(self) -> list[str]:
        """What the means take, and the sums of all groups."""
        slopes = [f"  std::vector<double> slope{k}({self._size(k)});" for k in self.numbers]
        return [*slopes, f"  std::vector<double> sums_of(groups * {max(len(self.sums), 1)});"]

    def average(self) -> list[str]:
        """The function that makes the means of a set from the moments of its groups."""
        lines = ["  auto average = [&](int64_t set) {"]
        for k, mean in enumerate(self.source.program.means):
            body = [
                *self.known(k),
                *of_groups([("value", mean.value)]),
                f"mean{k}[{self._index(k)}] += share{k} * value;",
            ]
            lines += indented(self.each(body), 4)
        return [*lines, "  };"]

    def turn(self) -> list[str]:
        """The function that makes what the means of a set take from the sums of its groups."""
        lines = ["  auto turn = [&](int64_t set) {"]
        for k in reversed(self.numbers):
            value = self.source.gradients.means[k]
            later = [n for n in self.numbers if slope(n) in value.free_symbols]
            body = [
                *self.known(len(self.numbers)),
                *self.known_sums(),
                *self._slopes(later),
                *of_groups([("value", value)]),
                f"slope{k}[{self._index(k)}] += share{k} * value;",
            ]
            if value != 0:
                lines += indented(self.each(body), 4)
        return [*lines, "  };"]

    def known(self, means: int | None = None) -> list[str]:
        """What a group knows: its moments, its tensors, and the first means."""
        source = self.source
        numbers = [i for i in range(len(source.program.tensors)) if i in source.used()]
        return [
            *source.statistics("group", "groups"),
            *source.stopped(),
            *group_tensors(source, numbers, numbers),
            *self.loads(means),
        ]

    def loads(self, means: int | None = None) -> list[str]:
        """The first means, as a group reads them; by default all."""
        numbers = self.numbers if means is None else range(means)
        return [f"const double m{k} = mean{k}[{self._index(k)}]; (void)m{k};" for k in numbers]

    def gradients(self) -> list[str]:
        """What means and sums give a group."""
        return [*self.known_sums(), *self._slopes(self.numbers)]

    def known_sums(self) -> list[str]:
        """The sums of a group."""
        return [f"const double {name} = {place};" for name, place in self._places()]

    def keep_sums(self) -> list[str]:
        """Keep them for the steps that follow."""
        return [f"{place} = {name};" for name, place in self._places()]

    def _places(self) -> list[tuple[str, str]]:
        count = len(self.sums)
        return [(name, f"sums_of[group * {count} + {i}]") for i, name in enumerate(self.sums)]

    def _slopes(self, numbers: Sequence[int]) -> list[str]:
        return [f"const double dm{k} = slope{k}[{self._index(k)}];" for k in numbers]

    def _sets(self) -> str:
        layout = self.source.layout
        return " * ".join(f"n{i}" for i in layout.kept[: layout.apart(len(self.numbers))]) or "1"

    def _runs(self, number: int) -> list[int]:
        loops = enumerate(self.source.layout.loops)
        return [i for i, loop in loops if number in loop.means and not loop.reduced]

    def _size(self, number: int) -> str:
        return " * ".join(f"n{loop}" for loop in self._runs(number)) or "1"

    def _index(self, number: int) -> str:
        result = ""
        for loop in self._runs(number):
            result = f"({result}) * n{loop} + i{loop}" if result else f"i{loop}"
        return result or "0"
