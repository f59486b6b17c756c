"""The text of a rewritten graph, and the file of golden texts that spellings must end in.

The text shows what is computed and with which constants, keyword arguments included. What moves or
renames elements without computing is left out: that is where spellings of one formula may differ.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import fx

GOLDEN = Path(__file__).parent / "spellings" / "golden.txt"
VIEWS = """
    view reshape _unsafe_view _reshape_alias view_as permute transpose t movedim numpy_T flatten
    unflatten unsqueeze squeeze expand expand_as alias detach clone contiguous to _to_copy
    lift_fresh_copy type_as
"""
TRANSPARENT = frozenset(VIEWS.split())
COMMUTATIVE = ("add", "mul", "maximum", "minimum")


def graph_text(module: fx.GraphModule, full_size: int = 0) -> str:
    """One line per operator that computes; operands by the user's names or by line number.

    Args:
        module: the rewritten graph.
        full_size: where given, only operators whose results have at least so many elements, and
            lead to an output by such results; every other operand reads `small`.
    """
    shown = full_size_nodes(module, full_size) if full_size else set(module.graph.nodes)
    names: dict[fx.Node, str] = {}
    lines: list[str] = []
    updates: list[str] = []
    for node in module.graph.nodes:
        if node.op == "placeholder":
            names[node] = input_name(str(node.target))
        elif node not in shown and node.op != "output":
            names[node] = "small"
        elif node.op == "get_attr":
            names[node] = "constant"
        elif node.op == "output":
            returned = [operand(each, names) for each in flat(node.args[0])]
            inputs = [input_name(str(each.target)) for each in names if each.op == "placeholder"]
            computed = [each for each in returned if each not in (*inputs, "None")]
            lines += [*sorted(updates), f"return {', '.join(computed)}"]
        elif node.target is not torch._C._set_grad_enabled:
            name = operator_name(node.target)
            if name in TRANSPARENT:
                names[node] = names[node.all_input_nodes[0]]
            elif name == "copy_":
                updates.append(f"{operand(node.args[0], names)} := {operand(node.args[1], names)}")
            elif name == "getitem":
                names[node] = f"{operand(node.args[0], names)}[{node.args[1]}]"
            else:
                names[node] = f"%{len(lines) + 1}"
                lines.append(f"{names[node]} = {name}({', '.join(arguments(node, names))})")
    return "\n".join(lines)


def full_size_nodes(module: fx.GraphModule, full_size: int) -> set[fx.Node]:
    """What an output is made of through full-size results only."""
    *_, output = module.graph.nodes
    found: set[fx.Node] = set()
    left = list(output.all_input_nodes)
    while left:
        node = left.pop()
        value = node.meta.get("val", node.meta.get("example_value"))
        if node not in found and isinstance(value, torch.Tensor) and value.numel() >= full_size:
            found.add(node)
            left += node.all_input_nodes
    return found


def flat(outputs: Any) -> list[Any]:
    return list(outputs) if isinstance(outputs, list | tuple) else [outputs]


def operator_name(target: Any) -> str:
    """`batch_norm` of `aten.batch_norm.default`, `getitem` of the Python function."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1]
    return str(getattr(target, "__name__", target))


def input_name(target: str) -> str:
    """`weight` of `l_self_parameters_weight_`, `x` of `l_x_`."""
    plain = re.sub(r"^l_(self_)?((modules|parameters|buffers)_)?", "", target.lower()).strip("_")
    return plain or target


def arguments(node: fx.Node, names: dict[fx.Node, str]) -> Iterator[str]:
    given = [operand(argument, names) for argument in node.args]
    yield from sorted(given) if operator_name(node.target) in COMMUTATIVE else given
    for key, argument in sorted(node.kwargs.items()):
        yield f"{key}={operand(argument, names)}"


def operand(argument: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(argument, fx.Node):
        return names[argument]
    if isinstance(argument, list | tuple):
        return "[" + ", ".join(operand(each, names) for each in argument) + "]"
    return f"{argument:.6g}" if isinstance(argument, float) else str(argument)


RECORDER = "bnrewrite_recorder"  # a backend that keeps the text of every graph handed to it
RECORDED: list[str] = []
FULL_SIZE = {"elements": 0}  # what `graph_text` is given by the recording backend


def recorder(full_size: int = 0) -> str:
    """The name of the recording backend, which runs graphs eagerly; what it has kept is dropped."""
    FULL_SIZE["elements"] = full_size
    if RECORDER not in torch._dynamo.list_backends(exclude_tags=()):
        torch._dynamo.register_backend(record, name=RECORDER)
    RECORDED.clear()
    return RECORDER


def record(module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Keeps a graph's text in ``RECORDED``."""
    RECORDED.append(graph_text(module, FULL_SIZE["elements"]))
    return module.forward


class Golden:
    """Golden texts by family.

    Args:
        write: accept the first text seen of each family, and write the file at the end.
    """

    def __init__(self, write: bool) -> None:
        self.write = write
        self.texts = {} if write else read_golden()

    def expected(self, family: str, text: str) -> str:
        """The family's golden text; where it is being written, the first text seen."""
        return self.texts.setdefault(family, text) if self.write else self.texts.get(family, "")

    def save(self) -> None:
        """Writes the file, where that was asked for; families that did not run stay in it."""
        if self.write:
            texts = read_golden() | self.texts
            parts = [f"[{family}]\n{text}\n" for family, text in sorted(texts.items())]
            GOLDEN.write_text("\n".join(parts), encoding="utf-8")


def read_golden() -> dict[str, str]:
    """Texts by family; empty where the file does not exist yet."""
    if not GOLDEN.exists():
        return {}
    parts = re.split(r"^\[(.+)\]\n", GOLDEN.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {family: text.strip() for family, text in zip(parts[1::2], parts[2::2], strict=True)}
