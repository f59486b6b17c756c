"""TorchScript's operators on numbers, lists and strings, as Python writes them.

These are no operators of ATen: the interpreter of TorchScript computes them itself. Sizes may be
symbols when the Python text is traced, so that nothing here may ask for a number's value.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch

BINARY = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "floordiv": "//", "remainder": "%", "pow": "**",
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
    "__and__": "&", "__or__": "|", "__xor__": "^", "__lshift__": "<<", "__rshift__": ">>",
    "__is__": "is", "__isnot__": "is not",
}  # fmt: skip
TEMPLATES = {
    "neg": "-{0}",
    "__not__": "not {0}",
    "__getitem__": "{0}[{1}]",
    "__contains__": "{1} in {0}",
    "len": "len({0})",
    "Int": "integer({0})",
    "IntImplicit": "integer({0})",
    "Float": "floating({0})",
    "FloatImplicit": "floating({0})",
    "ScalarImplicit": "{0}",
    "Bool": "bool({0})",
    "ceil": "math.ceil({0})",
    "floor": "math.floor({0})",
    "sqrt": "math.sqrt({0})",
    "log": "math.log({0})",
    "exp": "math.exp({0})",
    "slice": "{0}[{1}:{2}:{3}]",
    "list": "list({0})",
    "copy": "list({0})",
    "keys": "list({0}.keys())",
    "values": "list({0}.values())",
    "__range_length": "range_length({0}, {1}, {2})",
    "_unwrap_optional": "{0}",
    "warn": "None",  # nobody would read it
    "__derive_index": "{1} + {0} * {2}",
}
STATEMENTS = {  # that change a list or dictionary, and give it
    "append": "{0}.append({1})",
    "extend": "{0}.extend({1})",
    "insert": "{0}.insert({1}, {2})",
    "_set_item": "{0}[{1}] = {2}",
    "add_": "{0}.extend({1})",
}
OF_TENSORS = {
    "dim": "{0}.dim()",
    "numel": "{0}.numel()",
    "len": "{0}.size(0)",
    "is_floating_point": "{0}.is_floating_point()",
    "is_complex": "{0}.is_complex()",
    "is_contiguous": "{0}.is_contiguous()",
    "item": "{0}.item()",
    "Int": "int({0})",
    "IntImplicit": "int({0})",
    "Float": "float({0})",
    "FloatImplicit": "float({0})",
    "ScalarImplicit": "{0}.item()",
    "Bool": "bool({0})",
    "__is__": "{0} is {1}",
    "__isnot__": "{0} is not {1}",
    "_unwrap_optional": "{0}",
}
OF_ATTRIBUTES = {  # prim
    "dtype": "NUMBERS[{0}.dtype]",
    "device": "{0}.device",
    "layout": "LAYOUT_NUMBERS[{0}.layout]",
    "is_cuda": "{0}.is_cuda",
    "is_nested": "{0}.is_nested",
    "is_quantized": "{0}.is_quantized",
    "is_sparse": "{0}.is_sparse",
    "requires_grad": "{0}.requires_grad",
    "data": "{0}.data",
    "unchecked_cast": "{0}",
    "unchecked_unwrap_optional": "{0}",
    "min": "min({0}, {1})",
    "max": "max({0}, {1})",
    "abs": "abs({0})",
}
OF_LISTS = {"min": "min({0})", "max": "max({0})"}  # prim
DTYPES: dict[int, torch.dtype] = {
    0: torch.uint8, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.int64,
    5: torch.float16, 6: torch.float32, 7: torch.float64, 9: torch.complex64, 10: torch.complex128,
    11: torch.bool, 15: torch.bfloat16,
}  # fmt: skip
NUMBERS = {dtype: number for number, dtype in DTYPES.items()}
LAYOUTS = {0: torch.strided, 1: torch.sparse_coo, 2: torch.sparse_csr}
LAYOUT_NUMBERS = {layout: number for number, layout in LAYOUTS.items()}
FORMATS = {
    0: torch.contiguous_format,
    1: torch.preserve_format,
    2: torch.channels_last,
    3: torch.channels_last_3d,
}


class Untranslatable(Exception):
    """A scripted module, or a graph, has no form here; the message is a sentence for the user."""


def filled(templates: dict[str, str], kind: str, texts: Sequence[str]) -> str | None:
    """The text of an operator; None where there is none for so many arguments."""
    template = templates.get(kind)
    if template is None or len(set(re.findall(r"{\d}", template))) != len(texts):
        return None
    return template.format(*texts)


def integer(value: Any) -> Any:
    """A number without its fraction; a symbol for one stays a symbol."""
    return value if isinstance(value, torch.SymInt) else int(value)


def floating(value: Any) -> Any:
    """A number as a float; a symbol for one stays a symbol."""
    if isinstance(value, torch.SymFloat):
        return value
    return torch.sym_float(value) if isinstance(value, torch.SymInt) else float(value)  # type: ignore[no-untyped-call]


def formatted(text: str, *values: Any) -> str:
    """TorchScript's `format`: each {} stands for one value; other fields mean nothing to it."""
    for value in values:
        text = text.replace("{}", str(value), 1)
    return text


def range_length(start: Any, stop: Any, step: Any) -> Any:
    """How many numbers a range has."""
    return max(0, (stop - start + step - (1 if step > 0 else -1)) // step)


NAMES: dict[str, Any] = {
    "torch": torch, "math": math, "integer": integer, "floating": floating,
    "range_length": range_length, "formatted": formatted, "NUMBERS": NUMBERS, "DTYPES": DTYPES,
    "LAYOUTS": LAYOUTS, "LAYOUT_NUMBERS": LAYOUT_NUMBERS, "FORMATS": FORMATS,
}  # fmt: skip
