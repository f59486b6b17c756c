"""The example arguments in other sizes, for the sizes that may vary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils._pytree import tree_flatten, tree_unflatten

TRACED = "as traced"
UNPROMISED = 2  # a least size of 2 is torch.export's own, which leaves 0 and 1 aside

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """Arguments of one call.

    Attributes:
        name: the sizes of the tensors.
        args: positional arguments.
        kwargs: keyword arguments.
        promised: whether torch.export promises these sizes; of sizes of 1 it says nothing.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    promised: bool = True


def cases(program: ExportedProgram, seed: int = 0) -> Iterator[Case]:
    """The arguments as traced, then in larger and in smaller sizes where some vary.

    Sizes stay in the range that the program takes, but for sizes of 1. Each dynamic size grows by
    another amount, so that two that are mixed up show.
    """
    assert program.example_inputs is not None
    yield Case(TRACED, *program.example_inputs)
    symbols = _symbols(program)
    if not symbols:
        return
    larger, smaller = {}, {}
    for i, (symbol, size) in enumerate(symbols.items()):
        least, most = _range(program, symbol)
        larger[symbol] = min(size + 1 + i, most)
        smaller[symbol] = max(size // 2, 1, least if least > UNPROMISED else 1)
    generator = torch.Generator().manual_seed(seed)
    for chosen in (larger, smaller):
        if chosen != symbols:
            args, kwargs = _resized(program, chosen, generator)
            sizes = (tuple(x.shape) for x in tree_flatten((args, kwargs))[0] if _is_tensor(x))
            name = ", ".join("x".join(map(str, each)) for each in sizes)
            promised = all(size >= _range(program, s)[0] for s, size in chosen.items())
            yield Case(name, args, kwargs, promised)


def _symbols(program: ExportedProgram) -> dict[sympy.Symbol, int]:
    """The symbols of input sizes, with their sizes in the example."""
    found: dict[sympy.Symbol, int] = {}
    for value in _placeholder_values(program).values():
        for size in value.shape if isinstance(value, Tensor) else ():
            if isinstance(size, torch.SymInt):
                expression = size.node.expr
                hint = int(size.node.hint)
                for symbol in sorted(expression.free_symbols, key=str):
                    roots = sympy.solve(expression - hint, symbol)
                    if len(expression.free_symbols) == 1 and roots:
                        found.setdefault(symbol, int(roots[0]))
    return found


def _range(program: ExportedProgram, symbol: sympy.Symbol) -> tuple[int, int]:
    constraint = program.range_constraints.get(symbol)
    if constraint is None:
        return 1, 1 << 30
    least = int(constraint.lower) if sympy.sympify(constraint.lower).is_finite else 1
    most = constraint.upper
    return least, int(most) if sympy.sympify(most).is_Integer else 1 << 30


def _resized(
    program: ExportedProgram, chosen: Mapping[sympy.Symbol, int], generator: torch.Generator
) -> Arguments:
    assert program.example_inputs is not None
    leaves, spec = tree_flatten(program.example_inputs)
    values = _placeholder_values(program)
    resized = []
    for leaf, name in zip(leaves, program.graph_signature.user_inputs, strict=True):
        fake = values.get(name) if isinstance(name, str) else None
        if _is_tensor(leaf) and isinstance(fake, Tensor):
            sizes = [_size(each, chosen) for each in fake.shape]
            leaf = _in_sizes(leaf, sizes, generator)
        resized.append(leaf)
    args, kwargs = tree_unflatten(resized, spec)
    return args, kwargs


def _size(size: int | torch.SymInt, chosen: Mapping[sympy.Symbol, int]) -> int:
    return int(size.node.expr.subs(chosen)) if isinstance(size, torch.SymInt) else size


def _in_sizes(tensor: Tensor, sizes: list[int], generator: torch.Generator) -> Tensor:
    """Cut or repeated; numbers that repeat are scaled by 1/2 to 1, as no two images are equal."""
    result = tensor.detach()
    for dim, size in enumerate(sizes):
        if result.shape[dim] != size:
            index = torch.arange(size, device=result.device) % result.shape[dim]
            result = result.index_select(dim, index)
    if result.is_floating_point() and list(tensor.shape) != sizes:
        factor = 0.5 + 0.5 * torch.rand(result.shape, generator=generator)
        result = result * factor.to(result.device, result.dtype)
    return result


def _placeholder_values(program: ExportedProgram) -> dict[str, Any]:
    return {n.name: n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"}


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)
