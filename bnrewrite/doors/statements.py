"""One method of a scripted module, as the text of a Python function.

    %6 : Tensor = aten::sub(%x, %mean, %1)      v6 = torch.ops.aten.sub.Tensor(v0, v3, alpha=1)

Nothing of the text comes from the module but numbers, strings (as literals) and names of attributes
that are plain identifiers: an archive from elsewhere cannot put code into it. Each line knows the
user's file and line, so that a report on the Python function names these.
"""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bnrewrite.doors.operators import Operators, is_list
from bnrewrite.doors.plain import NAMES, OF_ATTRIBUTES, OF_LISTS, STATEMENTS, Untranslatable, filled

_PLACE = re.compile(r'File "([^"\n]+)", line (\d+)')
_TRACED_PLACE = re.compile(r"([^\n]+)\((\d+)\): ")
_CALL = "bnrewrite::call"  # a method that is called, hidden from the pass that inlines functions
_MODES = {"no_grad": "torch.no_grad()", "enable_grad": "torch.enable_grad()"}
_ENDLESS = 2**63 - 1
_TAKEN = frozenset(dir(nn.Module()))


@dataclass
class Text:
    """A Python function.

    Attributes:
        name: of the method.
        lines: with their indentation, from `def` on.
        places: the user's file and line of each.
        constants: values that the text names, by name.
        attributes: TorchScript's type of every attribute that is read or set, by the path of its
            module below the method's and its name.
    """

    name: str
    lines: list[str] = field(default_factory=list)
    places: list[tuple[str, int] | None] = field(default_factory=list)
    constants: dict[str, Any] = field(default_factory=dict)
    attributes: dict[tuple[tuple[str, ...], str], Any] = field(default_factory=dict)


def write_method(name: str, method: Any, *, for_export: bool = False) -> Text:
    """The text of a method, with the names and the defaults of its arguments.

    For an export a method raises where it would bind an attribute to a new tensor.

    Raises:
        Untranslatable: something in it has no form in Python.
    """
    checked_name(name, method=True)
    _, *arguments = method.schema.arguments
    return _Writer(Text(name), for_export).method(functions_inlined(method.graph), arguments)


def functions_inlined(graph: Any) -> Any:
    """A copy of a graph in which functions stand in the place of their calls, methods do not."""
    graph = graph.copy()
    for node in list(_nodes(graph)):
        if node.kind() != "prim::CallMethod":
            continue
        called = graph.create(_CALL, list(node.inputs()), node.outputsSize())
        called.s_("name", node.s("name"))
        called.insertBefore(node)
        called.copyMetadata(node)
        for old, new in zip(node.outputs(), called.outputs(), strict=True):
            new.setType(old.type())
            old.replaceAllUsesWith(new)
        node.destroy()
    torch._C._jit_pass_inline(graph)
    return graph


def checked_name(name: str, *, method: bool = False) -> str:
    """The name of an attribute or method, if it is one that a Python module may have.

    Raises:
        Untranslatable: it is not.
    """
    allowed = ("forward",) if method else ("training",)
    if (
        not re.fullmatch(r"[A-Za-z_0-9]+", name)
        or keyword.iskeyword(name)
        or name.startswith("__")
        or (name in _TAKEN and name not in allowed)
    ):
        raise Untranslatable(f"the name {name!r} cannot stand for itself in a Python module")
    return name


def _is_free(name: str) -> bool:
    """Whether an argument may have its own name in the text."""
    ours = name in NAMES or re.fullmatch(r"v\d+|(constant|going)_.*|self|__.*", name)
    return name.isidentifier() and name.isascii() and not keyword.iskeyword(name) and not ours


def _nodes(block: Any) -> Iterator[Any]:
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _nodes(inner)


class _Writer:
    def __init__(self, text: Text, for_export: bool) -> None:
        self.text = text
        self.for_export = for_export
        self.depth = 1
        self.names: dict[str, str] = {}  # of values, by TorchScript's names
        self.paths: dict[str, tuple[str, ...]] = {}  # of modules
        self.modes: dict[str, str] = {}  # of objects that set a mode
        self.operators = Operators(self._use)
        self.place: tuple[str, int] | None = None

    def method(self, graph: Any, arguments: Sequence[Any]) -> Text:
        owner, *inputs = graph.inputs()
        self.paths[owner.debugName()] = ()
        given = ["self"]
        for value, argument in zip(inputs, arguments, strict=True):
            if _is_free(argument.name):
                self.names[value.debugName()] = argument.name
            text = self._name(value)
            has_default = argument.has_default_value()
            given.append(f"{text}={self._literal(argument.default_value)}" if has_default else text)
        self.depth = 0
        self._line(f"def {self.text.name}({', '.join(given)}):")
        self.depth = 1
        self._block(graph)
        results = [self._use(each) for each in graph.outputs()]
        self._line(f"return {results[0] if len(results) == 1 else ', '.join(results)}")
        return self.text

    def _line(self, text: str) -> None:
        self.text.lines.append("    " * self.depth + text)
        self.text.places.append(self.place)

    def _name(self, value: Any) -> str:
        return self.names.setdefault(value.debugName(), f"v{len(self.names)}")

    def _use(self, value: Any) -> str:
        """The text that stands for a value."""
        name = value.debugName()
        if name not in self.names:
            raise Untranslatable(f"it uses an object of the class {value.type().str()}")
        return self.names[name]

    def _block(self, block: Any) -> None:
        before, count = self.depth, len(self.text.lines)
        for node in block.nodes():
            self.place = _place_of(node) or self.place
            self._node(node)
        if self.depth != before:
            raise Untranslatable("it leaves a block in another mode than it enters it")
        if count == len(self.text.lines):
            self._line("pass")

    def _node(self, node: Any) -> None:
        space, _, kind = node.kind().partition("::")
        write = getattr(self, f"_{kind}", None) if space in ("prim", "bnrewrite") else None
        if write is not None:
            write(node)
        elif space == "aten":
            self._operator(node, kind)
        else:
            texts = [self._use(each) for each in node.inputs()]
            written = filled(OF_ATTRIBUTES, kind, texts) or filled(OF_LISTS, kind, texts)
            if written is None or space != "prim":
                raise Untranslatable(f"it calls {node.kind()}")
            self._assign(node, written)

    def _assign(self, node: Any, expression: str) -> None:
        outputs = [self._name(each) for each in node.outputs()]
        self._line(f"{', '.join(outputs)} = {expression}" if outputs else expression)

    # -- values

    def _Constant(self, node: Any) -> None:
        output = node.output()
        if output.type().kind() == "FunctionType":
            return
        self.names[output.debugName()] = self._literal(output.toIValue())

    def _literal(self, value: Any) -> str:
        if value is None or isinstance(value, bool | str):
            return repr(value)
        if isinstance(value, int | float) and math.isfinite(value):
            return repr(value) if value >= 0 else f"({value!r})"
        if isinstance(value, list):
            return f"[{', '.join(map(self._literal, value))}]"
        if not isinstance(value, float | complex | Tensor | torch.device | tuple):
            raise Untranslatable(f"it holds a constant of the type {type(value).__name__}")
        name = f"constant_{len(self.text.constants)}"
        self.text.constants[name] = value
        return name

    def _GetAttr(self, node: Any) -> None:
        name, output = node.s("name"), node.output()
        path = self._path(node.input())
        if output.type().kind() == "ClassType":
            self.paths[output.debugName()] = (*path, _checked_step(name))
            return
        checked_name(name)
        self.text.attributes[path, name] = output.type()
        self._assign(node, _member(path, name))

    def _SetAttr(self, node: Any) -> None:
        owner, value = node.inputs()
        path, name = self._path(owner), checked_name(node.s("name"))
        self.text.attributes[path, name] = value.type()
        if value.type().kind() == "TensorType" and self.for_export:
            told = f"it binds {'.'.join((*path, name))} to a new tensor"
            self._line(f"raise RuntimeError({told!r})")  # the export would lose it
        else:
            self._line(f"{_member(path, name)} = {self._use(value)}")

    def _path(self, value: Any) -> tuple[str, ...]:
        path = self.paths.get(value.debugName())
        if path is None:
            raise Untranslatable(f"it uses an object of the class {value.type().str()}")
        return path

    def _ListConstruct(self, node: Any) -> None:
        self._assign(node, f"[{', '.join(map(self._use, node.inputs()))}]")

    def _TupleConstruct(self, node: Any) -> None:
        if node.output().type().str().startswith("NamedTuple"):
            raise Untranslatable("it makes a named tuple")
        self._assign(node, f"({''.join(f'{self._use(each)}, ' for each in node.inputs())})")

    def _DictConstruct(self, node: Any) -> None:
        given = [self._use(each) for each in node.inputs()]
        pairs = zip(given[::2], given[1::2], strict=True)
        self._assign(node, f"{{{', '.join(f'{key}: {value}' for key, value in pairs)}}}")

    def _ListUnpack(self, node: Any) -> None:
        given = self._use(node.input())
        outputs = [self._name(each) for each in node.outputs()]
        self._line(f"[{', '.join(outputs)}] = {given}")

    _TupleUnpack = _ListUnpack

    def _TupleIndex(self, node: Any) -> None:
        given, index = node.inputs()
        self._assign(node, f"{self._use(given)}[{self._use(index)}]")

    def _NumToTensor(self, node: Any) -> None:
        self.operators.numbers.add(node.output().debugName())
        self._assign(node, self._use(node.input()))

    def _Uninitialized(self, node: Any) -> None:
        self._assign(node, "None")

    # -- control

    def _If(self, node: Any) -> None:
        outputs = [self._name(each) for each in node.outputs()]
        self._line(f"if {self._use(node.input())}:")
        for i, block in enumerate(node.blocks()):
            if i:
                self._line("else:")
            self.depth += 1
            self._block(block)
            results = [self._use(each) for each in block.outputs()]
            for output, result in zip(outputs, results, strict=True):
                self._line(f"{output} = {result}")
            self.depth -= 1

    def _Loop(self, node: Any) -> None:
        trips, condition, *initial = node.inputs()
        (body,) = node.blocks()
        index, *carried = body.inputs()
        goes_on, *results = body.outputs()
        names = [self._name(each) for each in carried]
        for name, value in zip(names, initial, strict=True):
            self._line(f"{name} = {self._use(value)}")
        counter = self._name(index)
        always = condition.toIValue() is True and goes_on.toIValue() is True
        going = f"going_{counter}"
        if always:
            self._line(f"for {counter} in range({self._use(trips)}):")
        else:
            self._line(f"{going}, {counter} = {self._use(condition)}, 0")
            limit = "" if trips.toIValue() == _ENDLESS else f" and {counter} < {self._use(trips)}"
            self._line(f"while {going}{limit}:")
        self.depth += 1
        self._block(body)
        values = [self._use(each) for each in results]
        if names:
            self._line(f"{', '.join(names)} = {', '.join(values)}")
        if not always:
            self._line(f"{going}, {counter} = {self._use(goes_on)}, {counter} + 1")
        self.depth -= 1
        for output, name in zip(node.outputs(), names, strict=True):
            self.names[output.debugName()] = name

    def _RaiseException(self, node: Any) -> None:
        self._line(f"raise RuntimeError({self._use(node.inputsAt(0))})")

    def _CreateObject(self, node: Any) -> None:
        kind = node.output().type().str().rpartition(".")[2]
        if kind not in _MODES:
            raise Untranslatable(f"it makes an object of the class {node.output().type().str()}")
        self.modes[node.output().debugName()] = _MODES[kind]

    def _Enter(self, node: Any) -> None:
        mode = self.modes.get(node.input().debugName())
        if mode is None:
            raise Untranslatable(f"it enters a {node.input().type().str()}")
        self._line(f"with {mode}:")
        self.depth += 1
        self._line("pass")

    def _Exit(self, node: Any) -> None:
        self.depth -= 1

    def _call(self, node: Any) -> None:
        owner, *given = node.inputs()
        if owner.debugName() in self.modes:
            return
        name = checked_name(node.s("name"), method=True)
        called = _member(self._path(owner)) + ("" if name == "forward" else f".{name}")
        self._assign(node, f"{called}({', '.join(map(self._use, given))})")

    def _operator(self, node: Any, kind: str) -> None:
        given = list(node.inputs())
        if kind in STATEMENTS and is_list(given):
            texts = [self._use(each) for each in given]
            written = filled(STATEMENTS, kind, texts)
            if written is None:
                raise Untranslatable(f"it calls aten::{kind} on a list")
            self._line(written)
            for output in node.outputs():  # the list itself
                self.names[output.debugName()] = texts[0]
        else:
            self._assign(node, self.operators.text(node, kind, given))


def _checked_step(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_0-9]+", name) or name.startswith("__"):
        raise Untranslatable(f"the name {name!r} cannot stand for itself in a Python module")
    return name


def _member(path: Sequence[str], name: str | None = None) -> str:
    """The text of a module below `self`, or of an attribute of it."""
    text = "self"
    for step in path:
        text += f"._modules[{step!r}]"
    return text if name is None else f"{text}.{name}"


def _place_of(node: Any) -> tuple[str, int] | None:
    """The user's file (its name alone: an archive may name any) and line."""
    found = _TRACED_PLACE.match(node.sourceRange()) or _PLACE.search(node.sourceRange())
    file = re.split(r"[\\/]", found.group(1))[-1] if found else "<string>"
    return (file, int(found.group(2))) if found and file != "<string>" else None
