"""TorchScript's operators as the text of Python expressions.

aten::sub(%x, %mean, %1)        torch.ops.aten.sub.Tensor(v0, v3, alpha=1)
aten::add(%height, %1)          v4 + 1
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bnrewrite.doors.plain import (
    BINARY,
    DTYPES,
    FORMATS,
    LAYOUTS,
    OF_TENSORS,
    TEMPLATES,
    Untranslatable,
    filled,
)

_OF_SIZES = {"add": "+", "sub": "-", "mul": "*", "floor_divide": "//", "remainder": "%"}
_OF_TWO = ("add", "sub", "mul", "div")
_CHANGES_A_CONTAINER = re.compile(r"[\])]\(\w+!")  # int[](a!), Dict(str, t)(a!)
_UNSAFE = {"from_file", "save", "load"}


class Operators:
    """Writes calls of operators.

    Args:
        use: gives the text that stands for a value.

    Attributes:
        numbers: values that are tensors in TorchScript and numbers in Python: sizes, with which a
            traced module computes.
    """

    def __init__(self, use: Callable[[Any], str]) -> None:
        self.use = use
        self.numbers: set[str] = set()

    def text(self, node: Any, kind: str, given: Sequence[Any]) -> str:
        """The text of a call of `aten::kind`.

        Raises:
            Untranslatable: Python has no form for it.
        """
        if kind in _UNSAFE:
            raise Untranslatable(f"it calls aten::{kind}, which reads or writes files")
        texts = [self.use(each) for each in given]
        return self._plain(node, kind, given, texts) or self._tensor_operator(node, kind, given)

    def _plain(
        self, node: Any, kind: str, given: Sequence[Any], texts: Sequence[str]
    ) -> str | None:
        """An operator that Python has too; None where it is one of ATen."""
        tensors = [each for each in given if is_tensor(each)]
        sizes = [each for each in tensors if each.debugName() in self.numbers]
        if sizes and all(each in sizes or _is_whole(each) for each in tensors):
            return self._of_numbers(node, kind, [self._size(each) for each in given])
        if kind == "size" and tensors:
            return f"{texts[0]}.size({texts[1]})" if len(texts) > 1 else f"list({texts[0]}.size())"
        if tensors and kind != "format":
            return filled(OF_TENSORS, kind, texts)
        if kind == "format":
            return f"formatted({', '.join(texts)})"
        written = filled(TEMPLATES, kind, texts)
        if kind in BINARY and len(texts) == 2:
            written = f"{texts[0]} {BINARY[kind]} {texts[1]}"
        is_float = written and node.output().type().kind() == "FloatType"
        return f"floating({written})" if is_float else written

    def _size(self, value: Any) -> str:
        constant = value.toIValue() if _is_whole(value) else None
        return self.use(value) if constant is None else str(int(constant))

    def _of_numbers(self, node: Any, kind: str, texts: Sequence[str]) -> str:
        """Arithmetic of tensors that are sizes: a traced module computes with these."""
        if kind in _OF_SIZES:
            self.numbers.add(node.output().debugName())
            scale = f" * {texts[2]}" if kind in ("add", "sub") and len(texts) > 2 else ""
            return f"{texts[0]} {_OF_SIZES[kind]} {texts[1]}{scale}"
        if kind in ("Int", "IntImplicit", "ScalarImplicit"):
            return f"integer({texts[0]})"
        raise Untranslatable(f"it calls aten::{kind} on a size")

    def _tensor_operator(self, node: Any, kind: str, given: Sequence[Any]) -> str:
        schema = node.schema()
        if schema == "(no schema)":
            raise Untranslatable(f"it calls aten::{kind}, which has no schema")
        if _CHANGES_A_CONTAINER.search(schema):  # from Python it would change a copy
            raise Untranslatable(f"it calls aten::{kind}, which changes a list or a dictionary")
        parsed = torch._C.parse_schema(schema)
        if len(parsed.arguments) != len(given):
            raise Untranslatable(f"it calls aten::{kind} with any number of arguments")
        arguments = [
            self._argument(argument, value, given)
            for argument, value in zip(parsed.arguments, given, strict=True)
        ]
        if kind == "_convolution":  # its further arguments name implementations
            return f"torch.ops.aten.convolution.default({', '.join(arguments[:9])})"
        if kind.rstrip("_") in _OF_TWO and parsed.overload_name.startswith("Scalar"):
            return self._by_number(kind, parsed, arguments)
        packet = getattr(torch.ops.aten, kind, None)
        overload = parsed.overload_name or "default"
        if kind in ("tensor", "as_tensor"):
            texts = dict(zip((each.name for each in parsed.arguments), arguments, strict=True))
            return (
                f"torch.tensor({arguments[0]}, dtype={texts.get('dtype')}, "
                f"device={texts.get('device')})"
            )
        if packet is None or overload not in packet.overloads():
            raise Untranslatable(f"it calls aten::{kind}.{overload}, which Python does not know")
        written = [
            f"{argument.name}={text}" if argument.kwarg_only else text
            for argument, text in zip(parsed.arguments, arguments, strict=True)
        ]
        return f"torch.ops.aten.{kind}.{overload}({', '.join(written)})"

    def _by_number(self, kind: str, parsed: Any, arguments: Sequence[str]) -> str:
        """Arithmetic of a tensor and a number, which may be a symbol as an operand of this form."""
        overload = parsed.overload_name.replace("Scalar", "Tensor")
        further = zip(parsed.arguments[2:], arguments[2:], strict=True)
        texts = [*arguments[:2], *(f"{argument.name}={text}" for argument, text in further)]
        return f"torch.ops.aten.{kind}.{overload}({', '.join(texts)})"

    def _argument(self, argument: Any, value: Any, given: Sequence[Any]) -> str:
        """The text of an argument: dtypes and the like are numbers in TorchScript."""
        text = self.use(value)
        kind = str(argument.real_type)
        constant = value.toIValue() if value.node().kind() == "prim::Constant" else None
        for name, table in (("ScalarType", DTYPES), ("Layout", LAYOUTS), ("MemoryFormat", FORMATS)):
            if name in kind and "List" not in kind:
                table_name = {"ScalarType": "DTYPES", "Layout": "LAYOUTS"}.get(name, "FORMATS")
                if text == "None":
                    return text
                if isinstance(constant, int) and constant not in table:
                    raise Untranslatable(f"it names the {name} number {constant}")
                return f"{table_name}[{text}]"
        if isinstance(constant, Tensor) and _is_number(constant):
            others = [each for each in given if is_tensor(each) and each is not value]
            others = [each for each in others if each.node().kind() != "prim::Constant"]
            if others and others[0].debugName() not in self.numbers:
                return f"({constant.item()!r} if {self.use(others[0])}.dim() else {text})"
        return text


def _is_whole(value: Any) -> bool:
    """Whether a tensor is a constant that a trace has made of a whole number."""
    if value.node().kind() != "prim::Constant":
        return False
    constant = value.toIValue()
    whole = isinstance(constant, Tensor) and constant.dtype == torch.int64 and constant.dim() == 0
    return whole or (isinstance(constant, int) and not isinstance(constant, bool))


def _is_number(constant: Tensor) -> bool:
    """Whether a constant is what a trace makes of a Python number."""
    is_plain = constant.dtype in (torch.float64, torch.int64) and constant.device.type == "cpu"
    return constant.dim() == 0 and is_plain and bool(constant.isfinite())


def is_tensor(value: Any) -> bool:
    kind, text = value.type().kind(), value.type().str()
    return bool(kind == "TensorType" or (kind == "OptionalType" and text.startswith("Tensor?")))


def is_list(given: Sequence[Any]) -> bool:
    return bool(given) and given[0].type().kind() in ("ListType", "DictType")
