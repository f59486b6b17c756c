"""For which calls a captured graph stands: what TorchScript asks before the graph is taken.

A graph was captured for inputs of certain dtypes, numbers of dimensions and sizes, with the mode
and the numbers that the module holds, and with stored means that are small beside their deviations
(`kernels/frozen.py`). Where one of these differs the user's own code runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from bnrewrite.doors.plain import Untranslatable
from bnrewrite.doors.program import environment_of
from bnrewrite.doors.torchscript import FunctionText
from bnrewrite.kernels.frozen import LARGEST_MEAN

_SMALLEST_SIZE = 1  # an empty tensor may raise where a norm is one operator
_RELATIONS = {
    "Equality": "==", "Unequality": "!=", "StrictLessThan": "<", "LessThan": "<=",
    "StrictGreaterThan": ">", "GreaterThan": ">=",
}  # fmt: skip
_FUNCTIONS = {"Mod": "%", "PythonMod": "%", "FloorDiv": "//", "CleanDiv": "//"}


def kind_conditions(name: str, value: Tensor) -> Iterator[str]:
    """What is asked of a tensor before its sizes."""
    yield f"{name}.dim() == {value.dim()}"
    yield f"{name}.dtype == {value.dtype}"
    yield f'{name}.device == torch.device("{value.device}")'


def shape_conditions(name: str, value: Tensor, symbols: dict[Any, str]) -> Iterator[str]:
    """What holds of the sizes of a tensor like a captured one; `symbols` learns their names."""
    for place, size in enumerate(value.shape):
        text = f"{name}.size({place})"
        symbol = size.node.expr if isinstance(size, torch.SymInt) else None
        if symbol is not None and symbol.is_Symbol and symbol not in symbols:
            symbols[symbol] = text
            yield f"{text} >= {_SMALLEST_SIZE}"
        else:
            yield f"{text} == {size_text(size, symbols)}"


def size_conditions(
    program: ExportedProgram, assumed: Iterable[Any], symbols: Mapping[Any, str]
) -> Iterator[str]:
    """What export, and what was done since, has taken for granted of sizes."""
    for relation in size_relations(program, assumed):
        yield _text(relation, symbols)


def size_relations(program: ExportedProgram, assumed: Iterable[Any]) -> list[Any]:
    """The same as formulas of the symbols that are left."""
    environment = environment_of(program)
    if environment is None:
        return []
    asked = [*(guard.expr for guard in environment.guards), *assumed]
    known = [environment.replace(relation) for relation in asked]
    return [relation for relation in known if relation is not sympy.true]


def size_text(size: Any, symbols: Mapping[Any, str]) -> str:
    """A size, or a relation between sizes, as TorchScript.

    Raises:
        Untranslatable: a function of sizes that is not known here.
    """
    expression = size.node.expr if isinstance(size, torch.SymInt) else sympy.sympify(size)
    return _text(expression, symbols)


def _text(expression: Any, symbols: Mapping[Any, str]) -> str:
    if expression.is_Symbol and expression in symbols:
        return symbols[expression]
    if expression.is_Integer:
        return str(int(expression))
    kind = type(expression).__name__
    inner = [_text(each, symbols) for each in expression.args]
    if kind in ("Add", "Mul"):
        return f"({(' + ' if kind == 'Add' else ' * ').join(inner)})"
    if kind in ("Max", "Min") and inner:
        text = inner[0]
        for each in inner[1:]:
            text = f"{kind.lower()}({text}, {each})"
        return text
    if kind in ("And", "Or"):
        return f"({f' {kind.lower()} '.join(inner)})"
    sign = _RELATIONS.get(kind) or _FUNCTIONS.get(kind)
    if sign is None or len(inner) != 2:
        raise Untranslatable(f"it asks for {expression} of its sizes")
    return f"({inner[0]} {sign} {inner[1]})"


def statistics_conditions(text: FunctionText, frozen: Sequence[fx.Node]) -> Iterator[str]:
    """Stored means are small: one question for all norms with one eps.

    m^2 < L^2 (v + eps): as few operations as there are, since tiny norms wait for them.
    """
    groups: dict[tuple[float, torch.dtype], list[fx.Node]] = {}
    for node in frozen:
        mean: Any = node.args[3]
        eps: Any = node.args[5]
        groups.setdefault((float(eps), mean.meta["val"].dtype), []).append(node)
    for (eps, _), nodes in groups.items():
        means, variances = ([text.vector(node.args[place]) for node in nodes] for place in (3, 4))
        limit = f"({_joined(variances)} + {eps!r}) * {LARGEST_MEAN**2}"
        yield f"bool(({_joined(means)}.square() < {limit}).all())"


def _joined(vectors: Sequence[str]) -> str:
    return vectors[0] if len(vectors) == 1 else f"torch.cat([{', '.join(vectors)}])"


def outside_conditions() -> Iterator[str]:
    """Autocast would compute a captured graph in other dtypes than the user's code."""
    yield "not torch.is_autocast_enabled()"
    yield "not torch.is_autocast_cpu_enabled()"
